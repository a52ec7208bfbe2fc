"""Run of a simulated fleet from start to report: steady, or with a rollout that is followed to its end."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
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
# Usual duration of a rollout; outages are a part of it.
_ROLLOUT_DURATION_S = 60.0
# After its end: devices, also returned ones, reach the state that was decided last.
_SETTLE_TIMEOUT_S = 45.0
# Start of a device next to others, on two cores.
_STARTUP_S = 2.0
_ACTIVE_PHASES = frozenset({"downloading", "shadow", "canary"})
_FINAL_PHASES = frozenset({"active", "rolled_back", "rejected"})


class SimulationRequest(msgspec.Struct, frozen=True):
    """Options of a simulation.

    `seconds`: duration, or with `rollout` its limit. `trusted`: keys of publishers in addition to the built-in one.
    `away`, `cut`, `slow`, `worse`: numbers of devices with each disturbance.
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
    """Return the document of `fleet simulate --json` without `seconds`. Raises OutstationError."""
    if request.rollout is None:
        return _run_steady(home, request, announce)
    target = read_target(request.rollout)
    return _run_rollout(home, request, target, from_name(target.task), announce)


def _run_steady(home: Path, request: SimulationRequest, announce: ProgressCallback) -> dict[str, Any]:
    disturbed = _draw_disturbances(request)
    scenario = from_name("exercise")
    fleet_plan = plan.steady_plan(
        request.devices, request.seconds, request.speed, request.seed, scenario, disturbed.degraded
    )
    with Simulation(home, fleet_plan, request.broker) as fleet:
        fleet.start()
        announce(f"{request.devices} devices run over {fleet.broker_name}")
        for _ in fleet.watch_progress(time.monotonic() + request.seconds):
            pass
        fleet.stop()
    return _build_document(fleet, fleet_plan)


def _run_rollout(
    home: Path, request: SimulationRequest, target: RolloutTarget, scenario: Scenario, announce: ProgressCallback
) -> dict[str, Any]:
    disturbed = _draw_disturbances(request)
    seconds = request.seconds + _SETTLE_TIMEOUT_S + _STARTUP_S * request.devices
    fleet_plan = plan.steady_plan(request.devices, seconds, request.speed, request.seed, scenario, disturbed.degraded)
    with Simulation(home, fleet_plan, request.broker) as fleet, contextlib.ExitStack() as stack:
        driver = RolloutDriver(fleet, target, disturbed, list(request.trusted), request.seed)
        stack.callback(driver.close)
        driver.prepare()
        fleet.extra_config = driver.device_config
        fleet.start()
        announce(f"{request.devices} devices run over {fleet.broker_name}")
        driver.start()
        ended = _follow_rollout(driver, target.name, time.monotonic() + request.seconds, announce)
        fleet.stop()
    document = _build_document(fleet, fleet_plan)
    outcome = rollout_outcome.read_outcome(fleet.database, target.name)
    document["rollout"] = outcome.rollout | {"ended": ended, "disturbances": driver.disturbance_report()}
    for device in document["devices"]:
        device |= {"runs": None, "phase": "", "reason": "", "why": ""} | outcome.devices.get(device["device"], {})
    return document


def _follow_rollout(driver: RolloutDriver, name: str, until_s: float, announce: ProgressCallback) -> bool:
    """Wait until the rollout is over and devices have settled; return False if it took too long."""
    last_status, over_s = "", None
    while True:
        driver.fleet.restart_exited()
        driver.tick()
        state, phases = rollout_outcome.read_status(driver.fleet.database, name)
        if (status := f"{state}: {_format_phase_counts(phases)}") != last_status:
            announce(status)
            last_status = status
        now_s = time.monotonic()
        if driver.is_over:
            over_s = now_s if over_s is None else over_s
            if _has_settled(state, phases, len(driver.fleet.plan.sites)) or now_s > over_s + _SETTLE_TIMEOUT_S:
                return True
        elif now_s > until_s:
            return False
        time.sleep(_POLL_INTERVAL_S)


def _has_settled(state: str, phases: dict[str, str], device_count: int) -> bool:
    """Return True if every device has reached its final phase."""
    if state == "finished":
        return len(phases) == device_count and _FINAL_PHASES.issuperset(phases.values())
    return not _ACTIVE_PHASES.intersection(phases.values())


def _format_phase_counts(phases: dict[str, str]) -> str:
    counts = Counter(phases.values())
    return ", ".join(f"{counts[phase]} {phase}" for phase in sorted(counts)) or "no reports yet"


def _draw_disturbances(request: SimulationRequest) -> disturbances.Disturbances:
    counts = {"away": request.away, "cut": request.cut, "slow": request.slow, "worse": request.worse}
    return disturbances.draw(plan.device_names(request.devices), request.seed, span_s=_ROLLOUT_DURATION_S, **counts)


def _build_document(fleet: Simulation, fleet_plan: SimulationPlan) -> dict[str, Any]:
    result = report.build_report(fleet.database, fleet_plan, fleet_config.load_trusted_keys(fleet.prepare()))
    for device in result.devices:
        device["restarts"] = fleet.restarts.get(device["device"], [])
    return {"devices": result.devices, "accuracy": result.accuracy, "audit": result.audit.to_dict()}
