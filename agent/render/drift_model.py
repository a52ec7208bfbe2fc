"""What a picture of drift shows, whoever gathered it. Times are epoch µs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


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
