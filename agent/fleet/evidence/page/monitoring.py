"""Chapters on monitoring: incidents, drift and accuracy, with their charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.fleet.evidence.format.contents import AccuracyEntry, Incident
from agent.fleet.evidence.gather.accuracy import select_headline
from agent.fleet.evidence.gather.gather import EvidenceFacts
from agent.fleet.evidence.page.elements import (
    badge,
    chapter,
    details,
    format_count,
    format_duration,
    format_names,
    format_time,
    link,
    nowrap,
    overflow_link,
    parse_epoch_us,
    stacked_table,
)
from agent.performance.metrics import display_name
from agent.render import axes, html
from agent.render.charts import ForestRow, render_forest
from agent.render.html import Content, Markup, element, table
from agent.render.svg import Drawing, html_text, truncate_text
from agent.render.theme import PAGE_THEME
from agent.text import format_interval, format_value
from agent.wire.messages import Metric

_MAX_ROWS = 25
_STATE_BADGES = {"open": ("open", "bad"), "closed": ("closed", "ok"), "unknown": ("end unknown", "none")}
_SOURCE_NAMES = {
    "human": "people",
    "system": "other systems",
    "model": "the model itself (not counted)",
    "verdict": "verdicts of people who saw the answer (not counted)",
}
_MAX_LANES, _LANE_HEIGHT, _TOP_MARGIN = 16, 22.0, 10.0
_LANES_WIDTH, _NAME_WIDTH, _DURATION_WIDTH = 360.0, 100.0, 86.0
_STRIP_WIDTH, _STRIP_HEIGHT = 400.0, 90.0

_Measured = list[tuple[AccuracyEntry, Metric]]


def render_incidents(facts: EvidenceFacts) -> Markup:
    lead = "Alerts, from the time a device raised one to the time it cleared it. Times are the device's own, in UTC."
    total = sum(facts.incident_counts.values())
    if not total:
        text = "No alert was raised in this period."
        text = text if facts.message_count else "Nothing was collected, so it is unknown whether there were any."
        return chapter("incidents", "Incidents", lead, element("p", text))
    open_now = sum(n for (_, state), n in facts.incident_counts.items() if state == "open")
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in facts.incident_kinds.most_common())
    overview = element("p", f"{format_count(total, 'incident')} ({kinds}); {open_now:,} open.")
    rows: list[Sequence[Content]] = [_incident_row(incident) for incident in facts.incidents[:_MAX_ROWS]]
    shown = stacked_table(table(["", "Started", "Lasted", "Where", "What"], rows), "incidents")
    rest = overflow_link(len(facts.incidents) - _MAX_ROWS, "incidents.json")
    notes = []
    if total > len(facts.incidents):
        notes.append(f"{total - len(facts.incidents):,} further incidents, none worse than these, are only counted.")
    unsynced = sum(incident.clock == "unsynced" for incident in facts.incidents)
    if unsynced:
        count = format_count(unsynced, "incident")
        notes.append(f"{count} started or ended while the device's clock was not set, so the duration is uncertain.")
    return chapter(
        *("incidents", "Incidents", lead),
        overview,
        *_incident_chart(facts),
        shown,
        *rest,
        *(element("p", note, css_class="muted") for note in notes),
        element("p", "For a spreadsheet: ", link("incidents.csv"), ".", css_class="muted"),
    )


def _incident_row(incident: Incident) -> list[Content]:
    word, kind = _STATE_BADGES[incident.state]
    kind = "warning" if kind == "bad" and incident.severity != "critical" else kind
    where = f"{incident.device or 'the fleet'}" + (f", {incident.task}" if incident.task else "")
    duration = format_duration(incident.seconds) + (" so far" if incident.state == "open" else "")
    source = "" if incident.source == "device" else " (detected by the collector; not signed)"
    return [
        badge(word, kind),
        nowrap(format_time(incident.started)),
        nowrap(duration if incident.seconds is not None else "–"),
        where,
        Markup(f"<b>{html_text(f'{incident.severity}, {incident.alert}')}.</b> {html_text(incident.summary + source)}"),
    ]


def _incident_chart(facts: EvidenceFacts) -> list[Markup]:
    begin_us, end_us = parse_epoch_us(facts.span.first) or 0, parse_epoch_us(facts.as_of) or 1
    chart = draw_incident_lanes(facts.incidents, begin_us, end_us)
    if not chart:
        return []
    legend = element(
        "p", "Red: critical; orange: warning; grey: information. Open incidents end at the right edge.",
        css_class="muted",
    )  # fmt: skip
    return [element("div", Markup(chart), legend, css_class="card chart")]


def render_drift(facts: EvidenceFacts) -> Markup:
    lead = (
        "How far sites differ from the data that the models were made with. The collector computes this from signed "
        "drift summaries, which stay in its database; the resulting alerts are in this folder."
    )
    tasks = facts.drift["tasks"]
    if not tasks:
        text = "No drift summary was collected, so drift was not monitored."
        return chapter("drift", "Drift", lead, element("p", text))
    cards = [_drift_card(task) for task in tasks[:_MAX_ROWS]]
    notes = []
    if unreadable := facts.drift["unreadable_windows"]:
        verb = "is" if unreadable == 1 else "are"
        text = f"{format_count(unreadable, 'drift summary', 'drift summaries')} {verb} unreadable and not counted."
        notes = [element("p", text, css_class="notice")]
    return chapter("drift", "Drift", lead, element("div", *cards, css_class="grid"), *notes)


def _drift_card(task: dict[str, Any]) -> Markup:
    differs = " (devices with a different reference)" if task["differs_in"] else ""
    drifting, onsets = task["devices_in_drift"], task["onsets"]
    notes = [
        f"{format_count(task['windows'], 'summary', 'summaries')} of {format_count(task['devices'], 'device')}; "
        f"{task['sensor_fault_windows']:,} with a sensor fault.",
        f"In drift by the latest summary: {format_names(drifting)}." if drifting else "No device is in drift now.",
    ]
    for name, known in {"": task, **task.get("expected_outputs", {})}.items():
        subject = f" of output {name}" if name else ""
        if known["expected_accuracy"] is not None:
            notes.append(f"Expected accuracy{subject} without labels: {known['expected_accuracy']:.3f}.")
        if known.get("expected_error") is not None:
            notes.append(f"Expected mean absolute error{subject} without labels: {known['expected_error']:.4g}.")
    if omitted := task.get("outputs_omitted"):
        notes.append(f"{format_count(omitted, 'report')} of more outputs than a model may have, only counted.")
    notes += [change["summary"] for change in task["fleet_wide"][:3]]
    rows: list[Sequence[Content]] = [
        [
            onset["device"],
            onset["field"],
            format_time(onset["alarmed"]),
            format_time(onset["ended"]) if onset["ended"] else "ongoing",
        ]
        for onset in onsets[:8]
    ]
    listed = [table(["Device", "Field", "Detected", "Until"], rows)] if rows else []
    rest = overflow_link(len(onsets) + task["onsets_omitted"] - 8, "drift.json")
    chart = draw_drift_strip(task["history"], task["devices"])
    legend = element("p", "Orange: devices in drift; red: devices with a sensor fault.", css_class="muted")
    return html.card(task["task"] + differs, "", chart, legend, html.bullet_list(notes, "notes"), *listed, *rest)


def render_accuracy(facts: EvidenceFacts) -> Markup:
    title = "Accuracy and labels"
    lead = "How often the models were right at the sites, measured with labels; 95 % intervals."
    if not facts.accuracy:
        text = (
            "No labels arrived, so accuracy in operation was not measured. Evaluations before deployment are listed "
            "with the models."
        )
        return chapter("accuracy", title, lead, element("p", text, css_class="notice"))
    by_task: dict[str, list[AccuracyEntry]] = {}
    for entry in facts.accuracy:
        by_task.setdefault(_name_output(entry), []).append(entry)
    cards = [_accuracy_card(task, entries) for task, entries in by_task.items()]
    rows = [_accuracy_row(entry) for entries in by_task.values() for entry in entries[:_MAX_ROWS]]
    head = ["Device", "Task", "Metric", "95 % interval", "Labels", "Coverage", "As of"]
    listed = details("Labels and metrics by device", stacked_table(table(head, rows), "labelled"))
    return chapter("accuracy", title, lead, element("div", *cards, css_class="grid"), listed)


def _accuracy_card(task: str, entries: Sequence[AccuracyEntry]) -> Markup:
    measured: _Measured = [(entry, metric) for entry in entries if (metric := select_headline(entry)) is not None]
    name = display_name(measured[0][1].metric) if measured else "no metric yet"
    chart = draw_accuracy_forest(measured[:20], f"{task}: {name} by device") if measured else ""
    devices = format_count(len({entry.device for entry in entries}), "device")
    caption = f"{devices} with labels" + (", worst first" if len(measured) > 1 else "")
    return html.card(f"{task}: {name}", caption, chart)


def _name_output(entry: AccuracyEntry) -> str:
    return f"{entry.task}, output {entry.output}" if entry.output else entry.task


def _accuracy_row(entry: AccuracyEntry) -> list[Content]:
    metric = select_headline(entry)
    return [
        entry.device,
        _name_output(entry),
        "–" if metric is None else f"{display_name(metric.metric)} {format_value(metric.value)}",
        "" if metric is None else format_interval(metric.low, metric.high),
        ", ".join(f"{n:,} by {_SOURCE_NAMES.get(source, source)}" for source, n in entry.labels.items()) or "unknown",
        _format_coverage(entry.label_coverage),
        format_time(entry.time) if entry.time else "–",
    ]


def _format_coverage(label_coverage: dict[str, Any]) -> str:
    parts = []
    if isinstance(coverage := label_coverage.get("coverage"), int | float):
        parts.append(f"{coverage:.0%} of results")
    delay = label_coverage.get("delay_s")
    if isinstance(delay, dict) and isinstance(median := delay.get("median"), int | float):
        parts.append(f"median delay {format_duration(median)}")
    for name in ("replaced", "late", "unmatched"):
        if isinstance(n := label_coverage.get(name), int) and n:
            parts.append(f"{n:,} {name}")
    return ", ".join(parts)


def draw_incident_lanes(incidents: Sequence[Incident], begin_us: int, end_us: int) -> str:
    """Return an inline SVG with a bar per incident from start to end, "" if no start time is known."""
    known = [
        (us, incident)
        for incident in incidents
        if (us := parse_epoch_us(incident.started)) is not None and us <= end_us
    ][:_MAX_LANES]
    begin = min([begin_us, *(us for us, _ in known)])
    if not known or end_us <= begin:
        return ""
    known.sort(key=lambda entry: entry[1].started)
    draw = Drawing(_LANES_WIDTH, f"Timeline of {len(known)} incidents")
    left, right = _NAME_WIDTH, _LANES_WIDTH - _DURATION_WIDTH

    def to_x(us: int) -> float:
        return left + (right - left) * min(max((us - begin) / (end_us - begin), 0.0), 1.0)

    bottom = _TOP_MARGIN + _LANE_HEIGHT * len(known)
    _draw_time_axis(draw, left, right, bottom, begin, end_us)
    for number, (start, incident) in enumerate(known):
        y = _TOP_MARGIN + _LANE_HEIGHT * number
        color = {"critical": PAGE_THEME.fault, "warning": PAGE_THEME.drift}.get(incident.severity, PAGE_THEME.unknown)
        topic = incident.subject if incident.alert in ("drift", "fault") else incident.alert
        name = truncate_text(f"{incident.device or 'fleet'} {topic}", 12, _NAME_WIDTH - 10)
        draw.text(0, y + 14, name, PAGE_THEME.ink, size=12)
        x = to_x(start)
        width = min(max(4.0, to_x(parse_epoch_us(incident.ended) or end_us) - x), right - x)
        draw.rect(x, y + 4, width, _LANE_HEIGHT - 9, color, r=3, css_class=f"bar-{incident.state}")
        duration = format_duration(incident.seconds) + (" so far" if incident.state == "open" else "")
        if incident.state == "unknown":
            duration = "end unknown"
        draw.text(_LANES_WIDTH, y + 14, duration, PAGE_THEME.muted, size=11, anchor="end")
    return draw.to_inline_svg(bottom + 24)


def draw_drift_strip(history: Sequence[dict[str, Any]], device_count: int) -> str:
    """Return an inline SVG of the number of devices in drift or with a sensor fault over time."""
    spans = [
        (begin, end, span)
        for span in history
        if (begin := parse_epoch_us(span["from"])) is not None and (end := parse_epoch_us(span["to"])) is not None
    ]
    if not spans:
        return ""
    first, last = spans[0][0], spans[-1][1]
    draw = Drawing(_STRIP_WIDTH, "Devices in drift or with a sensor fault, over time")
    left, right, bottom = 38.0, _STRIP_WIDTH - 8, _TOP_MARGIN + _STRIP_HEIGHT
    top = max(1, device_count)

    def to_x(us: int) -> float:
        return left + (right - left) * (us - first) / max(1, last - first)

    def to_y(n: int) -> float:
        return bottom - _STRIP_HEIGHT * n / top

    for tick in sorted({0, top, top // 2 if top > 3 else top}):
        draw.line(left, to_y(tick), right, to_y(tick), PAGE_THEME.grid)
        draw.text(left - 6, to_y(tick) + 4, f"{tick}", PAGE_THEME.muted, size=11, anchor="end")
    for begin, end, span in spans:
        x, width = to_x(begin), max(1.0, to_x(end) - to_x(begin) - 0.5)
        drift, fault = min(span["devices_in_drift"], top), min(span["devices_with_sensor_fault"], top)
        draw.rect(x, bottom - 2, width, 2, PAGE_THEME.reference_edge)
        draw.rect(x, to_y(drift), width, bottom - to_y(drift), PAGE_THEME.drift, css_class="drift")
        both = min(drift + fault, top)
        draw.rect(x, to_y(both), width, to_y(drift) - to_y(both), PAGE_THEME.fault, css_class="fault")
    _draw_time_axis(draw, left, right, bottom, first, last, grid=False)
    return draw.to_inline_svg(bottom + 24)


def draw_accuracy_forest(measured: _Measured, title: str) -> str:
    """Return an inline SVG with the headline metric of each device and its interval."""
    rows = [
        ForestRow(entry.device, metric.value, metric.low, metric.high, f"{metric.value:.3f}  of {metric.n:,}")
        for entry, metric in measured
        if metric.value is not None
    ]
    return render_forest(title, rows)


def _draw_time_axis(
    draw: Drawing, left: float, right: float, bottom: float, begin: int, end: int, *, grid: bool = True
) -> None:
    for us, label in axes.time_ticks(begin, end, 4):
        x = left + (right - left) * (us - begin) / max(1, end - begin)
        if grid:
            draw.line(x, _TOP_MARGIN - 4, x, bottom, PAGE_THEME.grid)
        draw.text(x, bottom + 16, label, PAGE_THEME.muted, size=11, anchor="middle")
