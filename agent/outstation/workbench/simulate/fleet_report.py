"""Report of a simulated fleet from the collector's database: results, alerts, audit, accuracy before any fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outstation.fleet.audit.audit import audit
from outstation.fleet.audit.audit_report import AuditReport
from outstation.fleet.database.store import FleetStore
from outstation.ml.datasets.recordings import Recordings, load
from outstation.ml.model.inference.scores import ANOMALY
from outstation.protocol.wire.keys import PublicKey
from outstation.workbench.simulate.plan import SimulatedSite, SimulationPlan


class Score(msgspec.Struct, frozen=True):
    """Sum of correct predictions, or of absolute errors, over `n` results."""

    total: float = 0.0
    n: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.total + other.total, self.n + other.n)

    def mean(self, digits: int) -> float | None:
        return round(self.total / self.n, digits) if self.n else None


class SimulationReport(msgspec.Struct, frozen=True):
    """Entries of devices, overall accuracy or MAE if the recordings have labels, and the audit."""

    devices: list[dict[str, Any]]
    accuracy: float | None
    mae: float | None
    audit: AuditReport


def build_report(database: Path, plan: SimulationPlan, operators: Sequence[PublicKey] = ()) -> SimulationReport:
    """Compare results before each site's first fault with the labels of the recordings, and audit the database.

    `operators`: keys with which decisions about rollouts are valid.
    """
    with FleetStore(database, read_only=True) as store:
        progress = {row["device"]: row for row in store.progress()}
        recordings = load(plan.scenario.file)
        accuracy, error, devices = Score(), Score(), []
        for site in plan.sites:
            correct = _accuracy_score(store, plan, recordings, site)
            absolute = _error_score(store, plan, recordings, site)
            rates = _anomaly_rates(store, plan, site)
            scores = {"accuracy": correct.mean(4), "mae": absolute.mean(1), "anomalies": rates}
            raised = [a for a in store.alerts(site.device, closed=True) if a["state"] == "raised"]
            subjects = {
                member: sorted({a["subject"] for a in raised if a["alert"] == kind})
                for member, kind in (("drift", "drift"), ("faults", "fault"), ("quality", "quality"))
            }
            counts = progress.get(site.device, {})
            entry = {name: counts.get(name, 0) for name in ("rows", "windows", "results")}
            entry |= {"verified": counts.get("messages", 0), **subjects, "alerts": [a["summary"] for a in raised]}
            entry |= {"labelled_mae": store.newest_metric(site.device, "mae")}
            devices.append({"device": site.device, **entry, **scores})
            accuracy, error = accuracy + correct, error + absolute
        return SimulationReport(devices, accuracy.mean(4), error.mean(1), audit(store, operators=operators))


def _accuracy_score(store: FleetStore, plan: SimulationPlan, recordings: Recordings, site: SimulatedSite) -> Score:
    if plan.scenario.kind != "classify":
        return Score()
    truth = plan.row_labels(recordings, site)
    predicted = [(row, label) for row, label in store.labels(site.device) if row < plan.first_faulty_row(site)]
    return Score(float(sum(truth[row - 1] == label for row, label in predicted)), len(predicted))


def _anomaly_rates(store: FleetStore, plan: SimulationPlan, site: SimulatedSite) -> list[float | None] | None:
    """Return the share of results predicted as anomaly before and after the row of the first fault of any site."""
    if plan.scenario.kind != "anomaly":
        return None
    predicted = store.labels(site.device)
    parts = [
        [label for row, label in predicted if (row < plan.scenario.baseline_rows) == early] for early in (True, False)
    ]
    return [round(part.count(ANOMALY) / len(part), 4) if part else None for part in parts]


def _error_score(store: FleetStore, plan: SimulationPlan, recordings: Recordings, site: SimulatedSite) -> Score:
    if plan.scenario.delayed_labels is None:
        return Score()
    truth = plan.metered_labels(recordings, site)
    known = np.array(
        [(row, value) for row, value in store.values(site.device) if row < plan.first_faulty_row(site)]
    ).reshape(-1, 2)
    errors = np.abs(truth[known[:, 0].astype(np.int64) - 1] - known[:, 1])
    return Score(float(np.nansum(errors)), int(np.isfinite(errors).sum()))
