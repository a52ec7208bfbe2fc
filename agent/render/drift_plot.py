"""Drift in one picture: a row per field, its distribution beside the course of its evidence, on one axis of time."""

from __future__ import annotations

from agent.render import axes, drift_panels
from agent.render.drift_model import Picture
from agent.render.legend import legend
from agent.render.paper import MARGIN, UNDER, WIDTH, Panel, Paper
from agent.render.svg import Drawing, shortened, wrapped
from agent.render.theme import DARK, LIGHT, Theme

ROW_GAP = 14.0
MOST_ALERTS = 5
PLAIN_H = 48.0  # of a row without a distribution


def drift(picture: Picture, *, dark: bool = False) -> str:
    """The picture as an SVG document."""
    theme = DARK if dark else LIGHT
    draw = Drawing(WIDTH, picture.title)
    y = _head(draw, theme, picture)
    if picture.empty:
        return draw.document(_empty(draw, theme, picture.empty, y), theme.paper)
    paper = Paper(draw, theme, *_span(picture))
    y = legend(paper, picture, y)
    height = _row_height(len(picture.rows))
    for row in picture.rows:
        has_values = bool(row.usual or row.shown)
        tall = height if has_values else PLAIN_H
        drift_panels.row(paper, row, Panel(MARGIN, y, WIDTH - 2 * MARGIN, tall))
        y += tall + (UNDER if has_values else 0) + ROW_GAP
    if picture.estimates:
        y = drift_panels.estimates(paper, picture.estimates, y) + ROW_GAP
    return draw.document(_time_axis(paper, y - ROW_GAP), theme.paper)


def _head(draw: Drawing, theme: Theme, picture: Picture) -> float:
    y = MARGIN + 16
    draw.text(MARGIN, y, shortened(picture.title, 20, WIDTH - 2 * MARGIN), theme.ink, size=20, weight=600, name="title")
    y += 22
    draw.text(MARGIN, y, shortened(picture.subtitle, 12.5, WIDTH - 2 * MARGIN), theme.muted, size=12.5, name="subtitle")
    y += 12
    for state, sentence in picture.alerts[:MOST_ALERTS]:
        y += 20
        draw.circle(MARGIN + 4, y - 4, 4, theme.of_state(state))
        for i, line in enumerate(wrapped(sentence, 12.5, WIDTH - 2 * MARGIN - 16, lines=2)):
            y += 16 if i else 0
            draw.text(MARGIN + 16, y, line, theme.ink, size=12.5, name="alert")
    if len(picture.alerts) > MOST_ALERTS:
        y += 18
        draw.text(MARGIN + 16, y, f"and {len(picture.alerts) - MOST_ALERTS} more", theme.muted, size=12)
    return y + 30


def _empty(draw: Drawing, theme: Theme, message: str, y: float) -> float:
    draw.rect(MARGIN, y - 8, WIDTH - 2 * MARGIN, 120, theme.panel, r=8, stroke=theme.grid)
    for i, line in enumerate(wrapped(message, 14, WIDTH - 4 * MARGIN, lines=2)):
        draw.text(WIDTH / 2, y + 56 + 20 * i, line, theme.muted, size=14, anchor="middle", name="empty")
    return y + 112 + MARGIN


def _time_axis(paper: Paper, y: float) -> float:
    for t, label in axes.moments(paper.begin, paper.end, 8):
        paper.draw.text(paper.at(t), y + 16, label, paper.theme.muted, size=10.5, anchor="middle", name="time")
    return y + 16 + MARGIN - 8


def _span(picture: Picture) -> tuple[int, int]:
    times = [t for row in picture.rows for curve in row.curves for t in curve.times]
    times += [t for estimate in picture.estimates for t in estimate.times]
    times += [t for row in picture.rows for spell in row.spells for t in (spell.begin, spell.end)]
    if not times:
        return 0, 1
    begin, end = min(times), max(times)
    if begin == end:
        return begin - 30_000_000, end + 30_000_000
    pad = (end - begin) // 80
    return begin - pad, end + pad


def _row_height(rows: int) -> float:
    return 120.0 if rows <= 2 else 84.0 if rows <= 8 else 58.0
