"""HTML report of an evaluation, with charts, for people who decide whether a model is released."""

from __future__ import annotations

import numpy as np

from agent.evaluation.document import CheckResult, Evaluation, FieldImportance, IntervalEstimate, RobustnessCurve
from agent.evaluation.sensitivity import NO_FAULT
from agent.performance.estimates import MetricEstimate
from agent.performance.metrics import display_name
from agent.performance.slices import SMALL, WORSE
from agent.render import html as page
from agent.render.charts import (
    CurvePoint,
    ForestRow,
    ReliabilityPoint,
    render_curve,
    render_forest,
    render_heatmap,
    render_reliability,
)
from agent.render.html import Content, Markup, element, section, table
from agent.text import format_interval, format_value

_HEADLINE_METRICS = {
    "classify": ("accuracy", "f1_macro", "brier", "ece"),
    "regress": ("mae", "rmse", "r2", "bias"),
    "anomaly": ("auc", "average_precision", "precision", "recall"),
    "embedding": ("auc", "average_precision", "precision", "recall"),
}
_KIND_PHRASES = {
    "classify": "It predicts a class",
    "regress": "It predicts a number",
    "anomaly": "It detects anomalies",
    "embedding": "It measures the distance from normal",
}
_CHART_STATES = {WORSE: "drift", SMALL: "unknown"}
_MAX_CLASSES = 20
_MAX_LINES = 40


def render_html(evaluation: Evaluation) -> str:
    parts = [
        *_header(evaluation),
        _data_checks_section(evaluation),
        _metrics_section(evaluation),
        *_classes_section(evaluation),
        *_slices_section(evaluation),
        *_importance_section(evaluation),
        *_robustness_section(evaluation),
        *_float_comparison_section(evaluation),
        *_latency_section(evaluation),
        *_suspects_section(evaluation),
        _footer(evaluation),
    ]
    return page.render_document(f"{evaluation.model.name} {evaluation.model.version}: evaluation", parts)


def format_estimate(estimate: IntervalEstimate) -> str:
    return f"{format_value(estimate.value)} {format_interval(estimate.low, estimate.high)}".strip()


def _header(evaluation: Evaluation) -> list[Markup]:
    model, data = evaluation.model, evaluation.data
    groups = f" of {data.groups} groups ({data.group})" if data.group else ""
    files = ", ".join(source.file for source in data.files[:3]) + (" and more" if len(data.files) > 3 else "")
    when = f", {data.begin[:10]} to {data.end[:10]}" if data.begin and data.end else ""
    known = {metric.metric: metric for metric in evaluation.metrics}
    lead = f"{_KIND_PHRASES[model.kind]}; evaluated on {data.windows:,} windows{groups} in {files}{when}."
    tiles = (_metric_tile(known[name]) for name in _HEADLINE_METRICS[model.kind] if name in known)
    return [
        element("h1", f"{model.name} {model.version}"),
        element("p", lead, css_class="muted"),
        element("div", *tiles, css_class="tiles"),
        _warnings_notice(evaluation),
    ]


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _metric_tile(metric: MetricEstimate) -> Markup:
    within = format_interval(metric.low, metric.high)
    return element(
        "div",
        element("span", _capitalize(display_name(metric.metric))),
        element("b", format_value(metric.value)),
        element("span", f"95 % {within}" if within else "no interval"),
        css_class="tile",
    )


def _warnings_notice(evaluation: Evaluation) -> Markup:
    if not evaluation.warnings:
        passed = sum(check.state == "ok" for check in (*evaluation.leakage, *evaluation.label_checks))
        text = f"Nothing of concern in {passed} checks and {len(evaluation.slices)} slices."
        return element("div", text, css_class="notice ok")
    title = element("b", "Look at this first" if len(evaluation.warnings) > 1 else "Look at this")
    return element("div", title, page.bullet_list(evaluation.warnings), css_class="notice")


def _data_checks_section(evaluation: Evaluation) -> Markup:
    checks = (*evaluation.leakage, *evaluation.label_checks)
    rows: list[list[Content]] = [[_state_badge(check), check.check.capitalize(), check.summary] for check in checks]
    notes = [page.bullet_list(evaluation.notes, "notes")] if evaluation.notes else []
    return section(
        "Can the metrics be trusted?",
        "Whether the test data are new to the model, and whether the labels look right.",
        table(["", "Check", "Result"], rows),
        *notes,
    )


def _state_badge(check: CheckResult) -> Markup:
    kind = check.state if check.state in ("ok", "warning") else "none"
    return element("span", check.state, css_class=f"state {kind}")


def _metrics_section(evaluation: Evaluation) -> Markup:
    rows = [
        [_capitalize(display_name(m.metric)), format_value(m.value), format_interval(m.low, m.high), f"{m.n:,}"]
        for m in evaluation.metrics
    ]
    lead = f"Intervals: {evaluation.intervals}."
    metrics = table(["Metric", "Value", "95 % interval", "n"], rows, (1, 2, 3))
    if not evaluation.reliability:
        return section("Performance", lead, metrics)
    note = "On the dashed line scores are right as often as they say; below it the model is overconfident."
    chart = page.card("Reliability diagram", note, _reliability_chart(evaluation))
    return section("Performance", lead, element("div", element("div", metrics), chart, css_class="grid"))


