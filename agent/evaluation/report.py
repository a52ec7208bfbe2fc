"""An evaluation as one HTML page for people who decide whether a model is released."""

from __future__ import annotations

from agent.evaluation import charts
from agent.evaluation.document import CheckResult, Evaluation, IntervalEstimate
from agent.performance.metrics import MetricEstimate
from agent.render import html as page
from agent.render.html import Content, Markup, element, section, table
from agent.text import format_interval, format_value, metric_name

_HEADLINE_METRICS = {
    "classify": ("accuracy", "f1_macro", "brier", "ece"),
    "regress": ("mae", "rmse", "r2", "bias"),
    "anomaly": ("auc", "average_precision", "precision", "recall"),
}
_KIND_PHRASES = {
    "classify": "names a class",
    "regress": "gives a number",
    "anomaly": "tells what is unusual",
    "embedding": "tells how far from usual",
}


def render_html(evaluation: Evaluation) -> str:
    """The page."""
    parts = [
        *_header(evaluation),
        _data_checks_section(evaluation),
        _metrics_section(evaluation),
        *_classes_section(evaluation),
        *_slices_section(evaluation),
        *_ablation_section(evaluation),
        *_robustness_section(evaluation),
        *_float_comparison_section(evaluation),
        *_latency_section(evaluation),
        *_suspects_section(evaluation),
        _footer(evaluation),
    ]
    return page.render_document(f"{evaluation.model.name} {evaluation.model.version}: evaluation", parts)


def _header(evaluation: Evaluation) -> list[Markup]:
    model, data = evaluation.model, evaluation.data
    groups = f" of {data.groups} groups ({data.group})" if data.group else ""
    files = ", ".join(one.file for one in data.files[:3]) + (" and more" if len(data.files) > 3 else "")
    when = f", {data.begin[:10]} to {data.end[:10]}" if data.begin and data.end else ""
    known = {one.metric: one for one in evaluation.metrics}
    shown = [known[name] for name in _HEADLINE_METRICS.get(_metric_kind(model.kind), ()) if name in known]
    lead = f"It {_KIND_PHRASES[model.kind]}; here of {data.windows:,} windows{groups} in {files}{when}."
    return [
        element("h1", f"{model.name} {model.version}"),
        element("p", lead, css_class="muted"),
        element("div", *(_metric_tile(one) for one in shown), css_class="tiles"),
        _warnings_notice(evaluation),
    ]


def _metric_kind(kind: str) -> str:
    return "anomaly" if kind == "embedding" else kind


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _metric_tile(metric: MetricEstimate) -> Markup:
    within = format_interval(metric.low, metric.high)
    return element(
        "div",
        element("span", _capitalize(metric_name(metric.metric))),
        element("b", format_value(metric.value)),
        element("span", f"95 % {within}" if within else "no interval"),
        css_class="tile",
    )


def _warnings_notice(evaluation: Evaluation) -> Markup:
    if not evaluation.warnings:
        done = sum(one.state == "ok" for one in (*evaluation.leakage, *evaluation.hints))
        return element(
            "div", f"Nothing of concern in {done} checks and {len(evaluation.slices)} slices.", css_class="notice ok"
        )
    title = element("b", "Look at this first" if len(evaluation.warnings) > 1 else "Look at this")
    return element("div", title, page.bullet_list(evaluation.warnings), css_class="notice")


def _data_checks_section(evaluation: Evaluation) -> Markup:
    rows: list[list[Content]] = [
        [_state_badge(one), one.check.capitalize(), one.summary] for one in (*evaluation.leakage, *evaluation.hints)
    ]
    notes = [page.bullet_list(evaluation.notes, "notes")] if evaluation.notes else []
    return section(
        "Can the figures be believed?",
        "Whether the test data tell of new data at all, and what the labels look like.",
        table(["", "Check", "What was found"], rows),
        *notes,
    )


def _state_badge(check: CheckResult) -> Markup:
    kind = check.state if check.state in ("ok", "warning") else "none"
    return element("span", check.state, css_class=f"state {kind}")


def _metrics_section(evaluation: Evaluation) -> Markup:
    rows = [
        [_capitalize(metric_name(m.metric)), format_value(m.value), format_interval(m.low, m.high), f"{m.n:,}"]
        for m in evaluation.metrics
    ]
    lead = f"Intervals: {evaluation.intervals}."
    measured = table(["Metric", "Value", "95 % interval", "n"], rows, (1, 2, 3))
    if not evaluation.reliability:
        return section("How good", lead, measured)
    note = "On the dashed line scores are right as often as they say; below it they are too sure."
    picture = page.card("How far scores can be trusted", note, charts.reliability_chart(evaluation))
    return section("How good", lead, element("div", element("div", measured), picture, css_class="grid"))


