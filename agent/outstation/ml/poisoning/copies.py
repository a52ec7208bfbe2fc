"""Copies: the same window, exactly, again and again, or from different devices, or under different labels.

A set whose windows repeat by nature (a quiet sensor, codes) has no finding: nearly all of its other windows must be
unique.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from outstation.foundation.arrays import Bools, Ints
from outstation.foundation.indices import bincount
from outstation.ml.poisoning import labelled_windows
from outstation.ml.poisoning.findings import Finding, name_rows
from outstation.ml.poisoning.labelled_windows import LabelledWindows

_MIN_COPIES = 10
_MIN_SHARE = 0.01
# Share of the other windows that may repeat.
_MAX_USUAL = 0.03
# Pairs of copies within one label or device: at most this part of what a random assignment gives, itself this many.
_MAX_WITHIN, _MIN_EXPECTED = 0.2, 5
_MIXER = np.uint64(0x9E3779B97F4A7C15)
_CHUNK_VALUES = 1 << 18


def find_copies(windows: LabelledWindows) -> Iterator[Finding]:
    """Yield a finding for windows that are copies of others."""
    group, is_constant = _group_equal(windows)
    repeats = bincount(group)[group]
    least = max(_MIN_COPIES, _MIN_SHARE * len(windows))
    repeated = (repeats > 1) & ~is_constant
    for noun, values in (("label", windows.label), ("device", windows.providers.get("device"))):
        if values is None:
            continue
        _, code = np.unique(values, return_inverse=True)
        differs = repeated & _differs_within(group, code.astype(np.int64))
        if differs.sum() >= least and _avoids_own(group[repeated], code[repeated]):
            yield _make_finding(windows, differs, f"of different {noun}s", group)
    many = repeated & (repeats >= _MIN_COPIES)
    others = int((~many & ~is_constant).sum())
    if many.any() and many.sum() <= others and (repeated & ~many).sum() <= _MAX_USUAL * others:
        yield _make_finding(windows, many, "repeated", group)


def _make_finding(windows: LabelledWindows, mask: Bools, relation: str, group: Ints) -> Finding:
    members = np.flatnonzero(mask)
    members = members[np.argsort(group[members], kind="stable")]
    share = len(members) / len(windows)
    distinct = len(np.unique(group[members]))
    count = "one window" if distinct == 1 else f"{distinct} windows"
    summary = f"{len(members)} windows ({share:.1%}), {relation}, are exact copies of {count}"
    return Finding("copies", relation, summary, len(members), share, share, share, name_rows(windows.names, members))


def _group_equal(windows: LabelledWindows) -> tuple[Ints, Bools]:
    """Return the number of each window's content (w,), and which windows do not vary: a sensor that is off."""
    keys, is_constant = np.zeros(len(windows), np.uint64), np.zeros(len(windows), bool)
    size = max(1, _CHUNK_VALUES // (windows.window_rows * windows.rows.shape[1]))
    for begin in range(0, len(windows), size):
        part = np.arange(begin, min(begin + size, len(windows)))
        values = labelled_windows.canonicalize(windows.values(part))
        first = values[:, :1] if windows.window_rows > 1 else values[:, :, :1]
        # A missing window says nothing either.
        is_constant[part] = ((values == first) | (np.isnan(values) & np.isnan(first))).all(axis=(1, 2))
        key = np.zeros(len(part), np.uint64)
        for column in values.reshape(len(part), -1).view(np.uint32).T:
            key = (key ^ (key >> np.uint64(29))) * _MIXER + column
        keys[part] = key
    return np.unique(keys, return_inverse=True)[1].astype(np.int64), is_constant


def _differs_within(group: Ints, code: Ints) -> Bools:
    """Return which windows share their content with one of another code."""
    codes = int(code.max(initial=0)) + 1
    pairs = np.unique(group * codes + code) // codes
    return np.asarray(bincount(pairs, minlength=int(group.max(initial=0)) + 1)[group] > 1)


def _avoids_own(group: Ints, code: Ints) -> bool:
    """Return True if copies lie in different codes far more often than repetitions by nature would."""
    shares = bincount(code) / len(code)
    expected = _count_pairs(group) * float((shares**2).sum())
    within = _count_pairs(group * (int(code.max()) + 1) + code)
    return expected >= _MIN_EXPECTED and within <= _MAX_WITHIN * expected


def _count_pairs(values: Ints) -> float:
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1) / 2).sum())
