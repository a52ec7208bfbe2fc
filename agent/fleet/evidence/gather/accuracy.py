"""Labels and accuracy: the newest metrics of each device and task, and those of labels that came to the collector."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.fleet.evidence.format.contents import WRITE_LIMITS, AccuracyEntry, MessageRef, ModelRef
from agent.wire.messages import Metric, QualityPayload

# The one figure of a task that is told first, by what its model does, and whether more of it is better.
HEADLINE_METRICS = {"accuracy": True, "auc": True, "mae": False, "f1_micro": True}


class AccuracyCollector(msgspec.Struct):
    """Messages come by device, log and seq."""

    newest_logs: dict[str, str]
    omitted: int = 0
    untracked: int = 0
    _latest: dict[tuple[str, str], AccuracyEntry] = msgspec.field(default_factory=dict)

    def add(self, body: QualityPayload) -> None:
        known = self._latest.get((body.device, body.task))
        if known is None and len(self._latest) >= WRITE_LIMITS.tasks:
            self.untracked += 1
        elif known is None or self.newest_logs.get(body.device) == body.log or known.time <= body.time:
            self._latest[body.device, body.task] = _entry_from_message(body)

    def build_entries(
        self, rows: list[dict[str, Any]], labels: dict[tuple[str, str], dict[str, int]]
    ) -> list[AccuracyEntry]:
        """The worst first, by their headline; `rows` and `labels` are the collector's."""
        own: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            own.setdefault((row["device"], row["task"]), []).append(row)
        found = [*self._latest.values()]
        found += [_entry_from_rows(key, own.get(key, []), labels.get(key, {})) for key in sorted({*own, *labels})]
        found.sort(key=_worst_first_key)
        self.omitted = self.untracked + max(0, len(found) - WRITE_LIMITS.accuracy_entries)
        return found[: WRITE_LIMITS.accuracy_entries]


def select_headline(entry: AccuracyEntry) -> Metric | None:
    """The metric that is told first, of all labelled results."""
    whole = {metric.metric: metric for metric in entry.metrics if not metric.slice and metric.value is not None}
    return next((whole[name] for name in HEADLINE_METRICS if name in whole), None)


def _worst_first_key(entry: AccuracyEntry) -> tuple[Any, ...]:
    metric = select_headline(entry)
    if metric is None or metric.value is None:
        return (entry.task, 1, 0.0, entry.device, entry.source)
    return (
        entry.task,
        0,
        metric.value if HEADLINE_METRICS[metric.metric] else -metric.value,
        entry.device,
        entry.source,
    )


def _entry_from_message(body: QualityPayload) -> AccuracyEntry:
    model = body.model
    sources = body.labels.get("sources")
    counted = sources if isinstance(sources, dict) else {}
    return AccuracyEntry(
        device=body.device,
        task=body.task,
        time=body.time,
        source="device",
        model=ModelRef(model.name, model.version, model.digest) if model else None,
        labels={str(k)[:64]: n for k, n in counted.items() if type(n) is int},
        metrics=list(body.metrics),
        labelling={name: told for name, told in body.labels.items() if name != "sources"},
        estimate=body.estimate,
        place=MessageRef(body.device, body.log, body.seq),
    )


def _entry_from_rows(key: tuple[str, str], rows: list[dict[str, Any]], labels: dict[str, int]) -> AccuracyEntry:
    names = ("metric", "value", "low", "high", "n", "slice", "state")
    return AccuracyEntry(
        device=key[0],
        task=key[1],
        time=max((row["time"] for row in rows), default=""),
        source="collector",
        model=None,
        labels=labels,
        metrics=[Metric(**{name: row[name] for name in names}) for row in rows],
    )
