"""Labelled windows: what the checks of training data read, as arrays, and their position in feature space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Ints

MAX_WINDOWS = 100_000
MAX_CLASSES = 64
_MAX_DIMENSIONS = 64
_MAX_SUMMARY_VALUES = 1 << 24
_PART_VALUES = 1 << 22
_MAX_DEVIATION = 5.0


class LabelledWindows(msgspec.Struct, frozen=True, eq=False):
    """Windows with a known class: `rows` (n, F); `last` (w,) their last rows; `label` (w,) index into `labels`.

    A window has `window_rows` rows. `names` (w,) are what a reader finds a window by. `providers` has for each kind
    (device, labeller) the name of each window's, (w,).
    """

    rows: Float32s
    last: Ints
    window_rows: int
    fields: Sequence[str]
    label: Ints
    labels: Sequence[str]
    names: Sequence[Any]
    providers: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self.last)

    def thin(self) -> LabelledWindows:
        """Return at most MAX_WINDOWS windows, fewer of many fields, spread evenly over the set."""
        limit = min(MAX_WINDOWS, _MAX_SUMMARY_VALUES // self.dimensions)
        if len(self) <= limit:
            return self
        return self.select(np.linspace(0, len(self) - 1, limit).astype(np.int64))

    def select(self, chosen: Ints) -> LabelledWindows:
        """Return the windows with these indices."""
        return msgspec.structs.replace(
            self,
            last=self.last[chosen],
            label=self.label[chosen],
            names=[self.names[i] for i in chosen.tolist()],
            providers={kind: values[chosen] for kind, values in self.providers.items()},
        )

    @property
    def dimensions(self) -> int:
        return int(self.rows.shape[1]) * (1 if self.window_rows == 1 else 5)

    def summarize(self) -> Float32s:
        """Return (w, D) standardized features: of each field the value, or its shape within the window.

        The shape is mean, deviation, mean step, minimum and maximum: column d is about field d modulo F.
        """
        size = max(1, _PART_VALUES // (self.window_rows * self.rows.shape[1]))
        parts = np.split(np.arange(len(self)), range(size, len(self), size))
        summary = np.concatenate([self._summarize_part(part) for part in parts])
        for column in summary.T:
            _standardize(column)
        return summary

    def values(self, windows: Ints) -> Float32s:
        """Return (len(windows), window_rows, F)."""
        return np.asarray(self.rows[self.last[windows, None] - np.arange(self.window_rows - 1, -1, -1)])

    def _summarize_part(self, part: Ints) -> Float32s:
        values = self.values(part)
        if self.window_rows == 1:
            return values[:, 0]
        with np.errstate(all="ignore"):
            step = np.abs(np.diff(values, axis=1)).mean(axis=1)
            shape = (values.mean(axis=1), values.std(axis=1), step, values.min(axis=1), values.max(axis=1))
            return np.concatenate(shape, axis=1).astype(np.float32)


def canonicalize(values: Float32s) -> Float32s:
    """Return values whose bits can be compared: one zero, and one NaN for all that is no number, infinity included."""
    return np.where(np.isfinite(values), values + np.float32(0), np.float32(np.nan))


def _standardize(column: Float32s) -> None:
    """Scale a column by median and quartiles in place; missing values lie in the middle."""
    known = column[np.isfinite(column)].astype(np.float64)
    if len(known):
        first, middle, third = np.quantile(known, (0.25, 0.5, 0.75))
        scale = (third - first) / 1.349 or known.std() or 1.0
        with np.errstate(all="ignore"):
            column -= np.float32(middle)
            column /= np.float32(scale)
    np.clip(np.nan_to_num(column, copy=False), -_MAX_DEVIATION, _MAX_DEVIATION, out=column)


def project(summary: Float32s) -> Float32s:
    """Return at most 64 random projections of features, which keep distances (Johnson and Lindenstrauss 1984)."""
    if summary.shape[1] <= _MAX_DIMENSIONS:
        return summary
    draw = np.random.default_rng(0).standard_normal((summary.shape[1], _MAX_DIMENSIONS)).astype(np.float32)
    return np.asarray(summary @ draw)
