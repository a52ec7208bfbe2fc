"""Point-in-time joins: the values of further model inputs at the time of each window.

A window whose last row is of time T gets rows up to T only. Of a stream whose clock stepped back the last row up to T
counts, wherever it stands. The same rows give the same bits, whole or in pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float32s, Ints
from outstation.foundation.errors import BadBundle
from outstation.ml.model.bundle.manifest import JoinedInput


class JoinedRows(msgspec.Struct, frozen=True, eq=False):
    """Rows of the fields of a joined input: `values` (m, F) in physical units, NaN missing; `t` (m,) epoch µs."""

    values: Float32s
    t: Ints


class JoinedValues(msgspec.Struct, frozen=True, eq=False):
    """Scaled values (w, V) of all joined inputs for w windows; `missing` (w,) counts those that are missing."""

    values: Float32s
    missing: Ints

    def __getitem__(self, selection: slice | Ints) -> JoinedValues:
        return JoinedValues(self.values[selection], self.missing[selection])


def join(inputs: Mapping[str, JoinedInput], rows: Mapping[str, JoinedRows], ends_us: Ints) -> JoinedValues | None:
    """Return the joined inputs at the times `ends_us` (w,) of windows' last rows; None without such inputs."""
    if not inputs:
        return None
    parts, missing = [], np.zeros(len(ends_us), np.int64)
    for name, spec in inputs.items():
        if name not in rows:
            raise BadBundle(f"the model's input {name!r} has no data; give rows of its fields {', '.join(spec.fields)}")
        taken = take_rows(spec, rows[name], ends_us)
        missing += np.count_nonzero(~np.isfinite(taken), axis=1)
        parts.append(_scale(spec, taken))
    return JoinedValues(np.concatenate(parts, axis=1), missing)


def concatenate(parts: Sequence[JoinedValues | None]) -> JoinedValues | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return JoinedValues(
        np.concatenate([part.values for part in known]), np.concatenate([part.missing for part in known])
    )


def take_rows(spec: JoinedInput, rows: JoinedRows, ends_us: Ints) -> Float32s:
    """Return the values (w, rows · F) of one joined input in physical units; NaN where they are missing."""
    has_value = find_valued(rows.values)
    values, t = rows.values[has_value], rows.t[has_value]
    index, is_known = _select_rows(spec, t, ends_us)
    taken = np.full((len(ends_us), spec.rows, len(spec.fields)), np.nan, np.float32)
    taken[is_known] = values[index[is_known]]
    return taken.reshape(len(ends_us), spec.size)


def find_valued(values: Float32s) -> Bools:
    """Return which rows (m, F) have a value: others do not count."""
    return np.asarray(np.isfinite(values).any(axis=1))


def find_used_range(spec: JoinedInput, t: Ints, ends_us: Ints) -> tuple[int, int] | None:
    """Return the range of the rows with a value at `t` (m,) that windows take; None if they take none.

    A join over the rows of this range gives the same values as one over all rows.
    """
    index, is_known = _select_rows(spec, t, ends_us)
    if not is_known.any():
        return None
    # The newest row up to any window's time ends the range, even one that is too old itself: others are counted from
    # it. Where the clock stepped back, an earlier row in its place may be recent enough for a window that takes none.
    return int(index[is_known].min()), int(index[:, -1].max())


def select_taken(spec: JoinedInput, t: Ints, ends_us: Ints, *, is_whole: bool) -> Ints | None:
    """Return the indices of the rows with a value at `t` (m,) that windows that end at `ends_us` (w,) take.

    A join over these rows alone gives the same values. None if `t` does not reach back far enough to know all of them;
    `is_whole`: no rows came before these.
    """
    index = _index_rows(spec, t, ends_us)
    # All rows before one that is too old for every window are too old themselves.
    reaches_back = is_whole or (bool(len(t)) and int(t[0]) < int(ends_us.min()) - round(spec.max_age_s * 1e6))
    return np.unique(index[index >= 0]) if reaches_back or (index >= 0).all() else None


def first_needed(spec: JoinedInput, t: Ints, end_us: int) -> int:
    """Return how many of the rows with a value at `t` (m,) no window that ends at `end_us` or later needs."""
    is_recent = t >= end_us - round(spec.max_age_s * 1e6)
    by_age = int(np.argmax(is_recent)) if is_recent.any() else len(t)
    return max(by_age, int(_index_rows(spec, t, np.array([end_us], np.int64))[0, 0]))


def select_needed(spec: JoinedInput, t: Ints, ends_us: Ints) -> Ints:
    """Return the indices of rows with a value at `t` (m,) that windows that end at `ends_us` (w,) need, or may need."""
    earliest_us = int(ends_us.min())
    first = first_needed(spec, t, earliest_us)
    if spec.period_s is None:
        return np.arange(first, len(t))
    # Up to the earliest end, only the rows at each period count. Later rows may still be followed by earlier ones.
    place = max(first, int(_last_up_to(t, np.array([earliest_us]))[0]))
    periodic = np.unique(_index_rows(spec, t, ends_us))
    return np.concatenate([periodic[(periodic >= first) & (periodic < place)], np.arange(place, len(t))])


def _select_rows(spec: JoinedInput, t: Ints, ends_us: Ints) -> tuple[Ints, Bools]:
    """Return the index (w, rows) of each row that windows take, and which of them are not too old or missing."""
    index = _index_rows(spec, t, ends_us)
    safe = np.maximum(index, 0)
    # A row after one that is older or newer may itself be of another time, where the clock stepped back.
    elapsed = ends_us[:, None] - (t[safe] if len(t) else np.zeros_like(safe))
    return index, np.asarray((index >= 0) & (elapsed >= 0) & (elapsed <= spec.max_age_s * 1e6))


def _index_rows(spec: JoinedInput, t: Ints, ends_us: Ints) -> Ints:
    """Return the index (w, rows) of each row, with a value at `t` (m,), that windows take; below 0 for none."""
    place = _last_up_to(t, ends_us)[:, None]
    age = np.arange(spec.rows - 1, -1, -1)
    if spec.period_s is None:
        return place - age
    at = ends_us[:, None] - np.rint(age * (spec.period_s * 1e6)).astype(np.int64)
    return np.minimum(_last_up_to(t, at.reshape(-1)).reshape(at.shape), place)


def _last_up_to(t: Ints, times: Ints) -> Ints:
    """Return the index of the last row with a time up to each of `times`; -1 if there is none."""
    # The earliest time from each row on ascends, also where the clock stepped back.
    ascending = np.minimum.accumulate(t[::-1])[::-1]
    return np.searchsorted(ascending, times, side="right") - 1


def _scale(spec: JoinedInput, values: Float32s) -> Float32s:
    mean = np.tile(np.asarray(spec.mean or [0.0] * len(spec.fields), np.float32), spec.rows)
    std = np.tile(np.asarray(spec.std or [1.0] * len(spec.fields), np.float32), spec.rows)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (values - mean) / std
    filled: Float32s = np.nan_to_num(scaled, copy=False, nan=0.0, posinf=0.0, neginf=0.0).astype(np.float32, copy=False)
    return filled