def _classes_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.classes and not evaluation.confusion:
        return []
    cards = []
    if evaluation.classes:
        lead = "Recall: of windows of a class, the share that was named so."
        cards.append(page.card("Recall by class", lead, charts.recall_chart(evaluation)))
    if picture := charts.confusion_chart(evaluation):
        lead = "A row for what was true, a column for what was said; stronger is a larger share of the row."
        cards.append(page.card("Confusion", lead, picture))
    rows = [
        [c.label, _format_estimate(c.recall), _format_estimate(c.precision), _format_estimate(c.f1), f"{c.n:,}"]
        for c in evaluation.classes
    ]
    more = [table(["Class", "Recall", "Precision", "F1", "Windows"], rows, (1, 2, 3, 4))] if rows else []
    title = "Class by class" if evaluation.classes else "At the threshold"
    return [section(title, "", element("div", *cards, css_class="grid"), *more)]


def _format_estimate(estimate: IntervalEstimate) -> str:
    return f"{format_value(estimate.value)} {format_interval(estimate.low, estimate.high)}".strip()


def _slices_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.slices:
        return []
    lead = (
        "The same figure for a part of the data; the dashed line is all of it. Worse: beyond chance against the rest, "
        "with Holm's correction over all slices."
    )
    fields = dict.fromkeys(one.slice.partition("=")[0] for one in evaluation.slices)
    cards = [
        page.card(name, "", charts.slices_chart(evaluation, name), _slice_legend(evaluation, name)) for name in fields
    ]
    return [section("Slices", lead, element("div", *cards, css_class="grid"))]


def _slice_legend(evaluation: Evaluation, name: str) -> Markup:
    states = {one.state for one in evaluation.slices if one.slice.partition("=")[0] == name}
    meanings = {"worse": "orange: worse than the rest", "small": "grey: too few to tell"}
    told = [text for state, text in meanings.items() if state in states]
    return element("p", "; ".join(told), css_class="muted") if told else Markup("")


def _ablation_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.ablation:
        return []
    up = "rises" if evaluation.better == "down" else "falls"
    lead = f"How much {metric_name(evaluation.metric)} {up} where a field's readings are those of another window."
    single, together = charts.ablation_charts(evaluation)
    cards = [page.card("Field by field", "", single)]
    if together:
        note = "Of two that say the same, neither is missed alone."
        cards.append(page.card("Fields of one unit together", note, together))
    return [section("What each field is worth", lead, element("div", *cards, css_class="grid"))]


def _robustness_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.robustness:
        return []
    name = metric_name(evaluation.metric)
    lead = f"{_capitalize(name)} where a fault is made on purpose, with its interval; the dashed line is without."
    cards = [
        page.card(fault.fault.capitalize(), _capitalize(fault.meaning) + ".", picture)
        for fault, picture in zip(evaluation.robustness, charts.robustness_charts(evaluation), strict=True)
    ]
    return [section("When sensors fail", lead, element("div", *cards, css_class="grid small"))]


def _float_comparison_section(evaluation: Evaluation) -> list[Markup]:
    other = evaluation.against
    if other is None:
        return []
    name = metric_name(evaluation.metric)
    rows = [["Says the same", _format_estimate(other.agreement)]] if other.agreement else []
    rows += [
        ["Outputs differ by", f"{format_value(other.mean)} on average, {format_value(other.largest)} at most"],
        [f"{_capitalize(name)} of the float model", _format_estimate(other.value)],
        [f"{_capitalize(name)} of this model less that", _format_estimate(other.change)],
        [
            "Size",
            f"{evaluation.model.bytes:,} bytes of {other.bytes:,} ({evaluation.model.bytes / max(1, other.bytes):.0%})",
        ],
    ]
    lead = f"The same windows through {other.file}; differences are paired, so their interval is narrow."
    return [section("Beside the float model", lead, table(["", ""], rows))]


def _latency_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.latency:
        return []
    other = {p.batch: p for p in evaluation.against.latency} if evaluation.against else {}
    rows = []
    for p in evaluation.latency:
        cells = [f"{p.batch}", f"{p.p50_ms:g}", f"{p.p95_ms:g}", f"{p.per_second:,.0f}", f"{p.memory_mib:g}"]
        rows.append([*cells, f"{other[p.batch].p50_ms:g}"] if other else cells)
    lead = f"From readings to scores, in a process of its own, one thread, {evaluation.model.runtime}, {evaluation.machine}."
    head = ["Windows at once", "ms, median", "ms, 95th percentile", "Windows a second", "Peak memory, MiB"]
    head += ["Float model: ms, median"] if other else []
    return [section("How fast", f"{lead} A device is slower.", table(head, rows, range(len(head))))]


def _suspects_section(evaluation: Evaluation) -> list[Markup]:
    if not evaluation.suspects:
        return []
    rows = [[s.file, f"{s.row:,}", s.label, s.said, f"{s.score:.3f}"] for s in evaluation.suspects]
    lead = "Labels that the model contradicts with certainty: it may be wrong there, or the label."
    head = ["File", "Row", "Label", "The model says", "Score"]
    return [section("Labels to look at", lead, table(head, rows, (1, 4)))]


def _footer(evaluation: Evaluation) -> Markup:
    model = evaluation.model
    return element(
        "footer",
        f"Evaluated {evaluation.made[:16].replace('T', ' ')} UTC by outstation {evaluation.agent} with {model.runtime} in "
        f"{evaluation.seconds:.1f} s. Bundle ",
        element("code", model.digest),
        f", signature: {model.signature}.",
    )
