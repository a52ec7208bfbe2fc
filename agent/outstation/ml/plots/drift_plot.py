"""Drift plots: from timelines of drift windows to a plot, and the plot to a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

import msgspec

from outstation.foundation.arrays import Ints
from outstation.foundation.cli import plot_file
from outstation.foundation.render import axes, drift_plot
from outstation.foundation.render.drift_model import (
    DriftPlot,
    EvidenceCurve,
    PerformanceEstimate,
    PlotRow,
    StateInterval,
)
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.reporting.drift_message import STATES_BY_SEVERITY
from outstation.ml.drift.reporting.parsed_message import SubjectReport, effect_sizes
from outstation.ml.drift.reporting.timeline import Timeline
from outstation.ml.model.bundle.bundle import Bundle
from outstation.protocol.alerts.alert import OUTPUT_PREFIX

_STATISTICS = ("mean", "spread")
_NON_FIELD_SUBJECTS = ("output", "score", "joint")
NEAREST = "all tests"


class FieldScale(msgspec.Struct, frozen=True):
    """Bin bounds and units of a bundle's fields."""

    bounds: Mapping[str, Sequence[float]] = msgspec.field(default_factory=dict)
    units: Mapping[str, str] = msgspec.field(default_factory=dict)

    @classmethod
    def from_bundle(cls, bundle: Bundle, reference: Reference) -> FieldScale:
        units = dict(zip(bundle.manifest.input.fields, bundle.manifest.input.units, strict=False))
        return cls(dict(zip(reference.fields, reference.bounds.tolist(), strict=True)), units)


def save(picture: DriftPlot, file: Path, *, dark: bool) -> None:
    """Write the plot as SVG or PNG. Raises UsageError if the file cannot be written."""
    plot_file.write(file, drift_plot.render_drift(picture, dark=dark))


def plot_device(
    timeline: Timeline, scale: FieldScale, reference_counts: Mapping[str, Ints], limits: Mapping[str, float]
) -> tuple[list[PlotRow], list[PerformanceEstimate]]:
    """Return the rows and the expected performance of one device, with a curve each for mean and spread."""
    rows = []
    for name in _list_subjects(timeline):
        state = next((p.subjects[name].state for p in reversed(timeline.points) if name in p.subjects), "insufficient")
        now = timeline.latest(name)
        usual = reference_counts.get(name)
        shown = [(0, now[1].counts.tolist())] if now is not None else []
        notes = [
            f"raised {axes.format_time(begin)[5:]}"
            for begin, _, is_open in timeline.spells(name, state)
            if is_open and state == "drift"
        ]
        if now is not None and usual is not None and now[0] != "insufficient":
            sizes = effect_sizes(usual, now[1].counts)
            notes += [f"JS {sizes['js']:.2f} · KS {sizes['ks']:.2f}"]
        elif name == "output":
            notes += ["which answers it gives"]
        elif name == "score":
            notes += ["how certain it is"]
        elif name == "joint":
            notes += ["fields together"]
        elif name.startswith(OUTPUT_PREFIX):
            notes += ["a further output"]
        statistics = _STATISTICS if name in scale.bounds or now is not None else ("mean",)
        limit = limits.get(name) or _reported_limit(timeline, name)
        rows.append(
            PlotRow(
                name=name,
                unit=scale.units.get(name, ""),
                state=state,
                notes=notes,
                bounds=_bin_bounds(scale, name, shown),
                reference=usual.tolist() if usual is not None else None,
                histograms=shown,
                curves=[
                    _build_curve(timeline, name, attrgetter(statistic), 0, dashed=statistic == "spread")
                    for statistic in statistics
                ],
                limit=limit,
                intervals=[StateInterval("insufficient", *spell) for spell in timeline.spells(name, "insufficient")]
                + _build_spells(timeline, name),
            )
        )
    if any(share for _, share in timeline.nearest):
        rows.append(_nearest_row(timeline, [row.state for row in rows]))
    estimate = _build_estimate(timeline, 0)
    return rows, [] if estimate is None else [estimate]


