"""An evaluation as one HTML page for people who decide whether a model is released."""

from __future__ import annotations

from agent.evaluation import charts
from agent.evaluation.document import Evaluation, Finding, Span
from agent.performance.metrics import Metric
from agent.render import html as page
from agent.render.html import Content, Markup, element, section, table
from agent.text import figure, interval, metric_name

_TILES = {
    "classify": ("accuracy", "f1_macro", "brier", "ece"),
    "regress": ("mae", "rmse", "r2", "bias"),
    "anomaly": ("auc", "average_precision", "precision", "recall"),
}
_KINDS = {
    "classify": "names a class",
    "regress": "gives a number",
    "anomaly": "tells what is unusual",
    "embedding": "tells how far from usual",
}


def html(found: Evaluation) -> str:
    """The page."""
    parts = [
        *_head(found),
        _believe(found),
        _metrics(found),
        *_classes(found),
        *_slices(found),
        *_ablation(found),
        *_robustness(found),
        *_against(found),
        *_latency(found),
        *_suspects(found),
        _foot(found),
    ]
    return page.page(f"{found.model.name} {found.model.version}: evaluation", parts)


def _head(found: Evaluation) -> list[Markup]:
    model, data = found.model, found.data
    groups = f" of {data.groups} groups ({data.group})" if data.group else ""
    files = ", ".join(one.file for one in data.files[:3]) + (" and more" if len(data.files) > 3 else "")
    when = f", {data.begin[:10]} to {data.end[:10]}" if data.begin and data.end else ""
    known = {one.metric: one for one in found.metrics}
    shown = [known[name] for name in _TILES.get(_truth(model.kind), ()) if name in known]
    lead = f"It {_KINDS[model.kind]}; here of {data.windows:,} windows{groups} in {files}{when}."
    return [
        element("h1", f"{model.name} {model.version}"),
        element("p", lead, kind="muted"),
        element("div", *(_tile(one) for one in shown), kind="tiles"),
        _notice(found),
    ]


def _truth(kind: str) -> str:
    return "anomaly" if kind == "embedding" else kind


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _tile(one: Metric) -> Markup:
    within = interval(one.low, one.high)
    return element(
        "div",
        element("span", _sentence(metric_name(one.metric))),
        element("b", figure(one.value)),
        element("span", f"95 % {within}" if within else "no interval"),
        kind="tile",
    )


def _notice(found: Evaluation) -> Markup:
    if not found.warnings:
        done = sum(one.state == "ok" for one in (*found.leakage, *found.hints))
        return element("div", f"Nothing of concern in {done} checks and {len(found.slices)} slices.", kind="notice ok")
    title = element("b", "Look at this first" if len(found.warnings) > 1 else "Look at this")
    return element("div", title, page.bullets(found.warnings), kind="notice")


def _believe(found: Evaluation) -> Markup:
    rows: list[list[Content]] = [
        [_state(one), one.check.capitalize(), one.summary] for one in (*found.leakage, *found.hints)
    ]
    notes = [page.bullets(found.notes, "notes")] if found.notes else []
    return section(
        "Can the figures be believed?",
        "Whether the test data tell of new data at all, and what the labels look like.",
        table(["", "Check", "What was found"], rows),
        *notes,
    )


def _state(one: Finding) -> Markup:
    kind = one.state if one.state in ("ok", "warning") else "none"
    return element("span", one.state, kind=f"state {kind}")


def _metrics(found: Evaluation) -> Markup:
    rows = [
        [_sentence(metric_name(m.metric)), figure(m.value), interval(m.low, m.high), f"{m.n:,}"] for m in found.metrics
    ]
    lead = f"Intervals: {found.intervals}."
    measured = table(["Metric", "Value", "95 % interval", "n"], rows, (1, 2, 3))
    if not found.reliability:
        return section("How good", lead, measured)
    note = "On the dashed line scores are right as often as they say; below it they are too sure."
    picture = page.card("How far scores can be trusted", note, charts.reliability_of(found))
    return section("How good", lead, element("div", element("div", measured), picture, kind="grid"))


def _classes(found: Evaluation) -> list[Markup]:
    if not found.classes and not found.confusion:
        return []
    cards = []
    if found.classes:
        lead = "Recall: of windows of a class, the share that was named so."
        cards.append(page.card("Recall by class", lead, charts.recall_of(found)))
    if picture := charts.confusion_of(found):
        lead = "A row for what was true, a column for what was said; stronger is a larger share of the row."
        cards.append(page.card("Confusion", lead, picture))
    rows = [[c.label, _span(c.recall), _span(c.precision), _span(c.f1), f"{c.n:,}"] for c in found.classes]
    more = [table(["Class", "Recall", "Precision", "F1", "Windows"], rows, (1, 2, 3, 4))] if rows else []
    title = "Class by class" if found.classes else "At the threshold"
    return [section(title, "", element("div", *cards, kind="grid"), *more)]


