"""Whether a roll-out ended as it should: pure, from the trial and the report of `fleet simulate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scripts.staged.trials import Trial

_STEPS = {"shadow": "shadow", "canary": "canary"}


def problems(trial: Trial, report: dict[str, Any]) -> list[str]:
    """A sentence for each thing that is not as it should be."""
    rollout, devices = report["rollout"], report["devices"]
    found = []
    if not report["audit"]["passed"]:
        found.append(f"the audit fails: {report['audit']['invalid'][:3]}")
    if not rollout["ended"]:
        found.append("it did not end in time")
    if not trial.serves and rollout["served"]:
        found.append(f"{rollout['served']} messages carry results of a bundle that should never serve")
    silent = [one["device"] for one in devices if one["runs"] is None]
    if silent:
        found.append(f"no results at all from {', '.join(silent)}")
    found += _finished(trial, rollout, devices) if trial.ends == "finished" else _stopped(trial, rollout, devices)
    return found


def _finished(trial: Trial, rollout: dict[str, Any], devices: list[dict[str, Any]]) -> Iterator[str]:
    if rollout["state"] != "finished":
        yield f"it is {rollout['state']} at step {rollout['step']}, and should be finished"
    worse = set(rollout["hardship"]["worse"]) if trial.back else set()
    for one in devices:
        wanted = "rolled back" if one["device"] in worse else "settled"
        if one["phase"] != wanted:
            yield f"{one['device']} is {one['phase'] or 'not heard of'} ({one['why']}), and should be {wanted}"
        runs_it = one["runs"] is not None and one["runs"]["digest"] == rollout["digest"]
        if runs_it != (wanted == "settled"):
            yield f"{one['device']} runs {one['runs']}, but is to be {wanted}"


def _stopped(trial: Trial, rollout: dict[str, Any], devices: list[dict[str, Any]]) -> Iterator[str]:
    if rollout["state"] != "aborted":
        yield f"it is {rollout['state']} at step {rollout['step']}, and should be aborted"
    strategies = {one.get("strategy") for one in devices}
    reached = rollout["strategy"]
    if reached != trial.ends:
        yield f"it was stopped in {reached}, and should be stopped in {trial.ends} ({sorted(map(str, strategies))})"
    for one in devices:
        if one["runs"] is not None and one["runs"]["digest"] == rollout["digest"]:
            yield f"{one['device']} still runs it"
