"""Window part of a batch: the messages of its closed drift windows, and of the learning that ended with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from msgspec.structs import replace

from outstation.device.batch_parts import columns, drift_state
from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.batch_parts.drift_part import DriftPart
from outstation.device.batch_parts.drift_state import LearningRefusals
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.store import task_keys
from outstation.device.store.message_log import PendingMessage
from outstation.device.store.predictions import output_key
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import clock
from outstation.ml.drift.state import DriftWindowResult, QuietRun
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.performance import degradation
from outstation.protocol.alerts.alert import Alert


class WindowPart(BatchPart):
    """Messages of the drift windows that `drift` closed, each with its alerts and what it ended to learn.

    Where labels contradict the certainty of an output, the accuracy that is expected from it is marked.
    """

    def __init__(self, plan: TaskPlan, drift: DriftPart) -> None:
        self._plan, self._drift = plan, drift
        self._before = self._after = LearningRefusals()
        self._contradicted: Collection[str] = ()

    def read(self, batch: Batch) -> None:
        state = self._drift.state
        is_learning = state.site_reference is None or state.is_inherited
        self._before = drift_state.load_refusals(batch.store, self._plan.name) if is_learning else LearningRefusals()
        self._contradicted = list_contradicted(self._plan, batch.store)

    def compute(self, batch: Batch, results: InferenceResult) -> Iterable[PendingMessage]:
        messages, task = list[PendingMessage](), self._plan.name
        self._after = self._before
        for window in batch.drift_windows:
            body, alerts = self._build_body(window), window.alerts
            if self._contradicted:
                _mark_estimates(body, self._contradicted)
            if "" in self._contradicted:
                alerts = tuple(map(_mark_contradicted, alerts))
            messages.append(PendingMessage("drift", task, body, alerts))
            learning, self._after = drift_state.build_learning_messages(task, window, self._after)
            messages += learning
        return messages

    def save(self, tx: Transaction, batch: Batch) -> None:
        if self._after != self._before:
            drift_state.save_refusals(tx, self._plan.name, self._after)

    def _build_body(self, window: DriftWindowResult) -> dict[str, Any]:
        """Return the body of a window's message; a run of quiet windows is one message."""
        span = {
            "index": window.index,
            "rows": list(window.rows),
            "from": clock.to_rfc3339(window.t[0]),
            "to": clock.to_rfc3339(window.t[1]),
            "n": window.row_count,
        }
        reference = {"shipped": self._drift.monitor.shipped.digest, "site": window.site_digest}
        body = {"model": self._plan.bundle_ref, "reference": reference, "window": span}
        if window.quiet is not None and len(window.quiet) > 1:
            body["windows"] = _quiet_columns(window.quiet)
        return body | window.members


def list_contradicted(plan: TaskPlan, store: Store) -> frozenset[str]:
    """Return the outputs whose expected accuracy or error is contradicted by labels at present."""
    digest, states = plan.bundle.digest, dict[str, bytes | None]()
    for name in plan.bundle.manifest.label_schemas:
        states[name] = store.load_state(output_key(plan.name, name), task_keys.LABEL_METRICS)
    return frozenset(
        name for name, state in states.items() if state is not None and degradation.contradict_certainty(state, digest)
    )


def _mark_estimates(body: dict[str, Any], contradicted: Collection[str]) -> None:
    """Note which expected accuracies and errors of a drift message are known to be wrong."""
    if "" in contradicted and body["estimate"]:
        body["estimate"] = {**body["estimate"], "outside": True}
    if further := body["output"].get("further"):
        marked = {
            name: {**part, "estimate": {**part["estimate"], "outside": True}}
            if name in contradicted and part.get("estimate")
            else part
            for name, part in further.items()
        }
        body["output"] = {**body["output"], "further": marked}


def _mark_contradicted(alert: Alert) -> Alert:
    """Note that the accuracy or error which the alert expects is known to be wrong."""
    name = next((name for name in ("accuracy", "error") if name in alert.evidence), None)
    if name is None:
        return alert
    evidence = {**alert.evidence, name: {**alert.evidence[name], "outside": True}}
    return replace(alert, summary=f"{alert.summary} Labels contradict this expected {name}.", evidence=evidence)


def _quiet_columns(quiet: QuietRun) -> dict[str, Any]:
    (first, last), (begin, end) = quiet.rows.T, quiet.t.T
    return {
        "first": columns.encode_runs(first),
        "last": columns.encode_runs(last),
        "from": columns.encode_times(begin),
        "to": columns.encode_times(end),
        "n": columns.encode_runs(quiet.row_counts),
        "nearest": quiet.nearest.tolist(),
    }