def _reliability_chart(evaluation: Evaluation) -> str:
    return render_reliability(
        [
            ReliabilityPoint(b.score, b.accuracy.value or 0.0, b.accuracy.low, b.accuracy.high, b.n)
            for b in evaluation.reliability
        ]
    )


def _classes_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.classes and not evaluation.confusion:
        return []
    cards = []
    if evaluation.classes:
        lead = "Recall: the share of a class's windows that is predicted as this class."
        cards.append(page.card("Recall by class", lead, _recall_chart(evaluation)))
    if evaluation.confusion:
        lead = "A row for each true class, a column for each predicted one; stronger is a larger share of the row."
        cards.append(page.card("Confusion matrix", lead, _confusion_chart(evaluation)))
    rows = [
        [c.label, format_estimate(c.recall), format_estimate(c.precision), format_estimate(c.f1), f"{c.n:,}"]
        for c in evaluation.classes
    ]
    more = [table(["Class", "Recall", "Precision", "F1", "Windows"], rows, (1, 2, 3, 4))] if rows else []
    title = "By class" if evaluation.classes else "At the threshold"
    return [section(title, "", element("div", *cards, css_class="grid"), *more)]


def _recall_chart(evaluation: Evaluation) -> str:
    known = [c for c in evaluation.classes if c.recall.value is not None]
    worst = sorted(known, key=lambda c: c.recall.value or 0.0)[:_MAX_LINES]
    rows = [
        _forest_row(c.label, c.recall, f"{format_value(c.recall.value)}  of {c.n:,}", "ok") for c in known if c in worst
    ]
    return render_forest("Recall by class", rows)


def _confusion_chart(evaluation: Evaluation) -> str:
    """Draw the classes with most mistakes, if there are many."""
    labels = evaluation.model.labels if evaluation.model.kind == "classify" else ["normal", "anomaly"]
    matrix = np.array(evaluation.confusion)
    both = matrix.sum(axis=0) + matrix.sum(axis=1)
    shown = np.flatnonzero(both)
    if len(matrix) > _MAX_CLASSES:
        shown = np.sort(np.argsort(2 * np.diag(matrix) - both, kind="stable")[:_MAX_CLASSES])
    return render_heatmap([labels[i] for i in shown], matrix[np.ix_(shown, shown)].tolist())


def _slices_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.slices:
        return []
    lead = (
        "The same metric for a part of the data; the dashed line is all of it. Worse: beyond chance against the rest, "
        "with Holm's correction over all slices."
    )
    fields = dict.fromkeys(estimate.slice.partition("=")[0] for estimate in evaluation.slices)
    cards = [page.card(name, "", _slices_chart(evaluation, name), _slice_legend(evaluation, name)) for name in fields]
    return [section("Slices", lead, element("div", *cards, css_class="grid"))]


def _slices_of(evaluation: Evaluation, field: str) -> list[MetricEstimate]:
    return [estimate for estimate in evaluation.slices if estimate.slice.partition("=")[0] == field]


def _slices_chart(evaluation: Evaluation, field: str) -> str:
    whole = next((m.value for m in evaluation.metrics if m.metric == evaluation.slices[0].metric), None)
    rows = [
        ForestRow(
            estimate.slice.partition("=")[2],
            estimate.value,
            estimate.low,
            estimate.high,
            f"{format_value(estimate.value)}  of {estimate.n:,}",
            _CHART_STATES.get(estimate.state or "", "ok"),
        )
        for estimate in _slices_of(evaluation, field)
        if estimate.value is not None
    ]
    return render_forest(f"Slices of {field}", rows[:_MAX_LINES], reference=whole)


def _slice_legend(evaluation: Evaluation, field: str) -> Markup:
    states = {estimate.state for estimate in _slices_of(evaluation, field)}
    meanings = {WORSE: "orange: worse than the rest", SMALL: "grey: too few to tell"}
    shown = [text for state, text in meanings.items() if state in states]
    return element("p", "; ".join(shown), css_class="muted") if shown else Markup("")


def _importance_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.field_importance:
        return []
    change = "rises" if evaluation.direction == "lower" else "falls"
    lead = f"How much {display_name(evaluation.metric)} {change} if a field's readings are those of another window."
    single = [d for d in evaluation.field_importance if len(d.fields) == 1]
    together = [d for d in evaluation.field_importance if len(d.fields) > 1]
    cards = [page.card("Single fields", "", _importance_chart(single))]
    if together:
        note = "The model misses neither of two fields that carry the same information."
        cards.append(page.card("Fields of one unit together", note, _importance_chart(together)))
    return [section("Field importance", lead, element("div", *cards, css_class="grid"))]


