"""What colours, dashes and marks of a picture of drift mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from agent.render.drift_model import Picture
from agent.render.paper import HIST_X, MARGIN, TIME_X, WIDTH, Paper, series_color
from agent.render.svg import shortened, text_width

_SIZE, _LINE = 11.5, 17.0
_NAME_W = 130.0


class _Item(msgspec.Struct, frozen=True):
    text: str
    symbol: Callable[[float, float], None]

    @property
    def width(self) -> float:
        return 22 + text_width(self.text, _SIZE) + 16


def legend(paper: Paper, picture: Picture, y: float) -> float:
    """Column heads and what is beneath them; the panels may begin below."""
    draw, theme = paper.draw, paper.theme
    drawn = [row for row in picture.rows if row.usual or row.shown]
    by_bin = drawn and all(row.bounds is None for row in drawn)
    values = "Distribution over the reference's bins" if by_bin else "Distribution of values"
    draw.text(HIST_X, y, values, theme.ink, size=12.5, weight=600)
    draw.text(TIME_X, y, "Evidence of change (CUSUM) over time, UTC", theme.ink, size=12.5, weight=600)
    left = _flow(paper, _of_distributions(paper, picture), HIST_X, TIME_X - 10, y + 18)
    right = _flow(paper, _of_evidence(paper, picture), TIME_X, WIDTH - MARGIN, y + 18)
    return max(left, right) + 16


def _flow(paper: Paper, items: Iterator[_Item], left: float, right: float, y: float) -> float:
    x = left
    for item in items:
        if x > left and x + item.width - 16 > right:
            x, y = left, y + _LINE
        item.symbol(x, y - 4)
        paper.draw.text(x + 22, y, item.text, paper.theme.muted, size=_SIZE, name="legend")
        x += item.width
    return y


def _of_distributions(paper: Paper, picture: Picture) -> Iterator[_Item]:
    theme = paper.theme
    if picture.usual:
        yield _Item(picture.usual, _box(paper, theme.usual, theme.usual_edge))
    if len(picture.series) == 1 and any(row.shown for row in picture.rows):
        yield _Item("now", _stroke(paper, theme.series[0]))


def _of_evidence(paper: Paper, picture: Picture) -> Iterator[_Item]:
    theme = paper.theme
    for i, name in enumerate(picture.series):
        yield _Item(shortened(name, _SIZE, _NAME_W), _stroke(paper, series_color(theme, i)))
    if picture.dashes:
        yield _Item(picture.dashes, _stroke(paper, series_color(theme, 1), "5 3"))
    if any(row.limit is not None for row in picture.rows):
        yield _Item("alarm", _stroke(paper, theme.limit, "2 3"))
    states = {spell.state for row in picture.rows for spell in row.spells}
    if "drift" in states:
        yield _Item("drift alert open", _box(paper, theme.drift_band, theme.drift))
    if "fault" in states:
        yield _Item("sensor fault", _box(paper, theme.fault_band, theme.fault))


def _stroke(paper: Paper, color: str, dashes: str = "none") -> Callable[[float, float], None]:
    return lambda x, y: paper.draw.line(x, y, x + 16, y, color, stroke_width="2", stroke_dasharray=dashes)


def _box(paper: Paper, fill: str, edge: str) -> Callable[[float, float], None]:
    return lambda x, y: paper.draw.rect(x, y - 5, 16, 10, fill, stroke=edge, stroke_width="0.8")
