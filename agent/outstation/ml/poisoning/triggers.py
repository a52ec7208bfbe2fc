"""Triggers: the same few values in windows of one label, although the rest of these windows looks like another class.

BadNets (Gu, Dolan-Gavitt, Garg 2017) teach a model such an exception. A pattern is the exact values of one field in up
to four consecutive rows; patterns of the same windows are one. A repeated pattern in windows that are labelled rightly
(Turner, Tsipras, Madry 2019) is reported where the field's values otherwise do not repeat.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.indices import bincount, repeat
from outstation.ml.poisoning import labelled_windows, neighbours
from outstation.ml.poisoning.findings import Finding, bound_share, name_rows
from outstation.ml.poisoning.labelled_windows import LabelledWindows
from outstation.ml.poisoning.neighbours import Candidates

MIN_WINDOWS = 10
_PATTERN_ROWS = 4
_MIN_PURITY = 0.95
# A pattern of more of a label's windows is a property of the class.
_MAX_CLASS_SHARE = 0.5
_MAX_FIELDS = 256
# Patterns of a field, and exact and rounded ones of all fields that are tested, and windows of each.
_MAX_OF_FIELD, _MAX_PATTERNS = 32, 96
_MAX_MEMBERS = 128
# A search of as many values takes half a minute, and of as many rows half a gigabyte.
_MAX_VALUES, _MAX_ROWS = 1 << 27, 1 << 23
_MIN_OVERLAP = 0.8
_MIN_CONTRADICTED, _MIN_EXCESS = 0.5, 0.3
_MAX_DISTANCE = 2.0
_MAX_REPEATED_SHARE = 0.1
_ROUNDING = 0.05
_MIXER = np.uint64(0x9E3779B97F4A7C15)


class Pattern(msgspec.Struct, frozen=True, eq=False):
    """Values (k,) of fields in consecutive rows, and the windows (m,) of one `label` that hold them.

    `is_distinctive`: hardly any other value of the field repeats so.
    """

    fields: list[int]
    values: list[list[float]]
    windows: Ints
    label: int
    is_distinctive: bool


def find_triggers(windows: LabelledWindows, summary: Float32s, candidates: Candidates) -> Iterator[Finding]:
    """Yield a finding for each pattern that decides the label against, or beside, the rest of the window."""
    patterns = merge(find_patterns(windows))
    for pattern in patterns:
        contradicted, usual = _contradict(pattern, windows, summary, candidates)
        share, low, high = bound_share(contradicted, len(patterns))
        rows = name_rows(windows.names, pattern.windows)
        label, n = windows.labels[pattern.label], len(pattern.windows)
        subject = f"{describe(pattern, windows)} → {label}"
        if low >= _MIN_CONTRADICTED and low >= usual + _MIN_EXCESS:
            text = (
                f"{n} windows with this pattern are labelled {label}, but {share:.0%} ({low:.0%} to {high:.0%}) look "
                f"like another class without it, as do {usual:.0%} of other windows of {label}"
            )
            yield Finding("trigger", subject, text, n, share, low, high, rows)
        elif pattern.is_distinctive:
            text = (
                f"{n} windows, all labelled {label}, have exactly these values, in fields that do not repeat elsewhere"
            )
            yield Finding("repeated pattern", subject, text, n, share, low, high, rows)


def find_patterns(windows: LabelledWindows) -> list[Pattern]:
    """Return repeated patterns of one label, those of most windows first, and those of values with little noise."""
    length = min(_PATTERN_ROWS, windows.window_rows)
    chosen = _choose_searched(windows)
    ends, window = _list_ends(windows.last[chosen], windows.window_rows, length)
    window = chosen[window]
    counts = bincount(windows.label[chosen], minlength=len(windows.labels))
    exact: list[Pattern] = []
    rounded: list[Pattern] = []
    for field in range(min(windows.rows.shape[1], _MAX_FIELDS)):
        column = labelled_windows.canonicalize(windows.rows[:, field])
        exact += _find_in_field(field, column, ends, window, length, windows.label, counts)
        if length > 1:
            column = _round(column)
            rounded += _find_in_field(field, column, ends, window, length, windows.label, counts, is_exact=False)
    for patterns in (exact, rounded):
        patterns.sort(key=lambda pattern: (not pattern.is_distinctive, -len(pattern.windows)))
    return exact[:_MAX_PATTERNS] + rounded[:_MAX_PATTERNS]


def describe_omissions(windows: LabelledWindows) -> Iterator[str]:
    """Yield what is not searched for patterns."""
    searched, fields = len(_choose_searched(windows)), int(windows.rows.shape[1])
    if searched < len(windows):
        yield (
            f"patterns: {searched:,} of {len(windows):,} windows were searched, spread evenly; "
            f"a search takes at most {_MAX_VALUES:,} values and {_MAX_ROWS:,} rows"
        )
    if fields > _MAX_FIELDS:
        yield f"patterns: {_MAX_FIELDS} of {fields} fields were searched"


def _choose_searched(windows: LabelledWindows) -> Ints:
    """Return the windows (m,) that are searched: all, or as many as the bound allows, spread evenly."""
    rows = min(_MAX_ROWS, _MAX_VALUES // min(int(windows.rows.shape[1]), _MAX_FIELDS))
    count = max(1, min(len(windows), rows // windows.window_rows))
    return np.linspace(0, len(windows) - 1, count).astype(np.int64)


def _list_ends(last: Ints, window_rows: int, length: int) -> tuple[Ints, Ints]:
    """Return the last rows (e,) of all patterns in windows that end at `last` (w,), each once, and their windows."""
    ends = (last[:, None] - np.arange(window_rows - length, -1, -1)).ravel()
    window = repeat(np.arange(len(last)), window_rows - length + 1)
    # Windows that overlap share rows, which belong to the first of them.
    ends, first = np.unique(ends, return_index=True)
    return ends, window[first]


def _find_in_field(
    field: int,
    column: Float32s,
    ends: Ints,
    window: Ints,
    length: int,
    label: Ints,
    counts: Ints,
    *,
    is_exact: bool = True,
) -> list[Pattern]:
    bits = column.view(np.uint32)
    key = np.zeros(len(ends), np.uint64)
    for i in range(length - 1, -1, -1):
        key ^= key >> np.uint64(29)
        key *= _MIXER
        key += bits[ends - i]
    often, repeats, repeated = _find_frequent(key)
    if not len(often):
        return []
    group = np.minimum(np.searchsorted(often, key), len(often) - 1)
    places = np.flatnonzero(often[group] == key)
    group = group[places]
    first = np.empty(len(often), np.int64)
    first[group[::-1]] = places[::-1]
    # A window counts once, however often it holds the pattern.
    pairs = np.sort(group * len(label) + window[places])
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    group, member = pairs // len(label), pairs % len(label)
    votes = bincount(group * len(counts) + label[member], minlength=len(often) * len(counts))
    votes = votes.reshape(len(often), len(counts))
    sizes, most, given = votes.sum(axis=1), votes.max(axis=1), votes.argmax(axis=1)
    usable = (sizes >= MIN_WINDOWS) & (most >= _MIN_PURITY * sizes) & (most <= _MAX_CLASS_SHARE * counts[given])
    begins = np.cumsum(sizes) - sizes
    patterns: list[Pattern] = []
    for i in np.argsort(np.where(usable, -sizes, 0), kind="stable").tolist():
        if not usable[i] or len(patterns) == _MAX_OF_FIELD:
            break
        members = member[begins[i] : begins[i] + sizes[i]]
        end = int(ends[first[i]])
        values = column[end - length + 1 : end + 1]
        if not is_exact and np.ptp(values) == 0:
            continue
        own = float(repeats[i]) / len(ends)
        # A value at the end of the range is a saturated sensor, one in all rows a stuck one.
        is_usual = np.isnan(values).any() or (np.ptp(values) == 0 and (length > 1 or _is_end(values[0], column)))
        is_rare = is_exact and repeated - own < _MAX_REPEATED_SHARE and not is_usual
        patterns.append(
            Pattern([field], [values.tolist()], members[label[members] == given[i]], int(given[i]), is_rare)
        )
    return patterns


def _find_frequent(key: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], Ints, float]:
    """Return the keys that occur MIN_WINDOWS times or more, sorted, how often, and the share of keys that repeat."""
    ordered = np.sort(key)
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    repeats = np.diff(begins, append=len(ordered))
    is_often = repeats >= MIN_WINDOWS
    return ordered[begins[is_often]], repeats[is_often], float(repeats[repeats > 1].sum()) / len(key)


def _round(column: Float32s) -> Float32s:
    """Round to a twentieth of the usual deviation, so that a pattern with little noise repeats."""
    known = column[np.isfinite(column)]
    first, third = np.quantile(known, (0.25, 0.75)) if len(known) else (0.0, 0.0)
    step = np.float32((third - first) / 1.349 * _ROUNDING)
    return np.asarray(np.round(column / step) * step) if step > 0 else column


def _is_end(value: np.float32, column: Float32s) -> bool:
    return bool(value in (np.nanmin(column), np.nanmax(column), 0))


def merge(patterns: list[Pattern]) -> list[Pattern]:
    """Join patterns of mostly the same windows."""
    merged: list[Pattern] = []
    for pattern in patterns:
        for i, other in enumerate(merged):
            sizes = sorted((len(pattern.windows), len(other.windows)))
            if pattern.label != other.label or sizes[0] < _MIN_OVERLAP * sizes[1]:
                continue
            shared = len(np.intersect1d(pattern.windows, other.windows, assume_unique=True))
            if shared >= _MIN_OVERLAP * sizes[1]:
                is_new = not set(pattern.fields) <= set(other.fields)
                merged[i] = Pattern(
                    other.fields + pattern.fields if is_new else other.fields,
                    other.values + pattern.values if is_new else other.values,
                    other.windows,
                    other.label,
                    other.is_distinctive or pattern.is_distinctive,
                )
                break
        else:
            merged.append(pattern)
    return merged


def describe(pattern: Pattern, windows: LabelledWindows) -> str:
    parts = [
        f"{windows.fields[field]} = {', '.join(f'{value:.6g}' for value in values)}"
        for field, values in zip(pattern.fields[:4], pattern.values[:4], strict=True)
    ]
    more = len(pattern.fields) - len(parts)
    return " and ".join(parts) + (f" and {more} more fields" if more > 0 else "")


def _contradict(
    pattern: Pattern, windows: LabelledWindows, summary: Float32s, candidates: Candidates
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.bool_]], float]:
    """Return which windows with the pattern look like another class without its fields, and how many without it do."""
    chosen = pattern.windows[np.linspace(0, len(pattern.windows) - 1, min(_MAX_MEMBERS, len(pattern.windows)),
                                         dtype=np.int64)]  # fmt: skip
    without = ~np.isin(candidates.windows, pattern.windows)
    others, weight = candidates.windows[without], candidates.weight[without]
    control = others[windows.label[others] == pattern.label][:_MAX_MEMBERS]
    places = np.concatenate([chosen, control, others])
    features = summary[places]
    features[:, np.isin(np.arange(summary.shape[1]) % windows.rows.shape[1], pattern.fields)] = 0
    features = labelled_windows.project(features)
    queried = len(chosen) + len(control)
    nearest, distance = neighbours.find_nearest(
        features[:queried], features[queried:], places[:queried], places[queried:]
    )
    votes = np.zeros((len(others), len(windows.labels)), np.float32)
    votes[np.arange(len(others)), windows.label[others]] = weight
    shares = neighbours.normalize(neighbours.mean_of(votes, nearest))
    own = shares[:, pattern.label]
    contradicted = (shares.max(axis=1) >= 0.5) & (own <= 0.2)
    # Windows unlike all others say nothing of their class.
    usual = np.median(distance[len(chosen) :]) if len(control) else 0.0
    contradicted &= distance <= _MAX_DISTANCE * usual
    return contradicted[: len(chosen)], float(contradicted[len(chosen) :].mean()) if len(control) else 1.0
