"""Run of a simulated fleet from start to report: steady, or with a rollout that is followed to its end."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from outstation.fleet import config as fleet_config
from outstation.fleet.rollout import plan as plans
from outstation.protocol.wire.keys import PublicKey
from outstation.workbench.simulate import disturbances, fleet_report, plan, rollout_outcome
from outstation.workbench.simulate.rollout import RolloutDriver
from outstation.workbench.simulate.scenario import from_name
from outstation.workbench.simulate.simulation import Simulation

ProgressCallback = Callable[[str], None]
_POLL_INTERVAL_S, _ANNOUNCE_S = 1.0, 10.0
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
    # `fleet rollout start` resolves the bundle.
    rollout_plan = plans.read(request.rollout.resolve()) if request.rollout is not None else None
    scenario, seconds = from_name(rollout_plan.task if rollout_plan else "exercise"), request.seconds
    if rollout_plan is not None:
        seconds += _SETTLE_TIMEOUT_S + _STARTUP_S * request.devices
    counts = {"away": request.away, "cut": request.cut, "slow": request.slow, "worse": request.worse}
    names = plan.device_names(request.devices)
    disturbed = disturbances.draw(names, request.seed, span_s=_ROLLOUT_DURATION_S, **counts)
    fleet_plan = plan.steady_plan(request.devices, seconds, request.speed, request.seed, scenario, disturbed.degraded)
    rollout: dict[str, Any] = {}
    with Simulation(home, fleet_plan, request.broker) as fleet, contextlib.ExitStack() as stack:
        driver = None
        if rollout_plan is not None:
            driver = RolloutDriver(fleet, rollout_plan, disturbed, list(request.trusted), request.seed)
            stack.callback(driver.close)
            driver.prepare()
            fleet.extra_config = driver.device_config
        fleet.start()
        announce(f"{request.devices} devices run over {fleet.broker_name}")
        end_s = time.monotonic() + request.seconds
        if driver is None:
            _watch(fleet, end_s, announce)
        else:
            driver.start()
            rollout["ended"] = _follow_rollout(driver, end_s, announce)
            rollout["disturbances"] = driver.disturbance_report()
        fleet.stop()
    result = fleet_report.build_report(fleet.database, fleet_plan, fleet_config.load_trusted_keys(fleet.prepare()))
    for device in result.devices:
        device["restarts"] = fleet.restarts.get(device["device"], [])
    document = {"devices": result.devices, "accuracy": result.accuracy, "audit": result.audit.to_dict()}
    if rollout_plan is not None:
        outcome, by_device = rollout_outcome.read_outcome(fleet.database, rollout_plan.name)
        document["rollout"] = outcome | rollout
        for device in result.devices:
            device |= {"runs": None, "phase": "", "reason": "", "why": ""} | by_device.get(device["device"], {})
    return document


def _watch(fleet: Simulation, until_s: float, announce: ProgressCallback) -> None:
    """Wait until all rows have results, and announce how many have, now and then."""
    total, next_s = fleet.plan.rows * len(fleet.plan.sites), time.monotonic() + _ANNOUNCE_S
    for devices in fleet.watch_progress(until_s):
        if (now_s := time.monotonic()) >= next_s:
            next_s = now_s + _ANNOUNCE_S
            rows, messages = (sum(device[name] for device in devices) for name in ("rows", "messages"))
            announce(
                f"{rows / total:.0%} of the rows have results; {messages:,} messages, {until_s - now_s:.0f} s left"
            )


def _follow_rollout(driver: RolloutDriver, until_s: float, announce: ProgressCallback) -> bool:
    """Wait until the rollout is over and devices have settled; return False if it took too long."""
    last_status, over_s = "", None
    while True:
        driver.fleet.restart_exited()
        driver.tick()
        state, phases = rollout_outcome.read_status(driver.fleet.database, driver.plan.name)
        counts = ", ".join(f"{count} {phase}" for phase, count in sorted(Counter(phases.values()).items()))
        if (status := f"{state}: {counts or 'no reports yet'}") != last_status:
            announce(status)
            last_status = status
        now_s = time.monotonic()
        if driver.is_over:
            over_s = now_s if over_s is None else over_s
            settled = not _ACTIVE_PHASES.intersection(phases.values())
            if state == "finished":
                is_complete = len(phases) == len(driver.fleet.plan.sites)
                settled = is_complete and _FINAL_PHASES.issuperset(phases.values())
            if settled or now_s > over_s + _SETTLE_TIMEOUT_S:
                return True
        elif now_s > until_s:
            return False
        time.sleep(_POLL_INTERVAL_S)
