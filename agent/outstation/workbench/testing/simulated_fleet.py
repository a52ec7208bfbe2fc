"""Simulated fleet for tests: a scenario run step by step, with waits that say what was there when they fail."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from outstation.foundation.config.quantities import parse_duration
from outstation.workbench.testing.reasons import describe_fleet, match_alert, require_device
from outstation.workbench.testing.simulation import scenario, setup, simulation_report
from outstation.workbench.testing.simulation.log import MachineLog
from outstation.workbench.testing.simulation.lossy_link import LossyLink
from outstation.workbench.testing.simulation.runner import Outcome, Simulation
from outstation.workbench.testing.simulation.scenario import Scenario

_LOG_LINES = 30
# A test says itself how long it runs.
_DEFAULT_DURATION = "365 d"


class SimulatedFleet:
    """Devices, a broker in memory and a collector on a virtual clock. Times are texts such as `"30 s"`, simulated.

    `database`: the collector's, which an application under test may read while time stands still.
    """

    def __init__(
        self,
        folder: Path,
        *,
        devices: int | None = None,
        scenario: Path | str | Mapping[str, Any] | None = None,
        config: Path | str | None = None,
        bundles: Mapping[str, Path | str] | None = None,
        recordings: Mapping[str, Path | str | tuple[Path | str, Sequence[str]]] | None = None,
    ) -> None:
        """Create the fleet; its devices start when time passes. Raises ConfigError, UsageError.

        `scenario`: a file, TOML, or its content as a mapping, which needs no `duration`. A text that ends in `.toml` is
        the name of a file. `recordings`: a file for each
        stream, with the names of its columns where they are not the fields. `bundles`: by task.
        """
        folder.mkdir(parents=True, exist_ok=True)
        named = {
            name: (file, ()) if isinstance(file, Path | str) else file for name, file in (recordings or {}).items()
        }
        files = {name: (Path(file), columns) for name, (file, columns) in named.items()}
        paths = {task: str(bundle) for task, bundle in (bundles or {}).items()}
        self._setup = setup.load(None if config is None else Path(config), folder, paths, files, ())
        self.scenario = _read_scenario(folder, scenario, self._setup, devices)
        self._simulation = Simulation(folder, self.scenario, self._setup)
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._handler = MachineLog(self._simulation.room, self._log.append)
        logging.getLogger().addHandler(self._handler)
        self._outcome: Outcome | None = None
        try:
            self._simulation.start()
        except BaseException:
            self.close()
            raise

    @property
    def database(self) -> Path:
        return self._simulation.database

    @property
    def devices(self) -> list[str]:
        return [*self._simulation.devices]

    @property
    def now_s(self) -> float:
        """Simulated seconds since the start."""
        return self._simulation.now_s

    def run(self, duration: str) -> None:
        """Let simulated time pass."""
        self._simulation.advance(parse_duration(duration))

    def run_scenario(self) -> dict[str, Any]:
        """Run to the end of the scenario, and return its report, as `fleet simulate --json` prints it."""
        self._simulation.advance(max(0.0, self.scenario.duration - self.now_s))
        return simulation_report.build(self.scenario, self.finish(), self._simulation.store)

    def wait_for(
        self,
        alert: str = "",
        *,
        device: str = "",
        within: str,
        condition: Callable[[], object] | None = None,
        state: str = "raised",
    ) -> dict[str, Any]:
        """Let time pass until the collector has an alert, and return it. Raises AssertionError with what it has.

        `alert`: kind or subject, such as "drift" or "ax"; `state`: "raised" or "cleared". With a `condition` instead of
        an alert, which is checked after each turn of the collector, return {}.
        """
        self._require(device)
        matches: list[dict[str, Any]] = []

        def is_there() -> bool:
            if condition is not None:
                return bool(condition())
            matches[:] = match_alert(self.alerts(device), alert, state)
            return bool(matches)

        if not is_there() and not self._simulation.advance(parse_duration(within), is_there):
            wanted = (
                "the condition"
                if condition is not None
                else f"alert {alert!r} {state}"
                if alert
                else f"any alert {state}"
            )
            where = f" of {device}" if device else ""
            states = {name: self._simulation.devices[name].is_on for name in self.devices}
            seen = describe_fleet(self._simulation.store, states, self._log)
            raise AssertionError(f"{wanted}{where} did not come within {within}, until {self.now_s:.0f} s\n{seen}")
        return matches[0] if matches else {}

    def alerts(self, device: str = "") -> list[dict[str, Any]]:
        """Return all alerts that the collector has, raised and cleared, oldest first. Raises UsageError."""
        self._require(device)
        return self._simulation.store.alerts(device or None, closed=True)

    def connect(self, client: str, *topics: str) -> LossyLink:
        """Connect a client of the broker, which receives the messages of these topics."""
        link: LossyLink = self._simulation.air.connect(None, client, subscribe=topics, session_expiry_s=86_400)
        return link

    def set_offline(self, device: str, *, is_offline: bool) -> None:
        """Cut the network of a device, or restore it."""
        self._require(device)
        self._simulation.air.set_offline(device, is_offline=is_offline)

    def _require(self, device: str) -> None:
        require_device(device, self._simulation.devices)

    def finish(self) -> Outcome:
        """End the feeds, wait for what is under way, audit, and return the outcome; once."""
        if self._outcome is None:
            self._outcome = self._simulation.finish()
        return self._outcome

    def verify(self) -> None:
        """Finish, and raise AssertionError unless the audit passes and everything was delivered."""
        outcome = self.finish()
        if not outcome.audit.passed:
            raise AssertionError(f"the audit fails: {_shorten(outcome.audit.to_dict())}")
        offline = self._simulation.air.offline
        undelivered = [name for name in outcome.undelivered if name not in offline]
        if undelivered:
            raise AssertionError(f"not everything arrived from {', '.join(undelivered[:10])}")

    def close(self) -> None:
        logging.getLogger().removeHandler(self._handler)
        self._simulation.close()


def _read_scenario(
    folder: Path, given: Path | str | Mapping[str, Any] | None, chosen: setup.Setup, devices: int | None
) -> Scenario:
    """Read a scenario from a file, TOML or a mapping. Raises ConfigError."""
    file = folder / "scenario.toml"
    if isinstance(given, Path) or (isinstance(given, str) and given.endswith(".toml")):
        file = Path(given)
    elif isinstance(given, str):
        file.write_text(given, encoding="utf-8")
    else:
        file.write_text(setup.render_toml({"duration": _DEFAULT_DURATION, **(given or {})}), encoding="utf-8")
    groups = chosen.config.device.groups
    return scenario.load(file, chosen.fields, chosen.batch_s, devices, groups, chosen.optional_fields)


def _shorten(document: dict[str, Any]) -> str:
    problems = {name: document[name] for name in ("gaps", "duplicates", "invalid") if document[name]}
    return msgspec.json.encode(problems).decode()[:2000]
