"""Accuracy of results in operation: the newest metrics of each device and task, and the collector's own."""

from __future__ import annotations

from typing import Any

import msgspec

from outstation.evidence.format.contents import WRITE_LIMITS, AccuracyEntry, MessageRef, ModelRef
from outstation.protocol.wire.messages import Metric, QualityPayload

# Headline metric of a task, by kind of model → True if higher is better.
HEADLINE_METRICS = {"accuracy": True, "auc": True, "mae": False, "f1_micro": True}


class AccuracyCollector(msgspec.Struct):
    """Newest `quality` message of each (device, task, output). Messages arrive ordered by device, log and seq."""

    newest_logs: dict[str, str]
    omitted: int = 0
    untracked: int = 0
    _latest: dict[tuple[str, str, str], AccuracyEntry] = msgspec.field(default_factory=dict)

    def add(self, body: QualityPayload) -> None:
        key = (body.device, body.task, body.output)
        known = self._latest.get(key)
        if known is None and len(self._latest) >= WRITE_LIMITS.tasks:
            self.untracked += 1
        elif known is None or self.newest_logs.get(body.device) == body.log or known.time <= body.time:
            model, sources = body.model, body.labels.get("sources")
            counts = sources if isinstance(sources, dict) else {}
            self._latest[key] = AccuracyEntry(
                device=body.device,
                task=body.task,
                time=body.time,
                source="device",
                model=ModelRef(model.name, model.version, model.digest) if model else None,
                labels={str(name)[:64]: n for name, n in counts.items() if type(n) is int},
                metrics=list(body.metrics),
                label_coverage={name: value for name, value in body.labels.items() if name != "sources"},
                estimate=body.estimate,
                message=MessageRef(body.device, body.log, body.seq),
                output=body.output,
            )

    def build_entries(
        self, rows: list[dict[str, Any]], labels: dict[tuple[str, str, str], dict[str, int]]
    ) -> list[AccuracyEntry]:
        """Return all entries, worst headline metric first. `rows` and `labels` are the collector's own."""
        rows_by_output: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for row in rows:
            rows_by_output.setdefault((row["device"], row["task"], row["output"]), []).append(row)
        names = ("metric", "value", "low", "high", "n", "slice", "state")
        entries = [*self._latest.values()]
        for device, task, output in sorted({*rows_by_output, *labels}):
            own = rows_by_output.get((device, task, output), [])
            newest = max((row["time"] for row in own), default="")
            metrics = [Metric(**{name: row[name] for name in names}) for row in own]
            entry = AccuracyEntry(
                device=device,
                task=task,
                time=newest,
                source="collector",
                model=None,
                labels=labels.get((device, task, output), {}),
                metrics=metrics,
                output=output,
            )
            entries.append(entry)
        entries.sort(key=_worst_first_key)
        self.omitted = self.untracked + max(0, len(entries) - WRITE_LIMITS.accuracy_entries)
        return entries[: WRITE_LIMITS.accuracy_entries]


def select_headline(entry: AccuracyEntry) -> Metric | None:
    """Return the headline metric over all labelled results, not over a slice of them."""
    overall = {metric.metric: metric for metric in entry.metrics if not metric.slice and metric.value is not None}
    return next((overall[name] for name in HEADLINE_METRICS if name in overall), None)


def _worst_first_key(entry: AccuracyEntry) -> tuple[Any, ...]:
    metric = select_headline(entry)
    if metric is None or metric.value is None:
        return entry.task, entry.output, 1, 0.0, entry.device, entry.source
    value = metric.value if HEADLINE_METRICS[metric.metric] else -metric.value
    return entry.task, entry.output, 0, value, entry.device, entry.source
