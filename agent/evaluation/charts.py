"""An evaluation as pictures: which figures go into which."""

from __future__ import annotations

import numpy as np

from agent.evaluation.document import Evaluation, FieldImportance, RobustnessCurve
from agent.evaluation.robustness import NO_FAULT
from agent.render.charts import (
    CurvePoint,
    ForestRow,
    ReliabilityPoint,
    render_curve,
    render_forest,
    render_heatmap,
    render_reliability,
)
from agent.text import format_value

_MAX_CLASSES = 20
_MAX_LINES = 40
_CHART_STATES = {"worse": "drift", "small": "unknown"}


def reliability_chart(evaluation: Evaluation) -> str:
    dots = [
        ReliabilityPoint(b.score, b.right.value or 0.0, b.right.low, b.right.high, b.n) for b in evaluation.reliability
    ]
    return render_reliability(dots)


def recall_chart(evaluation: Evaluation) -> str:
    known = [c for c in evaluation.classes if c.recall.value is not None]
    worst = sorted(known, key=lambda c: c.recall.value or 0.0)[:_MAX_LINES]
    shown = [c for c in known if c in worst]
    lines = [
        ForestRow(
            c.label, c.recall.value or 0.0, c.recall.low, c.recall.high, f"{format_value(c.recall.value)}  of {c.n:,}"
        )
        for c in shown
    ]
    return render_forest("Recall by class", lines)


def confusion_chart(evaluation: Evaluation) -> str:
    """Of the classes with most mistakes, where there are many; empty without any."""
    labels = evaluation.model.labels if evaluation.model.kind == "classify" else ["normal", "anomaly"]
    if not evaluation.confusion:
        return ""
    table = np.array(evaluation.confusion)
    wrong = table.sum(axis=0) + table.sum(axis=1) - 2 * np.diag(table)
    if len(table) <= _MAX_CLASSES:
        shown = np.flatnonzero(table.sum(axis=0) + table.sum(axis=1))
    else:
        shown = np.sort(np.argsort(-wrong, kind="stable")[:_MAX_CLASSES])
    return render_heatmap([labels[i] for i in shown], table[np.ix_(shown, shown)].tolist())


def slices_chart(evaluation: Evaluation, field: str) -> str:
    whole = next((m.value for m in evaluation.metrics if m.metric == evaluation.slices[0].metric), None)
    lines = [
        ForestRow(
            one.slice.partition("=")[2],
            one.value,
            one.low,
            one.high,
            f"{format_value(one.value)}  of {one.n:,}",
            _CHART_STATES.get(one.state or "", "ok"),
        )
        for one in evaluation.slices
        if one.slice.partition("=")[0] == field and one.value is not None
    ]
    return render_forest(f"Slices of {field}", lines[:_MAX_LINES], reference=whole)


def ablation_charts(evaluation: Evaluation) -> tuple[str, str]:
    """Of single fields, and of several together; empty without any."""
    single = [_importance_row(d) for d in evaluation.ablation if len(d.fields) == 1 and d.drop.value is not None]
    several = [_importance_row(d) for d in evaluation.ablation if len(d.fields) > 1 and d.drop.value is not None]
    pictures = [
        render_forest("What fields are worth", lines[:_MAX_LINES], reference=0.0) for lines in (single, several)
    ]
    return pictures[0], pictures[1] if several else ""


def _importance_row(importance: FieldImportance) -> ForestRow:
    lost = importance.drop
    state = "ok" if (lost.low or 0.0) > 0 else "unknown"
    return ForestRow(
        ", ".join(importance.fields), lost.value or 0.0, lost.low, lost.high, format_value(lost.value), state
    )


def robustness_charts(evaluation: Evaluation) -> list[str]:
    """One for each fault, all on one axis."""
    every = [p.value for fault in evaluation.robustness for p in fault.points]
    values = [v for span in every for v in (span.low, span.value, span.high) if v is not None]
    low = min(0.0, *values) if evaluation.better == "up" else 0.0
    high = 1.0 if evaluation.better == "up" else 1.05 * max(values, default=1.0)
    return [
        render_curve(
            f"{fault.fault}: {fault.meaning}", _curve_points(fault), low, high, reference=_fault_free_value(fault)
        )
        for fault in evaluation.robustness
    ]


def _curve_points(fault: RobustnessCurve) -> list[CurvePoint]:
    known = [(p.strength, p.value.value, p.value) for p in fault.points]
    return [CurvePoint(name, value, span.low, span.high) for name, value, span in known if value is not None]


def _fault_free_value(fault: RobustnessCurve) -> float | None:
    return next((p.value.value for p in fault.points if p.strength == NO_FAULT), None)
