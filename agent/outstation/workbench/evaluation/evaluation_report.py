"""HTML report of an evaluation, with charts, for people who decide whether a model is released."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from outstation.foundation.render import charts
from outstation.foundation.render import html as page
from outstation.foundation.render.charts import CurvePoint, ForestRow, ReliabilityPoint
from outstation.foundation.render.html import Content, Markup, element, section, table
from outstation.foundation.text import format_interval, format_value, pluralize
from outstation.ml.performance.estimates import MetricEstimate
from outstation.ml.performance.metrics import display_name
from outstation.ml.performance.slices import SMALL, WORSE
from outstation.workbench.evaluation import tables
from outstation.workbench.evaluation.document import Evaluation, FieldImportance, IntervalEstimate
from outstation.workbench.evaluation.sensitivity import NO_FAULT
from outstation.workbench.evaluation.tables import to_texts

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
_SLICE_COLORS = {WORSE: "orange: worse than the rest", SMALL: "grey: too few to tell"}
_STATE_CLASSES = {"passed": "ok", "failed": "warning", "undecided": "none"}
_MAX_CLASSES = 20
_MAX_LINES = 40
_MAX_CHANGES = 200


def render_html(evaluation: Evaluation) -> str:
    parts = [part for build in _SECTIONS for part in build(evaluation)]
    return page.render_document(f"{evaluation.model.title}: evaluation", parts)


def _header(evaluation: Evaluation) -> Iterator[Markup]:
    model, data = evaluation.model, evaluation.data
    groups = f" of {data.groups} groups ({data.group})" if data.group else ""
    files = ", ".join(source.file for source in data.files[:3]) + (" and more" if len(data.files) > 3 else "")
    days = dict.fromkeys((data.begin[:10], data.end[:10])) if data.begin and data.end else {}
    when = f", {' to '.join(days)}" if days else ""
    yield element("h1", model.title)
    lead = f"{_KIND_PHRASES[model.kind]}; evaluated on {data.windows:,} windows{groups} in {files}{when}."
    yield element("p", lead, css_class="muted")
    known = {metric.metric: metric for metric in evaluation.metrics}
    tiles = []
    for metric in (known[name] for name in _HEADLINE_METRICS[model.kind] if name in known):
        name, interval = _capitalize(display_name(metric.metric)), format_interval(metric.low, metric.high)
        lines = element("span", name), element("b", format_value(metric.value))
        tiles.append(
            element("div", *lines, element("span", f"95 % {interval}" if interval else "no interval"), css_class="tile")
        )
    yield element("div", *tiles, css_class="tiles")
    unmet = [f"{r.requirement}: {r.state}. {r.summary}" for r in evaluation.requirements if r.state != "passed"]
    if concerns := [*unmet, *evaluation.warnings]:
        title = element("b", "Look at this first" if len(concerns) > 1 else "Look at this")
        yield element("div", title, page.bullet_list(concerns), css_class="notice")
    else:
        passed = sum(check.state == "ok" for check in (*evaluation.leakage, *evaluation.label_checks))
        skipped = sum(check.state == "not checked" for check in (*evaluation.leakage, *evaluation.label_checks))
        missing = f"; not made, see below: {pluralize(skipped, 'check')}" if skipped else ""
        sliced = f" and {pluralize(len(evaluation.slices), 'slice')}" if evaluation.slices else ""
        text = f"Nothing of concern in {pluralize(passed, 'check')}{sliced}{missing}."
        yield element("div", text, css_class="notice ok")


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _requirements_section(evaluation: Evaluation) -> Iterator[Markup]:
    if not evaluation.requirements:
        return
    rows: list[list[Content]] = []
    for result in evaluation.requirements:
        badge = element("span", result.state, css_class=f"state {_STATE_CLASSES[result.state]}")
        rows.append([badge, result.requirement, result.summary])
    met = sum(result.state == "passed" for result in evaluation.requirements)
    lead = f"{met} of {len(rows)} met."
    yield section("Requirements", lead, table(["", "Requirement", "Result"], rows))


def _data_checks_section(evaluation: Evaluation) -> Iterator[Markup]:
    rows: list[list[Content]] = []
    for check in (*evaluation.leakage, *evaluation.label_checks):
        badge = element("span", check.state, css_class=f"state {check.state.replace('not checked', 'none')}")
        rows.append([badge, check.check.capitalize(), check.summary])
    notes = [page.bullet_list(evaluation.notes, "notes")] if evaluation.notes else []
    yield section(
        "Can the metrics be trusted?",
        "Whether the test data are new to the model, and whether the labels look right.",
        table(["", "Check", "Result"], rows),
        *notes,
    )


def _metrics_section(evaluation: Evaluation) -> Iterator[Markup]:
    rows = [[_capitalize(name), *cells] for name, *cells in to_texts(tables.metric_rows(evaluation))]
    content = table(["Metric", "Value", "95 % interval", "n"], rows, (1, 2, 3))
    if evaluation.reliability:
        note = "On the dashed line scores are right as often as they say; below it the model is overconfident."
        points = [
            ReliabilityPoint(b.score, b.accuracy.value or 0.0, b.accuracy.low, b.accuracy.high)
            for b in evaluation.reliability
        ]
        chart = page.card("Reliability diagram", note, charts.render_reliability(points))
        content = _grid([element("div", content), chart])
    yield section("Performance", f"Intervals: {evaluation.intervals}.", content)


def _grid(cards: Sequence[Markup], css_class: str = "grid") -> Markup:
    return element("div", *cards, css_class=css_class)


def _classes_section(evaluation: Evaluation) -> Iterator[Markup]:
    cards, more = [], []
    if evaluation.classes:
        lead = "Recall: the share of a class's windows that is predicted as this class."
        known = [c for c in evaluation.classes if c.recall.value is not None]
        worst = sorted(known, key=lambda c: c.recall.value or 0.0)[:_MAX_LINES]
        lines = [
            _forest_row(c.label, c.recall, f"{format_value(c.recall.value)}  of {c.n:,}", "ok")
            for c in known
            if c in worst
        ]
        cards.append(page.card("Recall by class", lead, charts.render_forest("Recall by class", lines)))
        rows = to_texts(tables.class_rows(evaluation))
        more = [table(["Class", "Recall", "Precision", "F1", "Windows"], rows, (1, 2, 3, 4))]
    if evaluation.confusion:
        lead = "A row for each true class, a column for each predicted one; stronger is a larger share of the row."
        labels, matrix = tables.confusion_labels(evaluation), np.array(evaluation.confusion)
        both = matrix.sum(axis=0) + matrix.sum(axis=1)
        shown = np.flatnonzero(both)
        if len(matrix) > _MAX_CLASSES:
            # The classes with most mistakes.
            shown = np.sort(np.argsort(2 * np.diag(matrix) - both, kind="stable")[:_MAX_CLASSES])
        heatmap = charts.render_heatmap([labels[i] for i in shown], matrix[np.ix_(shown, shown)].tolist())
        cards.append(page.card("Confusion matrix", lead, heatmap))
    if cards:
        yield section("By class" if evaluation.classes else "At the threshold", "", _grid(cards), *more)


def _forest_row(label: str, estimate: IntervalEstimate | MetricEstimate, text: str, state: str) -> ForestRow:
    return ForestRow(label, estimate.value or 0.0, estimate.low, estimate.high, text, state)


def _slices_section(evaluation: Evaluation) -> Iterator[Markup]:
    if not evaluation.slices:
        return
    lead = (
        "The same metric for a part of the data; the dashed line is all of it. Worse: beyond chance against the rest, "
        "with Holm's correction over all slices."
    )
    whole = next((m.value for m in evaluation.metrics if m.metric == evaluation.slices[0].metric), None)
    by_field: dict[str, list[tuple[str, MetricEstimate]]] = {}
    for estimate in evaluation.slices:
        field, _, value = estimate.slice.partition("=")
        by_field.setdefault(field, []).append((value, estimate))
    cards = []
    for field, estimates in by_field.items():
        rows = [
            _forest_row(value, e, f"{format_value(e.value)}  of {e.n:,}", _CHART_STATES.get(e.state or "", "ok"))
            for value, e in estimates
            if e.value is not None
        ]
        states = {e.state for _, e in estimates}
        legend = "; ".join(text for state, text in _SLICE_COLORS.items() if state in states)
        chart = charts.render_forest(f"Slices of {field}", rows[:_MAX_LINES], reference=whole)
        cards.append(page.card(field, "", chart, *([element("p", legend, css_class="muted")] if legend else [])))
    yield section("Slices", lead, _grid(cards))


def _importance_section(evaluation: Evaluation) -> Iterator[Markup]:
    if not evaluation.field_importance:
        return
    change = "rises" if evaluation.direction == "lower" else "falls"
    lead = f"How much {display_name(evaluation.metric)} {change} if a field's readings are those of another window."
    single = [d for d in evaluation.field_importance if len(d.fields) == 1]
    together = [d for d in evaluation.field_importance if len(d.fields) > 1]
    cards = [page.card("Single fields", "", _importance_chart(single))]
    if together:
        note = "The model misses neither of two fields that carry the same information."
        cards.append(page.card("Fields of one unit together", note, _importance_chart(together)))
    yield section("Field importance", lead, _grid(cards))


def _importance_chart(importances: list[FieldImportance]) -> str:
    drops = [(", ".join(i.fields), i.metric_drop) for i in importances if i.metric_drop.value is not None]
    rows = [
        _forest_row(fields, drop, format_value(drop.value), "ok" if (drop.low or 0.0) > 0 else "unknown")
        for fields, drop in drops[:_MAX_LINES]
    ]
    return charts.render_forest("Field importance", rows, reference=0.0)


def _robustness_section(evaluation: Evaluation) -> Iterator[Markup]:
    if not evaluation.robustness:
        return
    name = _capitalize(display_name(evaluation.metric))
    lead = f"{name} with an injected fault, with its interval; the dashed line is without the fault."
    estimates = [point.value for curve in evaluation.robustness for point in curve.points]
    values = [v for e in estimates for v in (e.low, e.value, e.high) if v is not None]
    higher = evaluation.direction == "higher"
    # One axis for all faults.
    low, high = min(0.0, *values) if higher else 0.0, 1.0 if higher else 1.05 * max(values, default=1.0)
    cards = []
    for curve in evaluation.robustness:
        known = [(p.strength, p.value.value, p.value) for p in curve.points]
        points = [CurvePoint(strength, v, e.low, e.high) for strength, v, e in known if v is not None]
        fault_free = next((v for strength, v, _ in known if strength == NO_FAULT), None)
        chart = charts.render_curve(f"{curve.fault}: {curve.meaning}", points, low, high, reference=fault_free)
        cards.append(page.card(curve.fault.capitalize(), _capitalize(curve.meaning) + ".", chart))
    yield section("When sensors fail", lead, _grid(cards, "grid small"))


def _adversarial_section(evaluation: Evaluation) -> Iterator[Markup]:
    result = evaluation.adversarial
    if result is None:
        return
    lead = (
        f"Share of right answers that an attack flips, with its interval: {result.criterion}. Readings stay within "
        f"the sensors' limits. {result.invocations:,} invocations of the model, without its gradients."
    )
    cards = []
    for attack in result.attacks:
        rows = [
            ForestRow(p.strength, p.value, p.low, p.high, f"{p.value:.0%}", "ok") for p in attack.points[:_MAX_LINES]
        ]
        chart = charts.render_forest(f"{attack.attack}: {attack.meaning}", rows)
        cards.append(page.card(_capitalize(attack.attack), _capitalize(attack.meaning) + ".", chart))
    changes = to_texts(tables.smallest_change_rows(evaluation, by_class=True)[:_MAX_CHANGES])
    smallest = table(["Field", "Class", "Median change", "Smallest change", "Windows"], changes, (4,))
    yield section("When readings are forged", lead, _grid(cards), smallest)


def _float_comparison_section(evaluation: Evaluation) -> Iterator[Markup]:
    if evaluation.float_comparison is not None:
        file = evaluation.float_comparison.file
        lead = f"The same windows through {file}; differences are paired, so their interval is narrow."
        rows = [[_capitalize(name), value] for name, value in to_texts(tables.float_comparison_rows(evaluation))]
        yield section("Comparison with the float model", lead, table(["", ""], rows))


def _latency_section(evaluation: Evaluation) -> Iterator[Markup]:
    if not evaluation.latency:
        return
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
    yield section("Latency", lead, table(head, rows, range(len(head))))


def _suspects_section(evaluation: Evaluation) -> Iterator[Markup]:
    if evaluation.suspects:
        rows = to_texts(tables.suspect_rows(evaluation))
        lead = "Labels that the model contradicts with confidence: either the model or the label is wrong."
        yield section("Suspect labels", lead, table(["File", "Row", "Label", "Predicted", "Score"], rows, (1, 4)))


def _footer(evaluation: Evaluation) -> Iterator[Markup]:
    model = evaluation.model
    yield element(
        "footer",
        f"Evaluated {evaluation.evaluated_at[:16].replace('T', ' ')} UTC by outstation {evaluation.agent} with "
        f"{model.runtime} in {evaluation.seconds:.1f} s. Bundle ",
        element("code", model.digest),
        f", signature: {model.signature}.",
    )


_SECTIONS = (
    _header,
    _requirements_section,
    _data_checks_section,
    _metrics_section,
    _classes_section,
    _slices_section,
    _importance_section,
    _robustness_section,
    _adversarial_section,
    _float_comparison_section,
    _latency_section,
    _suspects_section,
    _footer,
)
