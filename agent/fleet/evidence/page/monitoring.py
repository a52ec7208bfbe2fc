"""The page's chapters on how it went: incidents, drift, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
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
from agent.render.svg import Drawing, truncate_text
from agent.render.theme import PAGE_THEME, Theme
from agent.text import format_interval, format_value

_MAX_ROWS = 25
_STATE_BADGES = {"open": ("goes on", "bad"), "over": ("over", "ok"), "unknown": ("end unknown", "none")}
_MAX_LANES, _LANE_HEIGHT, _TOP_MARGIN = 16, 22.0, 10.0
_WIDTH, _NAME_WIDTH, _DURATION_WIDTH = 450.0, 112.0, 94.0
_STRIP_WIDTH, _STRIP_HEIGHT = 400.0, 90.0


def render_incidents(facts: EvidenceFacts) -> Markup:
    counts = facts.incident_counts
    total, open_now = sum(counts.values()), sum(n for (_, state), n in counts.items() if state == "open")
    lead = "Alerts, from the moment a device raised one to the moment it cleared it. Times are the device's own, UTC."
    if not total:
        text = "No alert was raised in the time that is told of."
        said = text if facts.message_count else "Nothing was collected, so it is not known whether there were any."
        return chapter("incidents", "Incidents", lead, element("p", said))
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in facts.incident_kinds.most_common())
    said = f"{format_count(total, 'incident')} in all ({kinds}); {open_now:,} {'goes' if open_now == 1 else 'go'} on."
    rows: list[Sequence[Content]] = [_incident_row(one) for one in facts.incidents[:_MAX_ROWS]]
    head = ["", "Began", "Lasted", "Where", "What"]
    picture = draw_incident_lanes(
        facts.incidents, parse_epoch_us(facts.span.first) or 0, parse_epoch_us(facts.as_of) or 1
    )
    key = "red: critical; orange: warning; grey: information. A bar to the right edge goes on."
    shown = (
        [element("div", Markup(picture), element("p", key, css_class="muted"), css_class="card chart")]
        if picture
        else []
    )
    rest = overflow_link(len(facts.incidents) - _MAX_ROWS, "incidents.json")
    if total > len(facts.incidents):
        counted = f"{total - len(facts.incidents):,} others, none of them worse than these, are counted only."
        rest.append(element("p", counted, css_class="muted"))
    unsure = sum(one.clock == "unsynced" for one in facts.incidents)
    notes = []
    if unsure:
        text = f"{format_count(unsure, 'incident')} began or ended while the device's clock was not set: how long is unsure."
        notes = [element("p", text, css_class="muted")]
    for_sheets = element("p", "For a spreadsheet: ", link("incidents.csv"), ".", css_class="muted")
    parts = [*shown, stacked_table(table(head, rows), "incidents"), *rest, *notes, for_sheets]
    return chapter("incidents", "Incidents", lead, element("p", said), *parts)


def _incident_row(incident: Incident) -> list[Content]:
    word, kind = _STATE_BADGES[incident.state]
    kind = "warning" if kind == "bad" and incident.severity != "critical" else kind
    where = f"{incident.device or 'the fleet'}" + (f", {incident.task}" if incident.task else "")
    lasted = format_duration(incident.seconds) + (" so far" if incident.state == "open" else "")
    tail = "" if incident.source == "device" else " (noticed by the collector; not signed)"
    what = Markup(f"<b>{escape(incident.severity)}, {escape(incident.alert)}.</b> {escape(incident.summary + tail)}")
    return [
        badge(word, kind),
        nowrap(format_time(incident.began)),
        nowrap(lasted if incident.seconds is not None else "–"),
        where,
        what,
    ]


def render_drift(facts: EvidenceFacts) -> Markup:
    lead = (
        "Whether sites still look like what the models know. Counted by the collector from the drift summaries that "
        "devices signed; the summaries stay in its database, the alerts that came of them are here."
    )
    tasks = facts.drift["tasks"]
    if not tasks:
        return chapter("drift", "Drift", lead, element("p", "No drift summary was collected: drift was not watched."))
    cards = [_drift_card(one) for one in tasks[:_MAX_ROWS]]
    unread = facts.drift["windows_unreadable"]
    notes = (
        [element("p", f"{unread:,} summaries could not be read and are left out.", css_class="notice")]
        if unread
        else []
    )
    return chapter("drift", "Drift", lead, element("div", *cards, css_class="grid"), *notes)


def _drift_card(task: dict[str, Any]) -> Markup:
    apart = " (devices with another reference than most)" if task["apart"] else ""
    now, moved = task["devices_in_drift"], task["moved"]
    lines = [
        f"{format_count(task['windows'], 'summary', 'summaries')} of {format_count(task['devices'], 'device')}; "
        f"{task['windows_with_a_sensor_fault']:,} with a sensor fault.",
        f"In drift by the last summary: {format_names(now)}." if now else "No device is in drift by its last summary.",
    ]
    if task["expected_accuracy"] is not None:
        lines.append(f"Accuracy that the models' own scores lead one to expect: {task['expected_accuracy']:.3f}.")
    lines += [wide["summary"] for wide in task["wide"][:3]]
    rows: list[Sequence[Content]] = [
        [e["device"], e["field"], format_time(e["alarmed"]), format_time(e["ended"]) if e["ended"] else "goes on"]
        for e in moved[:8]
    ]
    listed = [table(["Device", "Field", "Noticed", "Until"], rows)] if rows else []
    rest = overflow_link(len(moved) + task["moved_left_out"] - 8, "drift.json")
    picture = draw_drift_strip(task["history"], task["devices"])
    key = element("p", "orange: devices in drift; red: with a sensor fault", css_class="muted")
    return html.card(task["task"] + apart, "", picture, key, html.bullet_list(lines, "notes"), *listed, *rest)


def render_accuracy(facts: EvidenceFacts) -> Markup:
    lead = (
        "What labels from the sites say of the models' answers, with 95 % intervals. Without labels nothing is known."
    )
    if not facts.accuracy:
        text = (
            "No labels came: how often the models were right in operation was not measured. Evaluations before use are "
            "with the models above."
        )
        return chapter("accuracy", "Accuracy and labels", lead, element("p", text, css_class="notice"))
    by_task: dict[str, list[Any]] = {}
    for one in facts.accuracy:
        by_task.setdefault(one.task, []).append((one, select_headline(one)))
    cards = []
    for task, those in by_task.items():
        told = [(one, metric) for one, metric in those if metric is not None and metric.value is not None]
        name = display_name(told[0][1].metric) if told else "no metric yet"
        picture = draw_accuracy_forest(told[:20], f"{task}: {name} by device") if told else ""
        cards.append(html.card(f"{task}: {name}", _card_caption(told, those), picture))
    rows: list[Sequence[Content]] = [
        [
            one.device,
            one.task,
            "–" if metric is None else f"{display_name(metric.metric)} {format_value(metric.value)}",
            "" if metric is None else format_interval(metric.low, metric.high),
            _format_label_sources(one.labels),
            _format_labelling(one.labelling),
            format_time(one.time) if one.time else "–",
        ]
        for those in by_task.values()
        for one, metric in those[:_MAX_ROWS]
    ]
    head = ["Device", "Task", "Figure", "95 % interval", "Labels", "How they came", "As of"]
    listed = details("Labels and figures by device", stacked_table(table(head, rows), "labelled"))
    return chapter("accuracy", "Accuracy and labels", lead, element("div", *cards, css_class="grid"), listed)


def _card_caption(measured: Sequence[Any], entries: Sequence[Any]) -> str:
    devices = format_count(len({one.device for one, _ in entries}), "device")
    return f"{devices} with labels" + (", the worst first" if len(measured) > 1 else "")


def _format_label_sources(labels: dict[str, int]) -> str:
    names = {"human": "people", "system": "other systems", "model": "the model itself (not counted)"}
    return ", ".join(f"{n:,} by {names.get(source, source)}" for source, n in labels.items()) or "not told"


def _format_labelling(labelling: dict[str, Any]) -> str:
    parts = []
    if isinstance(coverage := labelling.get("coverage"), int | float):
        parts.append(f"for {coverage:.0%} of results")
    delay = labelling.get("delay_s")
    if isinstance(delay, dict) and isinstance(median := delay.get("median"), int | float):
        parts.append(f"after {format_duration(median)} in the middle")
    for name in ("replaced", "late", "unmatched"):
        if isinstance(n := labelling.get(name), int) and n:
            parts.append(f"{n:,} {name}")
    return ", ".join(parts)


def draw_incident_lanes(incidents: Sequence[Incident], begin_us: int, end_us: int, theme: Theme = PAGE_THEME) -> str:
    """An inline SVG: a bar from each incident's beginning to its end; "" without any whose time is known."""
    known = [one for one in incidents if (us := parse_epoch_us(one.began)) is not None and us <= end_us][:_MAX_LANES]
    begin = min([begin_us, *(parse_epoch_us(one.began) or begin_us for one in known)])
    if not known or end_us <= begin:
        return ""
    known.sort(key=lambda one: one.began)
    draw = Drawing(_WIDTH, f"When incidents were, {len(known)} of them")
    left, right = _NAME_WIDTH, _WIDTH - _DURATION_WIDTH

    def to_x(us: int) -> float:
        return left + (right - left) * min(max((us - begin) / (end_us - begin), 0.0), 1.0)

    bottom = _TOP_MARGIN + _LANE_HEIGHT * len(known)
    _draw_time_axis(draw, theme, left, right, bottom, begin, end_us)
    for number, one in enumerate(known):
        y = _TOP_MARGIN + _LANE_HEIGHT * number
        since, until = parse_epoch_us(one.began) or begin, parse_epoch_us(one.ended) or end_us
        color = {"critical": theme.fault, "warning": theme.drift}.get(one.severity, theme.unknown)
        draw.text(0, y + 14, truncate_text(_lane_name(one), 12, _NAME_WIDTH - 10), theme.ink, size=12)
        x, width = to_x(since), max(4.0, to_x(until) - to_x(since))
        draw.rect(x, y + 4, min(width, right - x), _LANE_HEIGHT - 9, color, r=3, css_class=f"bar-{one.state}")
        how_long = format_duration(one.seconds) + (" so far" if one.state == "open" else "")
        if one.state == "unknown":
            how_long = "end unknown"
        draw.text(_WIDTH, y + 14, how_long, theme.muted, size=11, anchor="end")
    return draw.to_inline_svg(bottom + 24)


