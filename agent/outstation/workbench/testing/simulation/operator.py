"""Operator of a simulated fleet: delivers bundles, starts roll-outs and follows them, as `fleet rollout` does."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from outstation.fleet.config import FleetConfig, load_trusted_keys
from outstation.fleet.database.store import FleetStore
from outstation.fleet.rollout import actions, bundles, plan
from outstation.fleet.rollout.controller import RolloutController
from outstation.fleet.rollout.plan import RolloutPlan
from outstation.fleet.rollout.publisher import RolloutPublisher
from outstation.foundation import clock
from outstation.foundation.errors import StorageError, UsageError
from outstation.ml.model.bundle.bundle import Bundle
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.packets import BrokerLink
from outstation.protocol.wire import keys
from outstation.workbench.testing.simulation.lossy_link import LinkConditions
from outstation.workbench.testing.simulation.scenario import Rollout

log = logging.getLogger("outstation.simulation")

# `fleet rollout follow` evaluates the rules this often.
FOLLOW_S = 5.0
_CLIENT = "operator"


class PreparedRollout(msgspec.Struct, frozen=True):
    """Plan and bundle of a roll-out, as they were before the run."""

    plan: RolloutPlan
    bundle: Bundle


class Operator:
    """Operator with the key of the fleet in `home`. `air` is the broker, which is next to the operator.

    `prepared`: the roll-outs, and `refusals`: why one did not start, each by the plan file.
    """

    def __init__(self, home: Path, config: FleetConfig, store: FleetStore, air: Any, broker: BrokerConfig) -> None:
        self._home, self._fleet, self._air, self._broker = home, config.fleet.name, air, broker
        self.public_keys = load_trusted_keys(config)
        self.refusals: dict[str, str] = {}
        self.prepared: dict[str, PreparedRollout] = {}
        air.client_conditions[_CLIENT] = LinkConditions()
        key = keys.load_private(home / "operator.key")
        self._publisher = RolloutPublisher(store, self._fleet, home, key, self._connect)
        follower = RolloutPublisher(store, self._fleet, home, key, self._connect, role="follow")
        self._controller = RolloutController(follower, None, log.info)

    def prepare(self, event: Rollout, devices: Sequence[str]) -> None:
        """Read plan and bundle of a roll-out of `devices` that starts later.

        Raises UsageError, ConfigError, BadBundle.
        """
        file = plan.read(Path(event.plan))
        bundle = bundles.read_bundle(file)
        assert bundle is not None
        resolved = bundles.resolve(file, bundle, self._home)
        if any(resolved.name == other.plan.name for other in self.prepared.values()):
            raise UsageError(f"{event.plan}: rollout.name: {resolved.name!r} is the name of another roll-out, too")
        actions.require_selection(resolved, devices)
        self.prepared[event.plan] = PreparedRollout(resolved, bundle)

    def start(self, event: Rollout, homes: Iterable[Path]) -> None:
        """Put the bundle on the devices in these folders, and start the roll-out."""
        prepared = self.prepared[event.plan]
        _deliver(prepared.bundle, homes)
        try:
            self._publisher.execute(partial(actions.start, plan=prepared.plan))
        except UsageError as problem:
            self.refusals[event.plan] = str(problem)
            log.warning("%s", problem)

    def follow(self) -> bool:
        """Evaluate the rules of all open roll-outs once; return True while there is more to do."""
        try:
            return self._controller.tick(clock.boot_seconds())
        except StorageError as problem:
            log.error("%s; trying again", problem)
            return True

    def _connect(self) -> BrokerLink:
        # Other runs may use the same broker; one in memory takes no client id.
        link: BrokerLink = self._air.connect(self._broker, _CLIENT, client_id=f"outstation-{self._fleet}-rollout")
        return link


def _deliver(bundle: Bundle, homes: Iterable[Path]) -> None:
    """Write a bundle to the folder where a device looks for what it need not download."""
    for home in homes:
        folder = home / "data" / "bundles" / bundle.digest.removeprefix("sha256:")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in bundle.files.items():
            (folder / name).write_bytes(content)
