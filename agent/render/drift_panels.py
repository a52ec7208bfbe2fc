"""The panels of a picture of drift: a field and its state, its distribution, its evidence over time, the estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agent.render import axes, histogram
from agent.render.drift_model import Curve, Estimate, Row, Spell
from agent.render.paper import HIST_W, HIST_X, MARGIN, NAME_W, TIME_W, TIME_X, UNDER, Panel, Paper, series_color
from agent.render.svg import shortened

ESTIMATE_H = 96.0
STATES = {
    "ok": "as usual",
    "drift": "drift",
    "fault": "sensor fault",
    "insufficient": "learning",
    "untested": "not judged now",
}
OVER = 4.0  # a sum is drawn up to so many times its limit; beyond, it says no more
USUAL_LIMIT = 5.0  # what is assumed for the scale where no limit is known
SMOOTH = 5  # estimates


def row(paper: Paper, row: Row, all_of: Panel) -> None:
    """A field's name and state, its distribution, its evidence."""
    _name(paper, row, all_of)
    if row.usual or row.shown:
        _distribution(paper, row, Panel(HIST_X, all_of.y, HIST_W, all_of.h))
    _evidence(paper, row, Panel(TIME_X, all_of.y, TIME_W, all_of.h))


def _name(paper: Paper, row: Row, panel: Panel) -> None:
    draw, theme = paper.draw, paper.theme
    title = f"{row.name} ({row.unit})" if row.unit else row.name
    draw.rect(panel.x, panel.y, 3, panel.h, theme.of_state(row.state), r=1.5, name=f"state-{row.state}")
    draw.text(
        panel.x + 12, panel.y + 13, shortened(title, 14, NAME_W - 24), theme.ink, size=14, weight=600, name="field"
    )
    y = panel.y + 30
    draw.text(panel.x + 12, y, STATES.get(row.state, row.state), theme.of_state(row.state), size=11.5, weight=600)
    for note in row.notes:
        y += 15
        if y <= panel.bottom + UNDER:
            draw.text(panel.x + 12, y, shortened(note, 11, NAME_W - 20), theme.muted, size=11, name="note")


def _distribution(paper: Paper, row: Row, panel: Panel) -> None:
    draw, theme = paper.draw, paper.theme
    draw.rect(panel.x, panel.y, panel.w, panel.h, theme.panel)
    shapes = [*([row.usual] if row.usual else []), *(counts for _, counts in row.shown)]
    bounds = row.bounds or list(range(len(shapes[0]) - 1))
    low, high = histogram.span(bounds, shapes)
    outlines = [histogram.outline(bounds, counts, low, high) for counts in shapes]
    # A rest value may hold half of all rows: what is higher than this is cut off.
    tall = max(_tall(outline) for outline in outlines) or 1.0
    if row.usual:
        usual = _steps(outlines.pop(0), tall, panel)
        draw.path(usual, theme.usual_edge, fill=theme.usual, closed=True, name="usual", stroke_width="1")
    for (series, _), heights in zip(row.shown, outlines, strict=True):
        line = _steps(heights, tall, panel)[1:-1]
        draw.path(line, series_color(theme, series), name="shown", stroke_width="1.8")
    draw.line(panel.x, panel.bottom, panel.x + panel.w, panel.bottom, theme.usual_edge)
    for value in axes.numbers(low, high, 5):
        x = panel.x + panel.w * (value - low) / (high - low)
        draw.line(x, panel.bottom, x, panel.bottom + 3, theme.usual_edge)
        draw.text(x, panel.bottom + 14, axes.number(value), theme.muted, size=10.5, anchor="middle")


def _tall(outline: Sequence[float]) -> float:
    ordered = sorted(outline)
    return min(ordered[-1], 2.2 * ordered[-4] if ordered[-4] > 0 else ordered[-1])


def _steps(heights: Sequence[float], tall: float, panel: Panel) -> list[tuple[float, float]]:
    step = panel.w / len(heights)
    points = [(panel.x, panel.bottom)]
    for i, height in enumerate(heights):
        y = panel.bottom - (panel.h - 4) * min(1.0, height / tall)
        points += [(panel.x + i * step, y), (panel.x + (i + 1) * step, y)]
    return [*points, (panel.x + panel.w, panel.bottom)]


def _evidence(paper: Paper, row: Row, panel: Panel) -> None:
    draw, theme = paper.draw, paper.theme
    draw.rect(panel.x, panel.y, panel.w, panel.h, theme.panel)
    many = len({curve.series for curve in row.curves}) > 1
    judged = [spell for spell in row.spells if spell.state != "insufficient"]
    for spell in judged:
        _band(paper, spell, panel, shaded=not many)
    highest = max((v for curve in row.curves for v in curve.values if v is not None), default=0.0)
    limit = row.limit or USUAL_LIMIT
    top = min(max(1.25 * limit, 1.06 * highest), OVER * limit)
    _grid(paper, panel, 0.0, top, axes.number)
    for spell in row.spells:
        if spell.state == "insufficient":
            _learning(paper, spell, panel)
    if highest > top:
        words = f"up to {axes.number(highest)}"
        draw.text(panel.x + panel.w, panel.y - 4, words, theme.muted, size=10.5, anchor="end", name="beyond")
    if row.limit is not None:
        y = panel.bottom - panel.h * row.limit / top
        draw.line(
            panel.x, y, panel.x + panel.w, y, theme.limit, name="limit", stroke_dasharray="2 3", stroke_width="1.2"
        )
    for curve in row.curves:
        color = series_color(theme, curve.series if many or not curve.dashed else curve.series + 1)
        _curve(paper, curve, panel, top, color)
    for spell in judged:
        _marks(paper, spell, panel, series_color(theme, spell.series) if many else theme.of_state(spell.state))


