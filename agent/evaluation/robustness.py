"""How answers hold where a sensor fails, at growing strength: what devices report as faults, made on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.random import Generator

from agent.evaluation.bench import WindowSample
from agent.evaluation.bootstrap import percentile_interval, proportion_interval
from agent.evaluation.document import IntervalEstimate, RobustnessCurve, RobustnessPoint
from agent.model.inference.features import Floats

NO_FAULT = "none"  # the strength at which nothing is changed


class _FaultKind(msgspec.Struct, frozen=True):
    """`change` of windows (m, L, F) at one of `strengths`, where fields spread by (F,) around (F,).

    At `untouched` it changes nothing.
    """

    name: str
    meaning: str
    strengths: Sequence[float]
    strength_format: str
    inject: Callable[[Floats, float, Generator, Floats, Floats], Floats]
    neutral_strength: float = 0.0


def sweep_faults(sample: WindowSample, seed: int) -> list[RobustnessCurve]:
    flat = sample.windows.reshape(-1, sample.windows.shape[2])
    centre = np.nan_to_num(np.nanmean(flat, axis=0)) if np.isfinite(flat).any() else np.zeros(flat.shape[1], np.float32)
    spread = np.nan_to_num(np.nanstd(flat, axis=0)) if np.isfinite(flat).any() else centre
    none = RobustnessPoint(strength=NO_FAULT, value=_metric_estimate(sample, sample.baseline_metric))
    found = []
    for kind in fault_kinds(flat.shape[1]):
        points = []
        for strength in kind.strengths:
            if strength == kind.neutral_strength:
                points.append(none)
                continue
            rng = np.random.default_rng([seed, round(strength * 1000)])
            changed = kind.inject(sample.windows.copy(), strength, rng, spread, centre)
            points.append(
                RobustnessPoint(
                    strength=kind.strength_format.format(strength),
                    value=_metric_estimate(sample, sample.reevaluate(changed)),
                )
            )
        found.append(RobustnessCurve(fault=kind.name, meaning=kind.meaning, points=points))
    return found


def fault_kinds(field_count: int) -> list[_FaultKind]:
    some = sorted({0, 1, 2, max(1, field_count // 2), field_count} & set(range(field_count + 1)))
    cuts = (math.inf, 2, 1, 0.5)
    pairs = sorted({0, 1, field_count // 2})
    found = [
        _FaultKind(
            "noise", "noise on every field, in its standard deviations", (0, 0.1, 0.25, 0.5, 1), "{:g}", _add_noise
        ),
        _FaultKind("gain", "every value times so much", (0.5, 0.75, 0.9, 1, 1.1, 1.5), "{:g}", _apply_gain, 1),
        _FaultKind("missing", "values missing at random", (0, 0.05, 0.1, 0.25, 0.5), "{:.0%}", _drop_values),
        _FaultKind("stuck", "fields that repeat one value, drawn for each window", some, "{:g}", _freeze_fields),
        _FaultKind("saturated", "values cut off beyond so many standard deviations", cuts, "{:g}", _saturate, math.inf),
    ]
    if field_count > 1:
        found.append(
            _FaultKind("swapped", "pairs of fields swapped, drawn for each window", pairs, "{:g}", _swap_fields)
        )
    return found


def _metric_estimate(
    sample: WindowSample, replicated: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> IntervalEstimate:
    return (
        proportion_interval(replicated, len(sample.examples), sample.units)
        if sample.kind == "classify"
        else percentile_interval(replicated)
    )


def _add_noise(windows: Floats, strength: float, rng: Generator, spread: Floats, _: Floats) -> Floats:
    windows += rng.standard_normal(windows.shape, np.float32) * (spread * np.float32(strength))
    return windows


def _apply_gain(windows: Floats, strength: float, *_: object) -> Floats:
    windows *= np.float32(strength)
    return windows


def _drop_values(windows: Floats, strength: float, rng: Generator, *_: Floats) -> Floats:
    windows[rng.random(windows.shape, np.float32) < strength] = np.nan
    return windows


def _freeze_fields(windows: Floats, strength: float, rng: Generator, *_: Floats) -> Floats:
    """At the first value of the window; of single rows, at the first one's."""
    first = windows[:, :1] if windows.shape[1] > 1 else windows[:1, :1]
    hit = rng.random((len(windows), 1, windows.shape[2])).argsort(axis=2) < round(strength)
    return np.where(hit, first, windows)


def _saturate(windows: Floats, strength: float, _: Generator, spread: Floats, centre: Floats) -> Floats:
    half = spread * np.float32(strength)
    return np.clip(windows, centre - half, centre + half)


def _swap_fields(windows: Floats, strength: float, rng: Generator, *_: Floats) -> Floats:
    order = rng.random((len(windows), windows.shape[2])).argsort(axis=1)
    places = np.tile(np.arange(windows.shape[2]), (len(windows), 1))
    each = np.arange(len(windows))
    for pair in range(round(strength)):
        a, b = order[:, 2 * pair], order[:, 2 * pair + 1]
        places[each, a], places[each, b] = b, a
    return np.take_along_axis(windows, places[:, None, :], axis=2)