def _span(one: Span) -> str:
    return f"{figure(one.value)} {interval(one.low, one.high)}".strip()


def _slices(found: Evaluation) -> list[Markup]:
    if not found.slices:
        return []
    lead = (
        "The same figure for a part of the data; the dashed line is all of it. Worse: beyond chance against the rest, "
        "with Holm's correction over all slices."
    )
    fields = dict.fromkeys(one.slice.partition("=")[0] for one in found.slices)
    cards = [page.card(name, "", charts.slices_of(found, name), _legend(found, name)) for name in fields]
    return [section("Slices", lead, element("div", *cards, kind="grid"))]


def _legend(found: Evaluation, name: str) -> Markup:
    states = {one.state for one in found.slices if one.slice.partition("=")[0] == name}
    meanings = {"worse": "orange: worse than the rest", "small": "grey: too few to tell"}
    told = [text for state, text in meanings.items() if state in states]
    return element("p", "; ".join(told), kind="muted") if told else Markup("")


def _ablation(found: Evaluation) -> list[Markup]:
    if not found.ablation:
        return []
    up = "rises" if found.better == "down" else "falls"
    lead = f"How much {metric_name(found.metric)} {up} where a field's readings are those of another window."
    single, together = charts.ablation_of(found)
    cards = [page.card("Field by field", "", single)]
    if together:
        note = "Of two that say the same, neither is missed alone."
        cards.append(page.card("Fields of one unit together", note, together))
    return [section("What each field is worth", lead, element("div", *cards, kind="grid"))]


def _robustness(found: Evaluation) -> list[Markup]:
    if not found.robustness:
        return []
    name = metric_name(found.metric)
    lead = f"{_sentence(name)} where a fault is made on purpose, with its interval; the dashed line is without."
    cards = [
        page.card(fault.fault.capitalize(), _sentence(fault.meaning) + ".", picture)
        for fault, picture in zip(found.robustness, charts.robustness_of(found), strict=True)
    ]
    return [section("When sensors fail", lead, element("div", *cards, kind="grid small"))]


def _against(found: Evaluation) -> list[Markup]:
    other = found.against
    if other is None:
        return []
    name = metric_name(found.metric)
    rows = [["Says the same", _span(other.agreement)]] if other.agreement else []
    rows += [
        ["Outputs differ by", f"{figure(other.mean)} on average, {figure(other.largest)} at most"],
        [f"{_sentence(name)} of the float model", _span(other.value)],
        [f"{_sentence(name)} of this model less that", _span(other.change)],
        ["Size", f"{found.model.bytes:,} bytes of {other.bytes:,} ({found.model.bytes / max(1, other.bytes):.0%})"],
    ]
    lead = f"The same windows through {other.file}; differences are paired, so their interval is narrow."
    return [section("Beside the float model", lead, table(["", ""], rows))]


def _latency(found: Evaluation) -> list[Markup]:
    if not found.latency:
        return []
    other = {p.batch: p for p in found.against.latency} if found.against else {}
    rows = []
    for p in found.latency:
        cells = [f"{p.batch}", f"{p.p50_ms:g}", f"{p.p95_ms:g}", f"{p.per_second:,.0f}", f"{p.memory_mib:g}"]
        rows.append([*cells, f"{other[p.batch].p50_ms:g}"] if other else cells)
    lead = f"From readings to scores, in a process of its own, one thread, {found.model.runtime}, {found.machine}."
    head = ["Windows at once", "ms, median", "ms, 95th percentile", "Windows a second", "Peak memory, MiB"]
    head += ["Float model: ms, median"] if other else []
    return [section("How fast", f"{lead} A device is slower.", table(head, rows, range(len(head))))]


def _suspects(found: Evaluation) -> list[Markup]:
    if not found.suspects:
        return []
    rows = [[s.file, f"{s.row:,}", s.label, s.said, f"{s.score:.3f}"] for s in found.suspects]
    lead = "Labels that the model contradicts with certainty: it may be wrong there, or the label."
    head = ["File", "Row", "Label", "The model says", "Score"]
    return [section("Labels to look at", lead, table(head, rows, (1, 4)))]


def _foot(found: Evaluation) -> Markup:
    model = found.model
    return element(
        "footer",
        f"Evaluated {found.made[:16].replace('T', ' ')} UTC by outstation {found.agent} with {model.runtime} in "
        f"{found.seconds:.1f} s. Bundle ",
        element("code", model.digest),
        f", signature: {model.signature}.",
    )
