"""Labels and accuracy: the newest metrics of each device and task, and those of labels that came to the collector."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.fleet.evidence.contents import Measured, Model, Place
from agent.fleet.evidence.limits import MOST
from agent.wire.messages import Metric, Quality

# The one figure of a task that is told first, by what its model does, and whether more of it is better.
HEADLINE = {"accuracy": True, "auc": True, "mae": False, "f1_micro": True}


class Accuracy(msgspec.Struct):
    """Messages come by device, log and seq."""

    newest: dict[str, str]
    left_out: int = 0
    forgotten: int = 0
    _last: dict[tuple[str, str], Measured] = msgspec.field(default_factory=dict)

    def add(self, body: Quality) -> None:
        known = self._last.get((body.device, body.task))
        if known is None and len(self._last) >= MOST.tasks:
            self.forgotten += 1
        elif known is None or self.newest.get(body.device) == body.log or known.time <= body.time:
            self._last[body.device, body.task] = _of(body)

    def all(self, rows: list[dict[str, Any]], labels: dict[tuple[str, str], dict[str, int]]) -> list[Measured]:
        """The worst first, by their headline; `rows` and `labels` are the collector's."""
        own: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            own.setdefault((row["device"], row["task"]), []).append(row)
        found = [*self._last.values()]
        found += [_of_collector(key, own.get(key, []), labels.get(key, {})) for key in sorted({*own, *labels})]
        found.sort(key=_badness)
        self.left_out = self.forgotten + max(0, len(found) - MOST.measured)
        return found[: MOST.measured]


def headline(one: Measured) -> Metric | None:
    """The metric that is told first, of all labelled results."""
    whole = {metric.metric: metric for metric in one.metrics if not metric.slice and metric.value is not None}
    return next((whole[name] for name in HEADLINE if name in whole), None)


def _badness(one: Measured) -> tuple[Any, ...]:
    metric = headline(one)
    if metric is None or metric.value is None:
        return (one.task, 1, 0.0, one.device, one.source)
    return (one.task, 0, metric.value if HEADLINE[metric.metric] else -metric.value, one.device, one.source)


def _of(body: Quality) -> Measured:
    model = body.model
    sources = body.labels.get("sources")
    counted = sources if isinstance(sources, dict) else {}
    return Measured(
        device=body.device,
        task=body.task,
        time=body.time,
        source="device",
        model=Model(model.name, model.version, model.digest) if model else None,
        labels={str(k)[:64]: n for k, n in counted.items() if type(n) is int},
        metrics=list(body.metrics),
        labelling={name: told for name, told in body.labels.items() if name != "sources"},
        estimate=body.estimate,
        place=Place(body.device, body.log, body.seq),
    )


def _of_collector(key: tuple[str, str], rows: list[dict[str, Any]], labels: dict[str, int]) -> Measured:
    names = ("metric", "value", "low", "high", "n", "slice", "state")
    return Measured(
        device=key[0],
        task=key[1],
        time=max((row["time"] for row in rows), default=""),
        source="collector",
        model=None,
        labels=labels,
        metrics=[Metric(**{name: row[name] for name in names}) for row in rows],
    )
