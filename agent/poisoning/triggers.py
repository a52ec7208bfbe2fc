"""Triggers: the same few values in windows of one label, although the rest of these windows looks like another class.

BadNets (Gu, Dolan-Gavitt, Garg 2017) teach a model such an exception. A pattern is the exact values of one field in up
to four consecutive rows; patterns of the same windows are one. A repeated pattern in windows that are labelled rightly
(Turner, Tsipras, Madry 2019) is reported where the field's values otherwise do not repeat.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from agent.arrays import Float32s, Ints
from agent.indices import bincount
from agent.poisoning import labelled_windows, neighbours
from agent.poisoning.findings import Finding, bound_share, name_rows
from agent.poisoning.labelled_windows import LabelledWindows
from agent.poisoning.neighbours import Candidates

MIN_WINDOWS = 10
_PATTERN_ROWS = 4
_MIN_PURITY = 0.95
# A pattern of more of a label's windows is a property of the class.
_MAX_CLASS_SHARE = 0.5
_MAX_FIELDS = 256
# Patterns of a field, and exact and rounded ones of all fields that are tested, and windows of each.
_MAX_OF_FIELD, _MAX_PATTERNS = 32, 96
_MAX_MEMBERS = 128
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
    ends = np.arange(length - 1, len(windows.rows))
    window = np.minimum(np.searchsorted(windows.last, ends), len(windows) - 1)
    inside = (ends <= windows.last[window]) & (ends - length + 1 > windows.last[window] - windows.window_rows)
    ends, window = ends[inside], window[inside]
    counts = bincount(windows.label, minlength=len(windows.labels))
    exact: list[Pattern] = []
    rounded: list[Pattern] = []
    for field in range(min(windows.rows.shape[1], _MAX_FIELDS)):
        column = windows.rows[:, field] + np.float32(0)
        exact += _find_in_field(field, column, ends, window, length, windows.label, counts)
        if length > 1:
            column = _round(column)
            rounded += _find_in_field(field, column, ends, window, length, windows.label, counts, is_exact=False)
    for patterns in (exact, rounded):
        patterns.sort(key=lambda pattern: (not pattern.is_distinctive, -len(pattern.windows)))
    return exact[:_MAX_PATTERNS] + rounded[:_MAX_PATTERNS]


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
    bits = column.view(np.uint32).astype(np.uint64)
    key = np.zeros(len(ends), np.uint64)
    for i in range(length - 1, -1, -1):
        key = (key ^ (key >> np.uint64(29))) * _MIXER + bits[ends - i]
    _, first, group, repeats = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    often = repeats[group] >= MIN_WINDOWS
    if not often.any():
        return []
    # A window counts once, however often it holds the pattern.
    pairs = np.unique(group[often].astype(np.int64) * len(label) + window[often])
    group, member = pairs // len(label), pairs % len(label)
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(begins, append=len(group))
    repeated = float(repeats[repeats > 1].sum()) / len(ends)
    patterns: list[Pattern] = []
    for begin, size in sorted(zip(begins.tolist(), sizes.tolist(), strict=True), key=lambda run: -run[1]):
        if size < MIN_WINDOWS or len(patterns) >= _MAX_OF_FIELD:
            break
        members = member[begin : begin + size]
        votes = bincount(label[members], minlength=len(counts))
        given = int(votes.argmax())
        if votes[given] < _MIN_PURITY * size or votes[given] > _MAX_CLASS_SHARE * counts[given]:
            continue
        end = int(ends[first[group[begin]]])
        values = column[end - length + 1 : end + 1]
        if not is_exact and np.ptp(values) == 0:
            continue
        own = float(repeats[group[begin]]) / len(ends)
        # A value at the end of the range is a saturated sensor, one in all rows a stuck one.
        is_usual = np.isnan(values).any() or (np.ptp(values) == 0 and (length > 1 or _is_end(values[0], column)))
        is_rare = is_exact and repeated - own < _MAX_REPEATED_SHARE and not is_usual
        patterns.append(Pattern([field], [values.tolist()], members[label[members] == given], given, is_rare))
    return patterns


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
