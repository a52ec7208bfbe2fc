"""Tables of an evaluation as rows of text and whole numbers, for the report, the cards and the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from outstation.foundation.text import format_interval, format_value
from outstation.ml.performance.metrics import display_name
from outstation.ml.performance.slices import SMALL, WORSE
from outstation.workbench.evaluation.adversarial.results import ALL_FIELDS, SmallestChange
from outstation.workbench.evaluation.document import Evaluation, IntervalEstimate, RobustnessCurve

Row = Sequence[str | int]
_MAX_POINTS = 12  # of an attack, in text
_SLICE_STATES = {WORSE: "worse than the rest", SMALL: "too small to tell"}


def to_texts(rows: Sequence[Row]) -> list[list[str]]:
    """Return the rows with thousands separators in their numbers."""
    return [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]


def format_estimate(estimate: IntervalEstimate) -> str:
    return f"{format_value(estimate.value)} {format_interval(estimate.low, estimate.high)}".strip()


def format_curve(curve: RobustnessCurve) -> str:
    return "; ".join(f"{point.strength}: {format_value(point.value.value)}" for point in curve.points)


def metric_rows(evaluation: Evaluation) -> list[Row]:
    """Return name, value, interval, n."""
    return [
        (display_name(m.metric), format_value(m.value), format_interval(m.low, m.high), m.n) for m in evaluation.metrics
    ]


def class_rows(evaluation: Evaluation) -> list[Row]:
    """Return label, recall, precision, F1, n."""
    return [
        (c.label, *(format_estimate(estimate) for estimate in (c.recall, c.precision, c.f1)), c.n)
        for c in evaluation.classes
    ]


def slice_rows(evaluation: Evaluation) -> list[Row]:
    """Return slice, value, interval, n, state."""
    return [
        (s.slice, format_value(s.value), format_interval(s.low, s.high), s.n, _SLICE_STATES.get(s.state or "", ""))
        for s in evaluation.slices
    ]


def importance_rows(evaluation: Evaluation) -> list[Row]:
    """Return fields, drop of the metric, interval."""
    drops = [(", ".join(d.fields), d.metric_drop) for d in evaluation.field_importance]
    return [(names, format_value(d.value), format_interval(d.low, d.high)) for names, d in drops]


def attack_rows(evaluation: Evaluation) -> list[Row]:
    """Return attack, share of flipped answers at each strength; none without attacks."""
    attacks = evaluation.adversarial.attacks if evaluation.adversarial else []
    return [
        (attack.attack, "; ".join(f"{point.strength}: {point.value:.0%}" for point in attack.points[:_MAX_POINTS]))
        for attack in attacks
    ]


def smallest_change_rows(evaluation: Evaluation, *, by_class: bool) -> list[Row]:
    """Return field, class, median and smallest change that flips an answer, in sd and in units, and the windows."""
    changes = evaluation.adversarial.smallest_changes if evaluation.adversarial else []
    return [
        (
            change.field,
            change.label or "any",
            _format_change(change.median_sd, change.median, change),
            # With --privacy the change of a single window is left out.
            "–"
            if change.smallest_sd is None and change.flipped
            else _format_change(change.smallest_sd, change.smallest, change),
            change.n,
        )
        for change in changes
        if by_class or not change.label or change.field == ALL_FIELDS
    ]


def _format_change(size_sd: float | None, size: float | None, change: SmallestChange) -> str:
    if size_sd is None:
        return f"> {change.largest_sd:g} sd"
    return f"{size_sd:.2g} sd" + ("" if size is None else f", {size:.3g} {change.unit}".rstrip())


def suspect_rows(evaluation: Evaluation) -> list[Row]:
    """Return file, row, label, prediction, score."""
    return [(s.file, s.row, s.label, s.predicted, format_value(s.score)) for s in evaluation.suspects]


def confusion_labels(evaluation: Evaluation) -> list[str]:
    return evaluation.model.labels if evaluation.model.kind == "classify" else ["normal", "anomaly"]


def float_comparison_rows(evaluation: Evaluation) -> list[Row]:
    """Return name and value; none without a float model."""
    other = evaluation.float_comparison
    if other is None:
        return []
    name, own_bytes = display_name(evaluation.metric), evaluation.model.bytes
    mean, largest = format_value(other.mean_output_difference), format_value(other.max_output_difference)
    return [
        *([("labels agree", format_estimate(other.agreement))] if other.agreement else []),
        ("outputs differ by", f"{mean} on average, {largest} at most"),
        (f"{name} of the float model", format_estimate(other.float_metric)),
        (f"{name} of this model, less that", format_estimate(other.metric_difference)),
        ("bytes", f"{own_bytes:,} of {other.bytes:,} ({own_bytes / max(1, other.bytes):.0%})"),
    ]