def _nearest_row(timeline: Timeline, states: Sequence[str]) -> PlotRow:
    """Return how near any test came to its limit in each window, where fields show the last window of a run."""
    times, shares = zip(*timeline.nearest, strict=True)
    return PlotRow(
        name=NEAREST,
        unit="",
        state=next((state for state in STATES_BY_SEVERITY if state in states), "ok"),
        notes=["nearest to its limit"],
        bounds=None,
        reference=None,
        histograms=[],
        curves=[EvidenceCurve(0, times, shares)],
        limit=1.0,
        intervals=[],
    )


def plot_devices(
    timelines: Mapping[str, Timeline],
    scale: FieldScale,
    fleet_counts: Mapping[str, Ints],
    device_counts: Mapping[str, Mapping[str, Ints]],
    describe_field: Callable[[str], tuple[str, list[str]]],
) -> tuple[list[PlotRow], list[PerformanceEstimate]]:
    """Return the rows and estimates of several devices; `describe_field` gives a field's state and notes."""
    rows = []
    for name, usual in fleet_counts.items():
        state, notes = describe_field(name)
        parts = [
            (i, device_counts[d][name].tolist()) for i, d in enumerate(timelines) if name in device_counts.get(d, {})
        ]
        rows.append(
            PlotRow(
                name=name,
                unit=scale.units.get(name, ""),
                state=state,
                notes=notes,
                bounds=_bin_bounds(scale, name, [(0, usual.tolist())]),
                reference=usual.tolist(),
                histograms=parts,
                curves=[_build_curve(line, name, _max_statistic, i) for i, line in enumerate(timelines.values())],
                limit=max(
                    (x for line in timelines.values() if (x := _reported_limit(line, name)) is not None), default=None
                ),
                intervals=[
                    spell for i, line in enumerate(timelines.values()) for spell in _build_spells(line, name, i)
                ],
            )
        )
    estimates = (_build_estimate(line, i) for i, line in enumerate(timelines.values()))
    return rows, [estimate for estimate in estimates if estimate is not None]


def _list_subjects(timeline: Timeline) -> list[str]:
    fields = list(timeline.histograms)
    known = {name for point in timeline.points for name in point.subjects}
    fields += sorted(known - set(fields) - set(_NON_FIELD_SUBJECTS))
    # Answers have no curve to draw: they get a row only if they drifted.
    others = [n for n in _NON_FIELD_SUBJECTS if n in known and (n != "output" or any(timeline.spells(n, "drift")))]
    return fields + others


def _bin_bounds(scale: FieldScale, name: str, shown: Sequence[tuple[int, Sequence[int]]]) -> Sequence[float] | None:
    bounds = scale.bounds.get(name)
    return bounds if bounds is not None and all(len(counts) == len(bounds) + 1 for _, counts in shown) else None


def _build_curve(
    timeline: Timeline, name: str, value: Callable[[SubjectReport], float], series: int, *, dashed: bool = False
) -> EvidenceCurve:
    reports = [(p.t[1], p.subjects.get(name)) for p in timeline.points]
    # While the reference is learned there is no CUSUM.
    values = [None if s is None or s.state == "insufficient" else value(s) for _, s in reports]
    return EvidenceCurve(series, [t for t, _ in reports], values, dashed)


def _max_statistic(subject: SubjectReport) -> float:
    return max(subject.mean, subject.spread)


def _build_spells(timeline: Timeline, name: str, series: int = 0) -> list[StateInterval]:
    return [StateInterval(s, *spell, series) for s in ("drift", "fault") for spell in timeline.spells(name, s)]


def _reported_limit(timeline: Timeline, name: str) -> float | None:
    """Return the limit in the newest message that has one."""
    limits = (p.subjects[name].limit for p in reversed(timeline.points) if name in p.subjects)
    return next((limit for limit in limits if limit is not None), None)


def _build_estimate(timeline: Timeline, series: int) -> PerformanceEstimate | None:
    known = [point.expected for point in timeline.points if point.expected is not None]
    if not known:
        return None
    is_error = known[-1].is_error
    times = [point.t[1] for point in timeline.points]
    estimates = [e if e is None or e.is_error == is_error else None for e in (p.expected for p in timeline.points)]
    values, low, high = (
        [None if e is None else getattr(e, name) for e in estimates] for name in ("value", "low", "high")
    )
    return PerformanceEstimate(series, times, values, low, high, is_error)