def _band(paper: Paper, spell: Spell, panel: Panel, *, shaded: bool) -> None:
    theme = paper.theme
    x, end = paper.at(spell.begin), paper.at(spell.end)
    if spell.state == "insufficient":
        if end - x > 60:
            paper.draw.text(
                (x + end) / 2, panel.y + panel.h / 2 + 4, "learning", theme.unknown, size=11, anchor="middle"
            )
        return
    fill = theme.drift_band if spell.state == "drift" else theme.fault_band
    opacity = "1" if shaded else "0.5"
    paper.draw.rect(x, panel.y, max(1.5, end - x), panel.h, fill, name=f"band-{spell.state}", fill_opacity=opacity)


def _learning(paper: Paper, spell: Spell, panel: Panel) -> None:
    """Said where there is room for it; nothing is judged meanwhile."""
    begin, end = paper.at(spell.begin), paper.at(spell.end)
    if end - begin > 60:
        middle, y = (begin + end) / 2, panel.y + panel.h / 2
        paper.draw.rect(middle - 30, y - 9, 60, 18, paper.theme.panel)
        paper.draw.text(middle, y + 4, "learning", paper.theme.unknown, size=11, anchor="middle")


def _marks(paper: Paper, spell: Spell, panel: Panel, color: str) -> None:
    """A filled mark where an alert was raised, a hollow one where it cleared."""
    for at, raised in ((spell.begin, True), *(() if spell.goes_on else ((spell.end, False),))):
        x, y = paper.at(at), panel.y
        name = "raised" if raised else "cleared"
        triangle = [(x - 5, y - 5), (x + 5, y - 5), (x, y + 3)]
        paper.draw.path(
            triangle, color, fill=color if raised else paper.theme.paper, closed=True, name=name, stroke_width="1.2"
        )


def _curve(paper: Paper, curve: Curve, panel: Panel, top: float, color: str) -> None:
    run: list[tuple[float, float]] = []
    dashes = "5 3" if curve.dashed else "none"

    def put() -> None:
        if len(run) == 1:
            paper.draw.circle(*run[0], 2.2, color, name="curve")
        else:
            paper.draw.path(run, color, name="curve", stroke_width="1.6", stroke_dasharray=dashes)

    for t, value in zip(curve.times, curve.values, strict=True):
        if value is None:
            put()
            run = []
        else:
            run.append((paper.at(t), panel.bottom - panel.h * min(1.0, value / top)))
    put()


def _grid(paper: Paper, panel: Panel, low: float, high: float, label: Callable[[float], str]) -> None:
    for t, _ in axes.moments(paper.begin, paper.end, 8):
        paper.draw.line(paper.at(t), panel.y, paper.at(t), panel.bottom, paper.theme.grid)
    for value in axes.numbers(low, high, 5 if panel.h > 90 else 3 if panel.h > 70 else 2):
        y = panel.bottom - panel.h * (value - low) / (high - low)
        paper.draw.line(panel.x, y, panel.x + panel.w, y, paper.theme.grid)
        paper.draw.text(panel.x - 7, y + 4, label(value), paper.theme.muted, size=10.5, anchor="end")


def _smoothed(values: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """One window's estimate rests on few answers; here each is the mean of the last SMOOTH."""
    out = []
    for at in range(len(values)):
        last = values[max(0, at - SMOOTH + 1) : at + 1]
        out.append((values[at][0], sum(v for _, v in last) / len(last)))
    return out


def estimates(paper: Paper, told: Sequence[Estimate], y: float) -> float:
    """Expected accuracy; below it the next thing begins."""
    draw, theme = paper.draw, paper.theme
    panel = Panel(TIME_X, y + 6, TIME_W, ESTIMATE_H)
    draw.text(MARGIN + 12, panel.y + 13, "expected accuracy", theme.ink, size=14, weight=600)
    draw.text(
        MARGIN + 12,
        panel.y + 30,
        "without labels, if scores mean what they meant on the reference data",
        theme.muted,
        size=11,
    )
    alone = "; shaded: 95 % interval of each" if len(told) == 1 else ""
    draw.text(MARGIN + 12, panel.y + 45, f"mean of {SMOOTH} windows{alone}", theme.muted, size=11)
    draw.rect(panel.x, panel.y, panel.w, panel.h, theme.panel)
    known = [v for e in told for v in (*(e.low if len(told) == 1 else ()), *e.values) if v is not None]
    low = max(0.0, min([0.9, *known]) - 0.03)
    _grid(paper, panel, low, 1.0, lambda value: f"{100 * value:.0f} %")

    def place(t: int, value: float) -> tuple[float, float]:
        return paper.at(t), panel.bottom - panel.h * (min(1.0, max(low, value)) - low) / (1.0 - low)

    for one in told:
        color = series_color(theme, one.series)
        ends = [
            (t, a, b) for t, a, b in zip(one.times, one.low, one.high, strict=True) if a is not None and b is not None
        ]
        if len(told) == 1:
            ring = [place(t, a) for t, a, _ in ends] + [place(t, b) for t, _, b in reversed(ends)]
            draw.path(ring, "none", fill=color, closed=True, name="interval", fill_opacity="0.16")
        told_of = [(t, v) for t, v in zip(one.times, one.values, strict=True) if v is not None]
        draw.path([place(t, v) for t, v in _smoothed(told_of)], color, name="estimate", stroke_width="2")
    return panel.bottom
