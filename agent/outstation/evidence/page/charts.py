"""Charts of the page as inline SVG: incidents over time, devices in drift over time, accuracy by device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outstation.evidence.format.contents import AccuracyEntry, IncidentRecord
from outstation.evidence.page.formats import format_duration, parse_epoch_us
from outstation.foundation.render import axes
from outstation.foundation.render.charts import ForestRow, render_forest
from outstation.foundation.render.svg import Drawing, text_width, truncate_text
from outstation.foundation.render.theme import PAGE_THEME
from outstation.protocol.wire.messages import Metric

_MAX_LANES, _LANE_HEIGHT, _TOP_MARGIN = 16, 34.0, 10.0
_LANES_WIDTH, _DURATION_WIDTH = 360.0, 86.0
_STRIP_WIDTH, _STRIP_HEIGHT = 400.0, 90.0


def draw_incident_lanes(incidents: Sequence[IncidentRecord], begin_us: int, end_us: int) -> str:
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

    def to_x(us: int) -> float:
        return _LANES_WIDTH * min(max((us - begin) / (end_us - begin), 0.0), 1.0)

    bottom = _TOP_MARGIN + _LANE_HEIGHT * len(known)
    _draw_time_axis(draw, 0.0, _LANES_WIDTH, bottom, begin, end_us)
    for number, (start, incident) in enumerate(known):
        y = _TOP_MARGIN + _LANE_HEIGHT * number
        color = {"critical": PAGE_THEME.fault, "warning": PAGE_THEME.drift}.get(incident.severity, PAGE_THEME.unknown)
        topic = incident.subject if incident.alert in ("drift", "fault") else incident.alert
        name = truncate_text(f"{incident.device or 'fleet'} {topic}", 12, _LANES_WIDTH - _DURATION_WIDTH)
        draw.text(0, y + 14, name, PAGE_THEME.ink, size=12)
        x = min(to_x(start), _LANES_WIDTH - 4.0)
        width = max(4.0, to_x(parse_epoch_us(incident.ended) or end_us) - x)
        draw.rect(x, y + 19, width, 9, color, r=3, css_class=f"bar-{incident.state}")
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


def draw_accuracy_forest(measured: Sequence[tuple[AccuracyEntry, Metric]], title: str) -> str:
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
        half = text_width(label, 11) / 2 + 1
        draw.text(min(max(x, half), draw.width - half), bottom + 16, label, PAGE_THEME.muted, size=11, anchor="middle")
