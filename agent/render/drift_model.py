"""What a picture of drift shows, whoever gathered it. Times are epoch µs."""

from __future__ import annotations

from collections.abc import Sequence

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


class EvidenceCurve(msgspec.Struct, frozen=True):
    """One series over time, broken where `values` has None."""

    series: int
    times: Sequence[int]
    values: Sequence[float | None]
    dashed: bool = False


class StateInterval(msgspec.Struct, frozen=True):
    """A stretch of time: `state` is drift or fault, shaded, or insufficient; `goes_on` at the picture's end."""

    state: str
    begin: int
    end: int
    ongoing: bool
    series: int = 0


class PlotRow(msgspec.Struct, frozen=True):
    """A field, or another subject without a histogram.

    `usual` and `shown` (series, counts) are rows below, in the bins and above; `bounds` are what separates these, in
    the field's unit, None where they are not known.
    """

    name: str
    unit: str
    state: str
    notes: Sequence[str]
    bounds: Sequence[float] | None
    reference: Sequence[int] | None
    histograms: Sequence[tuple[int, Sequence[int]]]
    curves: Sequence[EvidenceCurve]
    limit: float | None
    intervals: Sequence[StateInterval]


class AccuracyEstimate(msgspec.Struct, frozen=True):
    """Expected accuracy of one series: times, values, and the ends of the intervals."""

    series: int
    times: Sequence[int]
    values: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]


class DriftPlot(msgspec.Struct, frozen=True):
    """`series` are the names of what is told apart by colour, `dashes` that of the dashed curves; '' for none."""

    title: str
    subtitle: str
    alerts: Sequence[tuple[str, str]]  # state, sentence
    series_names: Sequence[str]
    dashed_label: str
    reference_label: str
    rows: Sequence[PlotRow]
    estimates: Sequence[AccuracyEstimate]
    empty_message: str = ""  # what to say where there is nothing to show


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
