"""A simulated fleet from start to report: on recordings alone, or with a roll-out that is followed to its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from agent.fleet import operators
from agent.simulate import disturbances, plan, report, rollout_outcome
from agent.simulate.plan import Plan
from agent.simulate.rollout import Rolling, Subject, subject
from agent.simulate.scenario import Scenario, named
from agent.simulate.simulation import Simulation
from agent.wire.keys import PublicKey

Tell = Callable[[str], None]
_LOOK_S = 1.0
# A roll-out that goes well takes about so long; who is away is away for a part of it.
_SPAN_S = 60.0
# After its end: devices come to what was decided last, and one that was away to all of it.
_SETTLES_S = 45.0
# Until a device is up, beside others and on two cores.
_STARTS_S = 2.0
_UNDER_WAY = frozenset({"fetching", "shadow", "probation"})
_ARRIVED = frozenset({"settled", "rolled back", "refused"})


class Order(msgspec.Struct, frozen=True):
    """What is asked for. `seconds`: to run, or with `rollout` the longest it may take; counts are of devices.

    `trusted`: keys of publishers, beside the one whose bundles ship.
    """

    devices: int
    seconds: float
    speed: float
    seed: int
    rollout: Path | None = None
    broker: str | None = None
    trusted: tuple[PublicKey, ...] = ()
    away: int = 0
    cut: int = 0
    slow: int = 0
    worse: int = 0


def run(home: Path, order: Order, tell: Tell) -> dict[str, Any]:
    """The report, as contract section 11 has it, without `seconds`. Raises OutstationError."""
    if order.rollout is None:
        return _alone(home, order, tell)
    about = subject(order.rollout)
    return _rolled(home, order, about, named(about.task), tell)


def _alone(home: Path, order: Order, tell: Tell) -> dict[str, Any]:
    hard = _hardship(order)
    fielded = plan.steady(order.devices, order.seconds, order.speed, order.seed, named("exercise"), hard.worse)
    with Simulation(home, fielded, order.broker) as fleet:
        fleet.start()
        tell(f"{order.devices} devices run over {fleet.broker_name}")
        for _ in fleet.watch(time.monotonic() + order.seconds):
            pass
        fleet.stop()
    return _document(fleet, fielded)


def _rolled(home: Path, order: Order, about: Subject, scenario: Scenario, tell: Tell) -> dict[str, Any]:
    hard = _hardship(order)
    fielded = plan.steady(
        order.devices,
        order.seconds + _SETTLES_S + _STARTS_S * order.devices,
        order.speed,
        order.seed,
        scenario,
        hard.worse,
    )
    with Simulation(home, fielded, order.broker) as fleet, contextlib.ExitStack() as leaving:
        rolling = Rolling(fleet, about, hard, list(order.trusted), order.seed)
        leaving.callback(rolling.close)
        rolling.prepare()
        fleet.more = rolling.config
        fleet.start()
        tell(f"{order.devices} devices run over {fleet.broker_name}")
        rolling.begin()
        over = _followed(rolling, about.name, time.monotonic() + order.seconds, tell)
        fleet.stop()
    document = _document(fleet, fielded)
    found = rollout_outcome.ended(fleet.database, about.name)
    document["rollout"] = found.rollout | {"ended": over, "hardship": rolling.suffered()}
    for device in document["devices"]:
        device |= {"runs": None, "phase": "", "reason": "", "why": ""} | found.devices.get(device["device"], {})
    return document


def _followed(rolling: Rolling, name: str, until_s: float, tell: Tell) -> bool:
    """Look on until the roll-out is over and devices got where it sent them; whether it was over in time."""
    said, over_s = "", None
    while True:
        rolling.fleet.check_alive()
        rolling.turn()
        state, phases = rollout_outcome.standing(rolling.fleet.database, name)
        if (now := f"{state}: {_counts(phases)}") != said:
            tell(now)
            said = now
        moment = time.monotonic()
        if rolling.over:
            over_s = moment if over_s is None else over_s
            if _settled(state, phases, len(rolling.fleet.plan.sites)) or moment > over_s + _SETTLES_S:
                return True
        elif moment > until_s:
            return False
        time.sleep(_LOOK_S)


def _settled(state: str, phases: dict[str, str], devices: int) -> bool:
    """Whether every device is where the roll-out's end sends it."""
    if state == "finished":
        return len(phases) == devices and _ARRIVED.issuperset(phases.values())
    return not _UNDER_WAY.intersection(phases.values())


def _counts(phases: dict[str, str]) -> str:
    each = sorted(set(phases.values()))
    return ", ".join(f"{list(phases.values()).count(phase)} {phase}" for phase in each) or "nothing heard yet"


def _hardship(order: Order) -> disturbances.Hardship:
    counts = {"away": order.away, "cut": order.cut, "slow": order.slow, "worse": order.worse}
    return disturbances.draw(plan.names(order.devices), order.seed, span_s=_SPAN_S, **counts)


def _document(fleet: Simulation, fielded: Plan) -> dict[str, Any]:
    found = report.report(fleet.database, fielded, operators.trusted(fleet.prepare()))
    for one in found.devices:
        one["restarts"] = fleet.restarts.get(one["device"], [])
    return {"devices": found.devices, "accuracy": found.accuracy, "audit": found.audit.document()}
