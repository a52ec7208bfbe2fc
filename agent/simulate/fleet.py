"""A simulated fleet from start to report: on recordings alone, or with a roll-out that is followed to its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from agent.fleet import config as fleet_config
from agent.simulate import disturbances, plan, report, rollout_outcome
from agent.simulate.plan import SimulationPlan
from agent.simulate.rollout import RolloutDriver, RolloutTarget, read_target
from agent.simulate.scenario import Scenario, from_name
from agent.simulate.simulation import Simulation
from agent.wire.keys import PublicKey

ProgressCallback = Callable[[str], None]
_POLL_INTERVAL_S = 1.0
# A roll-out that goes well takes about so long; who is away is away for a part of it.
_ROLLOUT_DURATION_S = 60.0
# After its end: devices come to what was decided last, and one that was away to all of it.
_SETTLE_TIMEOUT_S = 45.0
# Until a device is up, beside others and on two cores.
_STARTUP_S = 2.0
_ACTIVE_PHASES = frozenset({"downloading", "shadow", "canary"})
_FINAL_PHASES = frozenset({"active", "rolled_back", "rejected"})


class SimulationRequest(msgspec.Struct, frozen=True):
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


def run(home: Path, request: SimulationRequest, announce: ProgressCallback) -> dict[str, Any]:
    """Return the report of `fleet simulate --json`, without `seconds`. Raises OutstationError."""
    if request.rollout is None:
        return _run_steady(home, request, announce)
    about = read_target(request.rollout)
    return _run_rollout(home, request, about, from_name(about.task), announce)


def _run_steady(home: Path, request: SimulationRequest, announce: ProgressCallback) -> dict[str, Any]:
    hard = _draw_disturbances(request)
    fielded = plan.steady_plan(
        request.devices, request.seconds, request.speed, request.seed, from_name("exercise"), hard.degraded
    )
    with Simulation(home, fielded, request.broker) as fleet:
        fleet.start()
        announce(f"{request.devices} devices run over {fleet.broker_name}")
        for _ in fleet.watch_progress(time.monotonic() + request.seconds):
            pass
        fleet.stop()
    return _build_document(fleet, fielded)


def _run_rollout(
    home: Path, request: SimulationRequest, target: RolloutTarget, scenario: Scenario, announce: ProgressCallback
) -> dict[str, Any]:
    hard = _draw_disturbances(request)
    fielded = plan.steady_plan(
        request.devices,
        request.seconds + _SETTLE_TIMEOUT_S + _STARTUP_S * request.devices,
        request.speed,
        request.seed,
        scenario,
        hard.degraded,
    )
    with Simulation(home, fielded, request.broker) as fleet, contextlib.ExitStack() as leaving:
        rolling = RolloutDriver(fleet, target, hard, list(request.trusted), request.seed)
        leaving.callback(rolling.close)
        rolling.prepare()
        fleet.extra_config = rolling.device_config
        fleet.start()
        announce(f"{request.devices} devices run over {fleet.broker_name}")
        rolling.start()
        over = _follow_rollout(rolling, target.name, time.monotonic() + request.seconds, announce)
        fleet.stop()
    document = _build_document(fleet, fielded)
    found = rollout_outcome.read_outcome(fleet.database, target.name)
    document["rollout"] = found.rollout | {"ended": over, "hardship": rolling.disturbance_report()}
    for device in document["devices"]:
        device |= {"runs": None, "phase": "", "reason": "", "why": ""} | found.devices.get(device["device"], {})
    return document


def _follow_rollout(driver: RolloutDriver, name: str, until_s: float, announce: ProgressCallback) -> bool:
    """Look on until the roll-out is over and devices got where it sent them; whether it was over in time."""
    said, over_s = "", None
    while True:
        driver.fleet.restart_exited()
        driver.tick()
        state, phases = rollout_outcome.read_status(driver.fleet.database, name)
        if (now := f"{state}: {_format_phase_counts(phases)}") != said:
            announce(now)
            said = now
        moment = time.monotonic()
        if driver.is_over:
            over_s = moment if over_s is None else over_s
            if _has_settled(state, phases, len(driver.fleet.plan.sites)) or moment > over_s + _SETTLE_TIMEOUT_S:
                return True
        elif moment > until_s:
            return False
        time.sleep(_POLL_INTERVAL_S)


def _has_settled(state: str, phases: dict[str, str], device_count: int) -> bool:
    """Whether every device is where the roll-out's end sends it."""
    if state == "finished":
        return len(phases) == device_count and _FINAL_PHASES.issuperset(phases.values())
    return not _ACTIVE_PHASES.intersection(phases.values())


def _format_phase_counts(phases: dict[str, str]) -> str:
    each = sorted(set(phases.values()))
    return ", ".join(f"{list(phases.values()).count(phase)} {phase}" for phase in each) or "nothing heard yet"


def _draw_disturbances(request: SimulationRequest) -> disturbances.Disturbances:
    counts = {"away": request.away, "cut": request.cut, "slow": request.slow, "worse": request.worse}
    return disturbances.draw(plan.device_names(request.devices), request.seed, span_s=_ROLLOUT_DURATION_S, **counts)


def _build_document(fleet: Simulation, fleet_plan: SimulationPlan) -> dict[str, Any]:
    found = report.build_report(fleet.database, fleet_plan, fleet_config.load_trusted_keys(fleet.prepare()))
    for one in found.devices:
        one["restarts"] = fleet.restarts.get(one["device"], [])
    return {"devices": found.devices, "accuracy": found.accuracy, "audit": found.audit.to_dict()}