def _lane_name(incident: Incident) -> str:
    where = incident.device or "fleet"
    return f"{where} {incident.subject}" if incident.alert in ("drift", "fault") else f"{where} {incident.alert}"


def draw_drift_strip(history: Sequence[dict[str, Any]], devices: int, theme: Theme = PAGE_THEME) -> str:
    """An inline SVG: of the fleet's devices, how many drifted or had a sensor fault, over time."""
    known = [
        one for one in history if parse_epoch_us(one["from"]) is not None and parse_epoch_us(one["to"]) is not None
    ]
    if not known:
        return ""
    begin, end = parse_epoch_us(known[0]["from"]) or 0, parse_epoch_us(known[-1]["to"]) or 1
    draw = Drawing(_STRIP_WIDTH, "Devices that drifted or had a sensor fault, over time")
    left, right, bottom = 38.0, _STRIP_WIDTH - 8, _TOP_MARGIN + _STRIP_HEIGHT
    most = max(1, devices)

    def to_y(n: int) -> float:
        return bottom - _STRIP_HEIGHT * n / most

    for tick in sorted({0, most, most // 2 if most > 3 else most}):
        draw.line(left, to_y(tick), right, to_y(tick), theme.grid)
        draw.text(left - 6, to_y(tick) + 4, f"{tick}", theme.muted, size=11, anchor="end")
    for one in known:
        x = left + (right - left) * ((parse_epoch_us(one["from"]) or 0) - begin) / max(1, end - begin)
        x2 = left + (right - left) * ((parse_epoch_us(one["to"]) or 0) - begin) / max(1, end - begin)
        drift, fault = min(one["devices_in_drift"], most), min(one["devices_with_a_fault"], most)
        draw.rect(x, bottom - 2, max(1.0, x2 - x - 0.5), 2, theme.reference_edge)
        draw.rect(x, to_y(drift), max(1.0, x2 - x - 0.5), bottom - to_y(drift), theme.drift, css_class="drift")
        both = min(drift + fault, most)
        draw.rect(x, to_y(both), max(1.0, x2 - x - 0.5), to_y(drift) - to_y(both), theme.fault, css_class="fault")
    _draw_time_axis(draw, theme, left, right, bottom, begin, end, grid=False)
    return draw.to_inline_svg(bottom + 24)


def draw_accuracy_forest(entries: Sequence[tuple[AccuracyEntry, Any]], title: str) -> str:
    """An inline SVG: one figure with its interval for each device."""
    lines = [
        ForestRow(one.device, metric.value, metric.low, metric.high, f"{metric.value:.3f}  of {metric.n:,}")
        for one, metric in entries
    ]
    return render_forest(title, lines)


def _draw_time_axis(
    draw: Drawing, theme: Theme, left: float, right: float, bottom: float, begin: int, end: int, *, grid: bool = True
) -> None:
    for us, label in axes.time_ticks(begin, end, 4):
        x = left + (right - left) * (us - begin) / max(1, end - begin)
        if grid:
            draw.line(x, _TOP_MARGIN - 4, x, bottom, theme.grid)
        draw.text(x, bottom + 16, label, theme.muted, size=11, anchor="middle")
