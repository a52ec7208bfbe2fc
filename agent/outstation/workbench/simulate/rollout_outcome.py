"""Outcome of a simulated rollout, from the collector's database: phases and bundles of each device, and decisions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outstation.fleet import bundle_history
from outstation.fleet.database import rollouts
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.store import FleetStore
from outstation.fleet.rollout import journal
from outstation.fleet.rollout.journal import Rollout


def read_outcome(database: Path, name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return member `rollout` of the report, and the members that it adds to each device's entry."""
    with _open_snapshot(database) as (store, db):
        return build_outcome(store, db, journal.find(db, name))


def build_outcome(
    store: FleetStore, db: Connection, rollout: Rollout
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the outcome of a rollout, and by device what it did, inside a database snapshot."""
    devices: dict[str, dict[str, Any]] = {}
    for device, log in store.newest_logs():
        served: dict[str, int] = {}
        entry = devices[device] = {"served": served, "runs": None}
        # In order of seq: the bundle of the last message is the one that runs.
        for _, run in sorted(bundle_history.load_bundle_runs(db, (device, rollout.plan.task, log)).items()):
            served[run.version] = served.get(run.version, 0) + 1
            entry["runs"] = {"version": run.version, "digest": run.digest}
    for device, _, phase, reason, summary, _, strategy in _load_reports(db, rollout):
        report = {"phase": phase, "reason": reason, "why": summary, "strategy": strategy}
        devices.setdefault(device, {"served": {}, "runs": None}).update(report)
    for device, phase, _ in rollouts.load_phases(db, rollout.name):
        devices[device].setdefault("phases", []).append(phase)
    plan = rollout.plan
    document = {
        "name": rollout.name,
        "bundle": plan.bundle,
        "version": plan.version,
        "digest": plan.digest,
        "state": rollout.state,
        "step": rollout.step,
        "steps": len(plan.steps),
        "strategy": rollout.current_step.strategy,
        "decisions": [
            dict(zip(("n", "time", "event", "summary"), row[1:5], strict=True))
            for row in rollouts.load_decisions(db, rollout.name)
        ],
        # Messages of all devices with results of the new bundle.
        "served": sum(entry["served"].get(plan.version, 0) for entry in devices.values()),
    }
    return document, devices


def read_status(database: Path, name: str) -> tuple[str, dict[str, str]]:
    """Return the state of the rollout, and the phase of each device that reported one."""
    with _open_snapshot(database) as (_, db):
        if rollouts.find_rollout(db, name) is None:
            return "", {}
        rollout = journal.find(db, name)
        return rollout.state, {device: phase for device, _, phase, *_ in _load_reports(db, rollout)}


def _load_reports(db: Connection, rollout: Rollout) -> list[tuple[Any, ...]]:
    rows = rollouts.load_devices(db, rollout.name, rollout.plan.task, rollout.plan.digest)
    return [(device, key, phase, *others) for device, key, phase, *others in rows if phase is not None]


@contextlib.contextmanager
def _open_snapshot(database: Path) -> Iterator[tuple[FleetStore, Connection]]:
    with FleetStore(database, read_only=True) as store, store.snapshot() as db:
        yield store, db
