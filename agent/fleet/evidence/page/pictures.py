"""Pictures of the page: when incidents were, how much of the fleet drifted when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.fleet.evidence.contents import Incident, Measured
from agent.fleet.evidence.page.words import epoch, span
from agent.render import axes
from agent.render.charts import Line, forest
from agent.render.svg import Drawing, shortened
from agent.render.theme import PAGE, Theme

_LANES, _LANE, _TOP = 16, 22.0, 10.0
_WIDTH, _NAME, _END = 450.0, 112.0, 94.0
_STRIP_W, _STRIP = 400.0, 90.0


def lanes(incidents: Sequence[Incident], begin_us: int, end_us: int, theme: Theme = PAGE) -> str:
    """An inline SVG: a bar from each incident's beginning to its end; "" without any whose time is known."""
    known = [one for one in incidents if (us := epoch(one.began)) is not None and us <= end_us][:_LANES]
    begin = min([begin_us, *(epoch(one.began) or begin_us for one in known)])
    if not known or end_us <= begin:
        return ""
    known.sort(key=lambda one: one.began)
    draw = Drawing(_WIDTH, f"When incidents were, {len(known)} of them")
    left, right = _NAME, _WIDTH - _END

    def at(us: int) -> float:
        return left + (right - left) * min(max((us - begin) / (end_us - begin), 0.0), 1.0)

    bottom = _TOP + _LANE * len(known)
    _time_axis(draw, theme, left, right, bottom, begin, end_us)
    for number, one in enumerate(known):
        y = _TOP + _LANE * number
        since, until = epoch(one.began) or begin, epoch(one.ended) or end_us
        color = {"critical": theme.fault, "warning": theme.drift}.get(one.severity, theme.unknown)
        draw.text(0, y + 14, shortened(_lane_name(one), 12, _NAME - 10), theme.ink, size=12)
        x, width = at(since), max(4.0, at(until) - at(since))
        draw.rect(x, y + 4, min(width, right - x), _LANE - 9, color, r=3, name=f"bar-{one.state}")
        how_long = span(one.seconds) + (" so far" if one.state == "open" else "")
        if one.state == "unknown":
            how_long = "end unknown"
        draw.text(_WIDTH, y + 14, how_long, theme.muted, size=11, anchor="end")
    return draw.inline(bottom + 24)


def _lane_name(one: Incident) -> str:
    where = one.device or "fleet"
    return f"{where} {one.subject}" if one.alert in ("drift", "fault") else f"{where} {one.alert}"


def strip(history: Sequence[dict[str, Any]], devices: int, theme: Theme = PAGE) -> str:
    """An inline SVG: of the fleet's devices, how many drifted or had a sensor fault, over time."""
    known = [one for one in history if epoch(one["from"]) is not None and epoch(one["to"]) is not None]
    if not known:
        return ""
    begin, end = epoch(known[0]["from"]) or 0, epoch(known[-1]["to"]) or 1
    draw = Drawing(_STRIP_W, "Devices that drifted or had a sensor fault, over time")
    left, right, bottom = 38.0, _STRIP_W - 8, _TOP + _STRIP
    most = max(1, devices)

    def high(n: int) -> float:
        return bottom - _STRIP * n / most

    for tick in sorted({0, most, most // 2 if most > 3 else most}):
        draw.line(left, high(tick), right, high(tick), theme.grid)
        draw.text(left - 6, high(tick) + 4, f"{tick}", theme.muted, size=11, anchor="end")
    for one in known:
        x = left + (right - left) * ((epoch(one["from"]) or 0) - begin) / max(1, end - begin)
        x2 = left + (right - left) * ((epoch(one["to"]) or 0) - begin) / max(1, end - begin)
        drift, fault = min(one["devices_in_drift"], most), min(one["devices_with_a_fault"], most)
        draw.rect(x, bottom - 2, max(1.0, x2 - x - 0.5), 2, theme.usual_edge)
        draw.rect(x, high(drift), max(1.0, x2 - x - 0.5), bottom - high(drift), theme.drift, name="drift")
        both = min(drift + fault, most)
        draw.rect(x, high(both), max(1.0, x2 - x - 0.5), high(drift) - high(both), theme.fault, name="fault")
    _time_axis(draw, theme, left, right, bottom, begin, end, grid=False)
    return draw.inline(bottom + 24)


def accuracies(shown: Sequence[tuple[Measured, Any]], title: str) -> str:
    """An inline SVG: one figure with its interval for each device."""
    lines = [
        Line(one.device, metric.value, metric.low, metric.high, f"{metric.value:.3f}  of {metric.n:,}")
        for one, metric in shown
    ]
    return forest(title, lines)


def _time_axis(
    draw: Drawing, theme: Theme, left: float, right: float, bottom: float, begin: int, end: int, *, grid: bool = True
) -> None:
    for us, label in axes.moments(begin, end, 4):
        x = left + (right - left) * (us - begin) / max(1, end - begin)
        if grid:
            draw.line(x, _TOP - 4, x, bottom, theme.grid)
        draw.text(x, bottom + 16, label, theme.muted, size=11, anchor="middle")
