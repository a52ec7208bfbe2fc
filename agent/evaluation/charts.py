"""An evaluation as pictures: which figures go into which."""

from __future__ import annotations

import numpy as np

from agent.evaluation.document import Drop, Evaluation, Fault
from agent.evaluation.robustness import NONE
from agent.render.charts import Line, forest
from agent.render.curve import Step, curve
from agent.render.heatmap import heatmap
from agent.render.reliability import Dot, reliability
from agent.text import figure

_MOST_CLASSES = 20
_MOST_LINES = 40
_STATES = {"worse": "drift", "small": "unknown"}


def reliability_of(found: Evaluation) -> str:
    dots = [Dot(b.score, b.right.value or 0.0, b.right.low, b.right.high, b.n) for b in found.reliability]
    return reliability(dots)


def recall_of(found: Evaluation) -> str:
    known = [c for c in found.classes if c.recall.value is not None]
    worst = sorted(known, key=lambda c: c.recall.value or 0.0)[:_MOST_LINES]
    shown = [c for c in known if c in worst]
    lines = [
        Line(c.label, c.recall.value or 0.0, c.recall.low, c.recall.high, f"{figure(c.recall.value)}  of {c.n:,}")
        for c in shown
    ]
    return forest("Recall by class", lines)


def confusion_of(found: Evaluation) -> str:
    """Of the classes with most mistakes, where there are many; empty without any."""
    labels = found.model.labels if found.model.kind == "classify" else ["normal", "anomaly"]
    if not found.confusion:
        return ""
    table = np.array(found.confusion)
    wrong = table.sum(axis=0) + table.sum(axis=1) - 2 * np.diag(table)
    if len(table) <= _MOST_CLASSES:
        shown = np.flatnonzero(table.sum(axis=0) + table.sum(axis=1))
    else:
        shown = np.sort(np.argsort(-wrong, kind="stable")[:_MOST_CLASSES])
    return heatmap([labels[i] for i in shown], table[np.ix_(shown, shown)].tolist())


def slices_of(found: Evaluation, field: str) -> str:
    whole = next((m.value for m in found.metrics if m.metric == found.slices[0].metric), None)
    lines = [
        Line(
            one.slice.partition("=")[2],
            one.value,
            one.low,
            one.high,
            f"{figure(one.value)}  of {one.n:,}",
            _STATES.get(one.state or "", "ok"),
        )
        for one in found.slices
        if one.slice.partition("=")[0] == field and one.value is not None
    ]
    return forest(f"Slices of {field}", lines[:_MOST_LINES], reference=whole)


def ablation_of(found: Evaluation) -> tuple[str, str]:
    """Of single fields, and of several together; empty without any."""
    single = [_line(d) for d in found.ablation if len(d.fields) == 1 and d.drop.value is not None]
    several = [_line(d) for d in found.ablation if len(d.fields) > 1 and d.drop.value is not None]
    pictures = [forest("What fields are worth", lines[:_MOST_LINES], reference=0.0) for lines in (single, several)]
    return pictures[0], pictures[1] if several else ""


def _line(drop: Drop) -> Line:
    lost = drop.drop
    state = "ok" if (lost.low or 0.0) > 0 else "unknown"
    return Line(", ".join(drop.fields), lost.value or 0.0, lost.low, lost.high, figure(lost.value), state)


def robustness_of(found: Evaluation) -> list[str]:
    """One for each fault, all on one axis."""
    every = [p.value for fault in found.robustness for p in fault.points]
    values = [v for span in every for v in (span.low, span.value, span.high) if v is not None]
    low = min(0.0, *values) if found.better == "up" else 0.0
    high = 1.0 if found.better == "up" else 1.05 * max(values, default=1.0)
    return [
        curve(f"{fault.fault}: {fault.meaning}", _steps(fault), low, high, reference=_untouched(fault))
        for fault in found.robustness
    ]


def _steps(fault: Fault) -> list[Step]:
    known = [(p.strength, p.value.value, p.value) for p in fault.points]
    return [Step(name, value, span.low, span.high) for name, value, span in known if value is not None]


def _untouched(fault: Fault) -> float | None:
    return next((p.value.value for p in fault.points if p.strength == NONE), None)
