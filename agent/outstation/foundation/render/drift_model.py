"""Content of a drift plot. Times are epoch µs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class EvidenceCurve(msgspec.Struct, frozen=True):
    """Evidence of one series over time, with a gap at each None."""

    series: int
    times: Sequence[int]
    values: Sequence[float | None]
    dashed: bool = False


class StateInterval(msgspec.Struct, frozen=True):
    """Interval in a state: drift or fault (shaded), or insufficient. `ongoing`: it lasts beyond the plot."""

    state: str
    begin: int
    end: int
    ongoing: bool
    series: int = 0


class PlotRow(msgspec.Struct, frozen=True):
    """Row of the plot: a field, or a subject without a histogram.

    `reference` and `histograms` (series, counts) count rows below, in, and above the bins. `bounds` are the bin edges
    in the field's unit, None if unknown.
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


class PerformanceEstimate(msgspec.Struct, frozen=True):
    """Expected accuracy over time, or expected mean absolute error."""

    series: int
    times: Sequence[int]
    values: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]
    is_error: bool = False


class DriftPlot(msgspec.Struct, frozen=True):
    """Drift plot. Colours tell series apart. `dashed_label` names the dashed curves, "" without any."""

    title: str
    subtitle: str
    alerts: Sequence[tuple[str, str]]  # (state, sentence)
    series_names: Sequence[str]
    dashed_label: str
    reference_label: str
    rows: Sequence[PlotRow]
    estimates: Sequence[PerformanceEstimate]
    empty_message: str = ""  # shown instead of rows
