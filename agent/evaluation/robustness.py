"""How answers hold where a sensor fails, at growing strength: what devices report as faults, made on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.random import Generator

from agent.evaluation.bench import Bench
from agent.evaluation.bootstrap import share, span
from agent.evaluation.document import Fault, Point, Span
from agent.model.inference.features import Floats

NONE = "none"  # the strength at which nothing is changed


class _Kind(msgspec.Struct, frozen=True):
    """`change` of windows (m, L, F) at one of `strengths`, where fields spread by (F,) around (F,).

    At `untouched` it changes nothing.
    """

    name: str
    meaning: str
    strengths: Sequence[float]
    told: str
    change: Callable[[Floats, float, Generator, Floats, Floats], Floats]
    untouched: float = 0.0


def measure(bench: Bench, seed: int) -> list[Fault]:
    flat = bench.windows.reshape(-1, bench.windows.shape[2])
    centre = np.nan_to_num(np.nanmean(flat, axis=0)) if np.isfinite(flat).any() else np.zeros(flat.shape[1], np.float32)
    spread = np.nan_to_num(np.nanstd(flat, axis=0)) if np.isfinite(flat).any() else centre
    none = Point(strength=NONE, value=_value(bench, bench.figures))
    found = []
    for kind in kinds(flat.shape[1]):
        points = []
        for strength in kind.strengths:
            if strength == kind.untouched:
                points.append(none)
                continue
            rng = np.random.default_rng([seed, round(strength * 1000)])
            changed = kind.change(bench.windows.copy(), strength, rng, spread, centre)
            points.append(Point(strength=kind.told.format(strength), value=_value(bench, bench.again(changed))))
        found.append(Fault(fault=kind.name, meaning=kind.meaning, points=points))
    return found


def kinds(fields: int) -> list[_Kind]:
    some = sorted({0, 1, 2, max(1, fields // 2), fields} & set(range(fields + 1)))
    cuts = (math.inf, 2, 1, 0.5)
    pairs = sorted({0, 1, fields // 2})
    found = [
        _Kind("noise", "noise on every field, in its standard deviations", (0, 0.1, 0.25, 0.5, 1), "{:g}", _noise),
        _Kind("gain", "every value times so much", (0.5, 0.75, 0.9, 1, 1.1, 1.5), "{:g}", _gain, 1),
        _Kind("missing", "values missing at random", (0, 0.05, 0.1, 0.25, 0.5), "{:.0%}", _missing),
        _Kind("stuck", "fields that repeat one value, drawn for each window", some, "{:g}", _stuck),
        _Kind("saturated", "values cut off beyond so many standard deviations", cuts, "{:g}", _saturated, math.inf),
    ]
    if fields > 1:
        found.append(_Kind("swapped", "pairs of fields swapped, drawn for each window", pairs, "{:g}", _swapped))
    return found


def _value(bench: Bench, figures: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Span:
    return share(figures, len(bench.examples), bench.units) if bench.kind == "classify" else span(figures)


def _noise(windows: Floats, strength: float, rng: Generator, spread: Floats, _: Floats) -> Floats:
    windows += rng.standard_normal(windows.shape, np.float32) * (spread * np.float32(strength))
    return windows


def _gain(windows: Floats, strength: float, *_: object) -> Floats:
    windows *= np.float32(strength)
    return windows


def _missing(windows: Floats, strength: float, rng: Generator, *_: Floats) -> Floats:
    windows[rng.random(windows.shape, np.float32) < strength] = np.nan
    return windows


def _stuck(windows: Floats, strength: float, rng: Generator, *_: Floats) -> Floats:
    """At the first value of the window; of single rows, at the first one's."""
    first = windows[:, :1] if windows.shape[1] > 1 else windows[:1, :1]
    hit = rng.random((len(windows), 1, windows.shape[2])).argsort(axis=2) < round(strength)
    return np.where(hit, first, windows)


def _saturated(windows: Floats, strength: float, _: Generator, spread: Floats, centre: Floats) -> Floats:
    half = spread * np.float32(strength)
    return np.clip(windows, centre - half, centre + half)


def _swapped(windows: Floats, strength: float, rng: Generator, *_: Floats) -> Floats:
    order = rng.random((len(windows), windows.shape[2])).argsort(axis=1)
    places = np.tile(np.arange(windows.shape[2]), (len(windows), 1))
    each = np.arange(len(windows))
    for pair in range(round(strength)):
        a, b = order[:, 2 * pair], order[:, 2 * pair + 1]
        places[each, a], places[each, b] = b, a
    return np.take_along_axis(windows, places[:, None, :], axis=2)
