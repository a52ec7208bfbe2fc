"""Pictures of the page: when incidents were, how much of the fleet drifted when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.fleet.evidence.contents import AccuracyEntry, Incident
from agent.fleet.evidence.page.words import format_duration, parse_epoch_us
from agent.render import axes
from agent.render.charts import ForestRow, render_forest
from agent.render.svg import Drawing, truncate_text
from agent.render.theme import PAGE_THEME, Theme

_MAX_LANES, _LANE_HEIGHT, _TOP_MARGIN = 16, 22.0, 10.0
_WIDTH, _NAME_WIDTH, _DURATION_WIDTH = 450.0, 112.0, 94.0
_STRIP_WIDTH, _STRIP_HEIGHT = 400.0, 90.0


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
