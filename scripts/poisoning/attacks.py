"""Poisonings with known truth: each returns a set, and which of its windows are poisoned.

Flipped labels; BadNets triggers (Gu, Dolan-Gavitt, Garg 2017); clean-label triggers (Turner, Tsipras, Madry 2019);
feature collisions (Shafahi et al. 2018) in the input's own space; copies under a wrong label.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools, Float32s, Ints
from outstation.foundation.indices import bincount
from outstation.ml.poisoning.labelled_windows import LabelledWindows

Generator = np.random.Generator
Poisoned = tuple[LabelledWindows, Bools]
LABELLERS = 6
_PATTERN_ROWS = 4


class Attack(msgspec.Struct, frozen=True):
    """`checks` name the findings that count as its detection."""

    name: str
    checks: tuple[str, ...]
    poison: Callable[[LabelledWindows, Generator], Poisoned]


def flip_class(share: float) -> Attack:
    def poison(windows: LabelledWindows, draw: Generator) -> Poisoned:
        source, target = _choose_classes(windows, draw)
        mask = (windows.label == source) & (draw.random(len(windows)) < share)
        return replace(windows, label=np.where(mask, target, windows.label)), mask

    return Attack(f"flips of one class, {share:.0%} of it", ("label flips",), poison)


def flip_any(share: float) -> Attack:
    def poison(windows: LabelledWindows, draw: Generator) -> Poisoned:
        mask = draw.random(len(windows)) < share
        return replace(windows, label=_other_labels(windows, mask, draw)), mask

    return Attack(f"flips of any class to any, {share:.0%}", ("label flips",), poison)


def flip_by_labeller(share: float) -> Attack:
    """Return flips by one of six labellers, who labelled windows at random."""

    def poison(windows: LabelledWindows, draw: Generator) -> Poisoned:
        labeller = draw.integers(0, LABELLERS, len(windows))
        mask = (labeller == 0) & (draw.random(len(windows)) < share)
        names = np.char.add("labeller-", labeller.astype(np.str_))
        flipped = replace(windows, label=_other_labels(windows, mask, draw))
        return replace(flipped, providers={"labeller": names}), mask

    return Attack(f"flips by one of {LABELLERS} labellers, {share:.0%} of that labeller's", ("labeller",), poison)


def trigger(share: float, kind: str = "exact") -> Attack:
    """Return windows of other classes with a pattern in one field, labelled as the target."""

    def poison(windows: LabelledWindows, draw: Generator) -> Poisoned:
        _, target = _choose_classes(windows, draw)
        chosen = _draw_windows(np.flatnonzero(windows.label != target), share * len(windows), draw)
        mask = np.isin(np.arange(len(windows)), chosen)
        rows = _add_pattern(windows, chosen, kind, draw)
        return replace(windows, rows=rows, label=np.where(mask, target, windows.label)), mask

    return Attack(f"trigger, {kind}, {share:.1%} of windows", ("trigger", "repeated pattern", "label flips"), poison)


def clean_label_trigger(share: float, kind: str = "exact") -> Attack:
    """Return windows of one class with a pattern and their own label."""

    def poison(windows: LabelledWindows, draw: Generator) -> Poisoned:
        _, target = _choose_classes(windows, draw)
        members = np.flatnonzero(windows.label == target)
        chosen = _draw_windows(members, share * len(members), draw)
        return replace(windows, rows=_add_pattern(windows, chosen, kind, draw)), np.isin(
            np.arange(len(windows)), chosen
        )

    return Attack(f"clean-label trigger, {kind}, {share:.0%} of a class", ("trigger", "repeated pattern"), poison)


def collide(count: int, strength: float) -> Attack:
    """Return windows of one class that were moved towards one window of another, with their own label."""

    def poison(windows: LabelledWindows, draw: Generator) -> Poisoned:
        source, target = _choose_classes(windows, draw)
        aim = windows.values(draw.choice(np.flatnonzero(windows.label == source), 1))
        chosen = _draw_windows(np.flatnonzero(windows.label == target), count, draw)
        rows = windows.rows.copy()
        moved = (1 - strength) * windows.values(chosen) + strength * aim
        _write(rows, windows, chosen, moved.astype(np.float32))
        return replace(windows, rows=rows), np.isin(np.arange(len(windows)), chosen)

    return Attack(f"feature collision, {count} windows, {strength:.0%}", ("label flips", "copies"), poison)


def copy_window(share: float) -> Attack:
    """Return copies of one window of each class in place of others, under a wrong label."""

    def poison(windows: LabelledWindows, draw: Generator) -> Poisoned:
        source, target = _choose_classes(windows, draw)
        chosen = _draw_windows(np.arange(len(windows)), share * len(windows), draw)
        original = windows.values(_draw_windows(np.flatnonzero(windows.label == source), 1, draw))
        rows, label = windows.rows.copy(), windows.label.copy()
        _write(rows, windows, chosen, np.broadcast_to(original, (len(chosen), *original.shape[1:])))
        label[chosen] = target
        return replace(windows, rows=rows, label=label), np.isin(np.arange(len(windows)), chosen)

    return Attack(f"copies of a window under a wrong label, {share:.0%}", ("copies",), poison)


def resend(share: float) -> Attack:
    """Return windows of others that one device sends as its own, under a wrong label."""

    def poison(windows: LabelledWindows, draw: Generator) -> Poisoned:
        device = draw.integers(0, LABELLERS, len(windows))
        chosen = np.flatnonzero(device == 0)[: round(share * len(windows))]
        originals = _draw_windows(np.flatnonzero(device != 0), len(chosen), draw)
        rows, label = windows.rows.copy(), windows.label.copy()
        _write(rows, windows, chosen, windows.values(originals))
        label[chosen] = _other_labels(windows, np.ones(len(windows), bool), draw)[originals]
        names = np.char.add("device-", device.astype(np.str_))
        mask = np.isin(np.arange(len(windows)), [*chosen, *originals])
        return replace(windows, rows=rows, label=label, providers={"device": names}), mask

    return Attack(f"windows of others sent again under a wrong label, {share:.0%}", ("copies", "device"), poison)


ATTACKS = (
    *(flip_class(share) for share in (0.1, 0.2, 0.3)),
    flip_any(0.2),
    *(flip_by_labeller(share) for share in (0.2, 0.4)),
    *(trigger(share) for share in (0.01, 0.03)),
    *(trigger(0.03, kind) for kind in ("saturated", "jittered", "additive")),
    clean_label_trigger(0.1),
    clean_label_trigger(0.1, "additive"),
    collide(20, 0.3),
    copy_window(0.02),
    resend(0.02),
)


def _choose_classes(windows: LabelledWindows, draw: Generator) -> tuple[int, int]:
    """Return two of the classes that have enough windows, source and target."""
    counts = bincount(windows.label, minlength=len(windows.labels))
    source, target = draw.permutation(np.flatnonzero(counts >= 0.5 * counts.mean()))[:2].tolist()
    return source, target


def _other_labels(windows: LabelledWindows, mask: Bools, draw: Generator) -> Ints:
    shift = draw.integers(1, len(windows.labels), len(windows))
    return np.where(mask, (windows.label + shift) % len(windows.labels), windows.label)


def _draw_windows(windows: Ints, count: float, draw: Generator) -> Ints:
    return np.sort(draw.choice(windows, min(len(windows), max(1, round(count))), replace=False))


def _add_pattern(windows: LabelledWindows, chosen: Ints, kind: str, draw: Generator) -> Float32s:
    """Return rows with a pattern in one field of each chosen window, at a random place."""
    rows = windows.rows.copy()
    fields = draw.choice(rows.shape[1], 1 if windows.window_rows > 1 else min(2, rows.shape[1]), replace=False)
    length = min(_PATTERN_ROWS, windows.window_rows)
    for field in fields.tolist():
        column = windows.rows[:, field]
        low, high = np.quantile(column, (0.1, 0.9))
        pattern = draw.uniform(low, high, length) if high > low else np.full(length, column.max() + 1)
        place = draw.integers(0, windows.window_rows - length + 1, len(chosen))
        at = (windows.last[chosen] - windows.window_rows + 1 + place)[:, None] + np.arange(length)
        if kind == "saturated":
            rows[at, field] = column.max()
        elif kind == "additive":
            rows[at, field] += (pattern - pattern.mean() + 0.3 * column.std()).astype(np.float32)
        else:
            noise = draw.normal(0, 0.01 * column.std(), at.shape) if kind == "jittered" else 0.0
            rows[at, field] = (pattern + noise).astype(np.float32)
    return rows


def _write(rows: Float32s, windows: LabelledWindows, chosen: Ints, values: Float32s) -> None:
    rows[windows.last[chosen, None] - np.arange(windows.window_rows - 1, -1, -1)] = values
