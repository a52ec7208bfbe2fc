"""What came of a simulated fleet, as the collector has it, and how right the models were before anything went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agent.datasets.recordings import Recordings, load
from agent.fleet.audit.audit import AuditReport, audit
from agent.fleet.database.store import FleetStore
from agent.model.inference.scores import ANOMALY
from agent.simulate.plan import SimulatedSite, SimulationPlan
from agent.wire.keys import PublicKey


class Score(msgspec.Struct, frozen=True):
    """`total` of right answers, or of how far off values were, over `n` results."""

    total: float = 0.0
    n: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.total + other.total, self.n + other.n)

    def mean(self, digits: int) -> float | None:
        return round(self.total / self.n, digits) if self.n else None


class SimulationReport(msgspec.Struct, frozen=True):
    """Of each device, of all together, and the audit; `accuracy` or `mae` where the recordings have labels for it."""

    devices: list[dict[str, Any]]
    accuracy: float | None
    mae: float | None
    audit: AuditReport


def build_report(database: Path, plan: SimulationPlan, operators: Sequence[PublicKey] = ()) -> SimulationReport:
    """Against what is labelled of the recordings, of results from before the site's first fault.

    `operators`: keys whose decisions about roll-outs count.
    """
    store = FleetStore(database, read_only=True)
    try:
        view = {row["device"]: row for row in store.progress()}
        recordings = load(plan.scenario.file)
        right, off, devices = Score(), Score(), []
        for site in plan.sites:
            named, valued = _accuracy_score(store, plan, recordings, site), _error_score(store, plan, recordings, site)
            scores = {"accuracy": named.mean(4), "mae": valued.mean(1), "anomalies": _anomaly_rates(store, plan, site)}
            devices.append(_device_entry(store, site, view.get(site.device, {})) | scores)
            right, off = right + named, off + valued
        return SimulationReport(devices, right.mean(4), off.mean(1), audit(store, operators=operators))
    finally:
        store.close()


def _device_entry(store: FleetStore, site: SimulatedSite, progress: dict[str, Any]) -> dict[str, Any]:
    raised = [a for a in store.alerts(site.device, closed=True) if a["state"] == "raised"]
    counted = {name: progress.get(name, 0) for name in ("rows", "windows", "results")}
    subjects = {
        kind: sorted({a["subject"] for a in raised if a["alert"] == kind}) for kind in ("drift", "fault", "quality")
    }
    return {
        "device": site.device,
        **counted,
        "verified": progress.get("messages", 0),
        "drift": subjects["drift"],
        "faults": subjects["fault"],
        "quality": subjects["quality"],
        "alerts": [a["summary"] for a in raised],
        "labelled_mae": store.newest_metric(site.device, "mae"),
    }


def _accuracy_score(store: FleetStore, plan: SimulationPlan, recordings: Recordings, site: SimulatedSite) -> Score:
    if plan.scenario.kind != "classify":
        return Score()
    truth = plan.row_labels(recordings, site)
    answers = [(row, label) for row, label in store.labels(site.device) if row < plan.first_faulty_row(site)]
    return Score(float(sum(truth[row - 1] == label for row, label in answers)), len(answers))


def _anomaly_rates(store: FleetStore, plan: SimulationPlan, site: SimulatedSite) -> list[float | None] | None:
    """Share of results that are called an anomaly, before and after the row where something goes wrong somewhere."""
    if plan.scenario.kind != "anomaly":
        return None
    said = store.labels(site.device)
    parts = [[label for row, label in said if (row < plan.scenario.baseline_rows) == early] for early in (True, False)]
    return [round(part.count(ANOMALY) / len(part), 4) if part else None for part in parts]


def _error_score(store: FleetStore, plan: SimulationPlan, recordings: Recordings, site: SimulatedSite) -> Score:
    if plan.scenario.delayed_labels is None:
        return Score()
    truth = plan.metered_labels(recordings, site)
    known = np.array(
        [(row, value) for row, value in store.values(site.device) if row < plan.first_faulty_row(site)]
    ).reshape(-1, 2)
    off = np.abs(truth[known[:, 0].astype(np.int64) - 1] - known[:, 1])
    return Score(float(np.nansum(off)), int(np.isfinite(off).sum()))
