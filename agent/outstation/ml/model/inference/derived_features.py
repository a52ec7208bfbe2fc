"""Derived features, definition 1: computed from a field over the last rows of a stream, or from the time.

- mean, std: of the last N rows including the current one; missing if fewer than half of them are present
- lag, difference: the value N rows ago; the current value less that
- last: the newest value present in the last N rows
- band: mean square of the signal between two frequencies, in the last N rows less their mean, under a Hann window
  (Harris 1978); missing rows count as the mean
- hour, weekday: sine and cosine of the time of day and of the day of the week

No history spans a gap or a step back in time. Each value depends on its own rows only, and sums run row by row in one
order: pieces of a stream, each with the history it needs, give the same bits as the whole.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.ml.model.bundle.feature_set import DerivedFeature
from outstation.ml.model.bundle.manifest import ModelInput

_DAY_US, _HOUR_US = 86_400_000_000, 3_600_000_000
# 1970-01-01 was a Thursday; weeks begin on Monday.
_MONDAY_OFFSET_US = 3 * _DAY_US
_MAX_SPECTRUM_VALUES = 1_000_000


def compute(features: Float32s, t: Ints, spec: ModelInput, history_rows: int = 0) -> Float32s:
    """Compute features (n - history_rows, C) from rows (n, F) in physical units at `t` (n,) epoch µs."""
    current = features[history_rows:]
    if not spec.derived and not spec.feature_order:
        return current
    columns = {name: current[:, i] for i, name in enumerate(spec.fields)}
    age = count_rows_since_gap(t, spec.gap_s)
    for feature in spec.used_features:
        if feature.is_time_based:
            columns |= zip(feature.columns, _encode_cyclic(t[history_rows:], feature), strict=True)
        else:
            field = features[:, spec.fields.index(feature.field)]
            history = _History(field, age, history_rows, feature.history_rows)
            with np.errstate(over="ignore", invalid="ignore"):
                columns[feature.name] = _FUNCTIONS[feature.function](history, feature).astype(np.float32)
    return np.stack([columns[name] for name in spec.columns], axis=1)


def count_rows_since_gap(t: Ints, gap_s: float | None) -> Ints:
    """Return the number of rows since the last gap, step back in time, or start."""
    rows = np.arange(len(t), dtype=np.int64)
    steps = np.diff(t)
    broken = steps < 0
    if gap_s is not None:
        broken |= steps > gap_s * 1e6
    begins = np.zeros(len(t), np.int64)
    begins[1:][broken] = rows[1:][broken]
    return rows - np.maximum.accumulate(begins)


class _History:
    """Earlier values of a field for each row; NaN where unknown."""

    def __init__(self, field: Float32s, age: Ints, before: int, history: int) -> None:
        values = field.astype(np.float64)
        values[~np.isfinite(values)] = np.nan
        self.padded: Float64s = np.concatenate([np.full(history, np.nan), values])
        self.offset = history + before
        self.age = age[before:]

    def lagged(self, lag: int) -> Float64s:
        then = self.padded[self.offset - lag : self.offset - lag + len(self.age)]
        return np.where(self.age >= lag, then, np.nan)


def _rolling_mean(history: _History, rows: int) -> tuple[Float64s, Ints]:
    total, count = np.zeros(len(history.age)), np.zeros(len(history.age), np.int64)
    for lag in range(rows):
        value = history.lagged(lag)
        there = ~np.isnan(value)
        total += np.where(there, value, 0.0)
        count += there
    enough = count >= max(1, (rows + 1) // 2)
    return np.where(enough, total / np.maximum(count, 1), np.nan), count


def _std(history: _History, feature: DerivedFeature) -> Float64s:
    mean, count = _rolling_mean(history, feature.rows)
    total = np.zeros(len(mean))
    for lag in range(feature.rows):
        off = history.lagged(lag) - mean
        total += np.where(np.isnan(off), 0.0, off * off)
    return np.where(np.isnan(mean) | (count < 2), np.nan, np.sqrt(total / np.maximum(count - 1, 1)))


def _last(history: _History, feature: DerivedFeature) -> Float64s:
    newest = history.lagged(0)
    for lag in range(1, feature.rows):
        newest = np.where(np.isnan(newest), history.lagged(lag), newest)
    return newest


def _band(history: _History, feature: DerivedFeature) -> Float64s:
    rows, (low, high) = feature.rows, feature.band or (0.0, 0.0)
    mean, _ = _rolling_mean(history, rows)
    out = np.full(len(mean), np.nan)
    if not len(mean):
        return out
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(rows, dtype=np.float64) / rows)
    frequency = np.fft.rfftfreq(rows, 1 / feature.rate)
    inside = (frequency >= low) & ((frequency < high) | ((frequency == high) & (high >= feature.rate / 2)))
    weight = np.where((frequency == 0) | (frequency >= feature.rate / 2), 1.0, 2.0)[inside]
    recent = history.padded[history.offset - rows + 1 : history.offset + len(mean)]
    spans = np.lib.stride_tricks.sliding_window_view(recent, rows)
    lags = np.arange(rows)[::-1]
    block = max(1, _MAX_SPECTRUM_VALUES // rows)
    for start in range(0, len(mean), block):
        part = slice(start, start + block)
        centred = spans[part] - mean[part, None]
        centred[(lags > history.age[part, None]) | np.isnan(centred)] = 0.0
        power = np.square(np.abs(np.fft.rfft(centred * hann, axis=1)[:, inside])) * weight
        out[part] = power.sum(axis=1) / (rows * np.square(hann).sum())
    return np.where(np.isnan(mean), np.nan, out)


def _encode_cyclic(t: Ints, feature: DerivedFeature) -> tuple[Float32s, Float32s]:
    period_us = _DAY_US if feature.function == "hour" else 7 * _DAY_US
    local = t + round(feature.offset_h * _HOUR_US) + (_MONDAY_OFFSET_US if feature.function == "weekday" else 0)
    angle = (local % period_us) * (2 * np.pi / period_us)
    return np.sin(angle).astype(np.float32), np.cos(angle).astype(np.float32)


_FUNCTIONS: dict[str, Callable[[_History, DerivedFeature], Float64s]] = {
    "mean": lambda history, feature: _rolling_mean(history, feature.rows)[0],
    "std": _std,
    "lag": lambda history, feature: history.lagged(feature.rows),
    "difference": lambda history, feature: history.lagged(0) - history.lagged(feature.rows),
    "last": _last,
    "band": _band,
}
