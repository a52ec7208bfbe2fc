"""Where things are in a picture of drift, in pixels: three columns, the last of them an axis of time."""

from __future__ import annotations

import msgspec

from agent.render.svg import Drawing
from agent.render.theme import Theme

WIDTH = 1120.0
MARGIN = 28.0
NAME_WIDTH, HISTOGRAM_WIDTH, GAP = 156.0, 300.0, 56.0
HISTOGRAM_X = MARGIN + NAME_WIDTH
TIME_X = HISTOGRAM_X + HISTOGRAM_WIDTH + GAP
TIME_WIDTH = WIDTH - MARGIN - TIME_X
AXIS_LABEL_HEIGHT = 17.0  # below a panel, for the labels of its axis


class Panel(msgspec.Struct, frozen=True):
    x: float
    y: float
    width: float
    height: float

    @property
    def bottom(self) -> float:
        return self.y + self.height


class Canvas(msgspec.Struct, frozen=True):
    """Where things are drawn, and the common axis of time."""

    drawing: Drawing
    theme: Theme
    begin: int
    end: int

    def time_to_x(self, us: int) -> float:
        return TIME_X + TIME_WIDTH * (us - self.begin) / (self.end - self.begin)


def series_color(theme: Theme, index: int) -> str:
    return theme.series[index % len(theme.series)]