def _importance_chart(importances: list[FieldImportance]) -> str:
    rows = [
        _forest_row(
            ", ".join(importance.fields),
            importance.metric_drop,
            format_value(importance.metric_drop.value),
            "ok" if (importance.metric_drop.low or 0.0) > 0 else "unknown",
        )
        for importance in importances
        if importance.metric_drop.value is not None
    ]
    return render_forest("Field importance", rows[:_MAX_LINES], reference=0.0)


def _forest_row(label: str, estimate: IntervalEstimate, text: str, state: str) -> ForestRow:
    return ForestRow(label, estimate.value or 0.0, estimate.low, estimate.high, text, state)


def _robustness_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.robustness:
        return []
    name = _capitalize(display_name(evaluation.metric))
    lead = f"{name} with an injected fault, with its interval; the dashed line is without the fault."
    cards = [
        page.card(curve.fault.capitalize(), _capitalize(curve.meaning) + ".", chart)
        for curve, chart in zip(evaluation.robustness, _robustness_charts(evaluation), strict=True)
    ]
    return [section("When sensors fail", lead, element("div", *cards, css_class="grid small"))]


def _robustness_charts(evaluation: Evaluation) -> list[str]:
    """Draw each fault, all on one axis."""
    estimates = [point.value for curve in evaluation.robustness for point in curve.points]
    values = [v for e in estimates for v in (e.low, e.value, e.high) if v is not None]
    higher = evaluation.direction == "higher"
    low, high = min(0.0, *values) if higher else 0.0, 1.0 if higher else 1.05 * max(values, default=1.0)
    return [
        render_curve(
            f"{curve.fault}: {curve.meaning}", _curve_points(curve), low, high, reference=_fault_free_value(curve)
        )
        for curve in evaluation.robustness
    ]


def _curve_points(curve: RobustnessCurve) -> list[CurvePoint]:
    return [
        CurvePoint(point.strength, point.value.value, point.value.low, point.value.high)
        for point in curve.points
        if point.value.value is not None
    ]


def _fault_free_value(curve: RobustnessCurve) -> float | None:
    return next((point.value.value for point in curve.points if point.strength == NO_FAULT), None)


def float_comparison_rows(evaluation: Evaluation) -> list[list[str]]:
    """Return (name, value) rows of the comparison with the float model; none without it."""
    other = evaluation.float_comparison
    if other is None:
        return []
    name, own_bytes = display_name(evaluation.metric), evaluation.model.bytes
    rows = [["labels agree", format_estimate(other.agreement)]] if other.agreement else []
    mean, largest = format_value(other.mean_output_difference), format_value(other.max_output_difference)
    return [
        *rows,
        ["outputs differ by", f"{mean} on average, {largest} at most"],
        [f"{name} of the float model", format_estimate(other.float_metric)],
        [f"{name} of this model, less that", format_estimate(other.metric_difference)],
        ["bytes", f"{own_bytes:,} of {other.bytes:,} ({own_bytes / max(1, other.bytes):.0%})"],
    ]


def _float_comparison_section(evaluation: Evaluation) -> list[Markup]:
    if evaluation.float_comparison is None:
        return []
    file = evaluation.float_comparison.file
    lead = f"The same windows through {file}; differences are paired, so their interval is narrow."
    rows = [[_capitalize(name), value] for name, value in float_comparison_rows(evaluation)]
    return [section("Comparison with the float model", lead, table(["", ""], rows))]


def _latency_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.latency:
        return []
    other = {p.batch: p for p in evaluation.float_comparison.latency} if evaluation.float_comparison else {}
    rows = []
    for p in evaluation.latency:
        cells = [f"{p.batch}", f"{p.p50_ms:g}", f"{p.p95_ms:g}", f"{p.per_second:,.0f}", f"{p.memory_mib:g}"]
        rows.append([*cells, f"{other[p.batch].p50_ms:g}"] if other else cells)
    lead = (
        f"From readings to scores, in a process of its own, one thread, {evaluation.model.runtime}, "
        f"{evaluation.machine}. A device is slower."
    )
    head = ["Windows at once", "ms, median", "ms, 95th percentile", "Windows per second", "Peak memory, MiB"]
    head += ["Float model: ms, median"] if other else []
    return [section("Latency", lead, table(head, rows, range(len(head))))]


def _suspects_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.suspects:
        return []
    rows = [[s.file, f"{s.row:,}", s.label, s.predicted, f"{s.score:.3f}"] for s in evaluation.suspects]
    lead = "Labels that the model contradicts with confidence: either the model or the label is wrong."
    return [section("Suspect labels", lead, table(["File", "Row", "Label", "Predicted", "Score"], rows, (1, 4)))]


def _footer(evaluation: Evaluation) -> Markup:
    model = evaluation.model
    return element(
        "footer",
        f"Evaluated {evaluation.evaluated_at[:16].replace('T', ' ')} UTC by outstation {evaluation.agent} with "
        f"{model.runtime} in {evaluation.seconds:.1f} s. Bundle ",
        element("code", model.digest),
        f", signature: {model.signature}.",
    )
