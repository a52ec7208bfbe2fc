"""Verdict on a rollout, computed from the trial and the report of `fleet simulate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scripts.rollout_trials.trials import Trial

_BACK = frozenset({"rolled_back", "rejected"})


def problems(trial: Trial, report: dict[str, Any]) -> list[str]:
    """Return a sentence for each deviation from the expected outcome."""
    rollout, devices = report["rollout"], report["devices"]
    lines = []
    if not report["audit"]["passed"]:
        wrong = [entry for key in ("gaps", "invalid", "invalid_decisions") for entry in report["audit"].get(key, [])]
        lines.append(f"the audit fails: {wrong[:3]}")
    if not rollout["ended"]:
        lines.append("it did not end in time")
    if not trial.serves and rollout["served"]:
        lines.append(f"{rollout['served']} messages carry results of a bundle that should never serve")
    silent = [device["device"] for device in devices if device["runs"] is None]
    if silent:
        lines.append(f"no results at all from {', '.join(silent)}")
    lines += _finished(trial, rollout, devices) if trial.ends == "finished" else _stopped(trial, rollout, devices)
    return lines


def _finished(trial: Trial, rollout: dict[str, Any], devices: list[dict[str, Any]]) -> Iterator[str]:
    if rollout["state"] != "finished":
        yield f"it is {rollout['state']} at step {rollout['step']}, and should be finished"
    worse = set(rollout["disturbances"]["worse"]) if trial.back else set()
    for device in devices:
        back = device["device"] in worse
        if device["phase"] not in (_BACK if back else {"active"}):
            where = f"is {device['phase'] or 'unknown'} ({device['why']})"
            yield f"{device['device']} {where}, and should {'have taken it back' if back else 'have settled on it'}"
        if _runs_it(device, rollout) == back:
            yield f"{device['device']} runs {device['runs']}, and should {'not ' if back else ''}run it"


def _stopped(trial: Trial, rollout: dict[str, Any], devices: list[dict[str, Any]]) -> Iterator[str]:
    if rollout["state"] != "aborted":
        yield f"it is {rollout['state']} at step {rollout['step']}, and should be aborted"
    if rollout["strategy"] != trial.ends:
        yield f"it was stopped in {rollout['strategy']}, and should be in {trial.ends}"
    if still := [device["device"] for device in devices if _runs_it(device, rollout)]:
        yield f"{', '.join(still)} still run it"


def _runs_it(device: dict[str, Any], rollout: dict[str, Any]) -> bool:
    return device["runs"] is not None and device["runs"]["digest"] == rollout["digest"]
