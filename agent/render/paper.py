"""Where things are in a picture of drift, in pixels: three columns, the last of them an axis of time."""

from __future__ import annotations

import msgspec

from agent.render.svg import Drawing
from agent.render.theme import Theme

WIDTH = 1120.0
MARGIN = 28.0
NAME_W, HIST_W, GAP = 156.0, 300.0, 56.0
HIST_X = MARGIN + NAME_W
TIME_X = HIST_X + HIST_W + GAP
TIME_W = WIDTH - MARGIN - TIME_X
UNDER = 17.0  # below a panel, for the labels of its axis


class Panel(msgspec.Struct, frozen=True):
    x: float
    y: float
    w: float
    h: float

    @property
    def bottom(self) -> float:
        return self.y + self.h


class Paper(msgspec.Struct, frozen=True):
    """Where things are drawn, and the common axis of time."""

    draw: Drawing
    theme: Theme
    begin: int
    end: int

    def at(self, us: int) -> float:
        return TIME_X + TIME_W * (us - self.begin) / (self.end - self.begin)


def series_color(theme: Theme, number: int) -> str:
    return theme.series[number % len(theme.series)]
