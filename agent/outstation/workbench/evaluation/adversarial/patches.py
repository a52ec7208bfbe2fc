"""Trigger patches: one small block of readings at one place that flips the answers to many windows.

A random search on half of the windows keeps a patch that flips more of them; the share is that of the other half. The
control is a patch that nobody searched.

Sources: Brown et al. (2017), Adversarial patch, arXiv 1712.09665; Moosavi-Dezfooli et al. (2017), Universal adversarial
perturbations, CVPR, for changes that do not depend on the window.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from outstation.foundation.arrays import Float32s, Ints
from outstation.workbench.evaluation.adversarial.results import Attack, FlippedShare, flipped_share
from outstation.workbench.evaluation.adversarial.target import Target

PATCH_SHARES = (0.01, 0.04, 0.1, 0.25)  # of a window's values
STEPS = 40
# Half of the windows see each step, the other half the patch and its control, at each size.
QUERIES = len(PATCH_SHARES) * (STEPS // 2 + 1)


class Patch:
    """Values (rows, fields) from one place of a window on."""

    def __init__(self, values: Float32s, row: int, field: int) -> None:
        self.values, self.row, self.field = values, row, field

    def apply(self, windows: Float32s) -> Float32s:
        changed = windows.copy()
        rows, fields = self.values.shape
        changed[:, self.row : self.row + rows, self.field : self.field + fields] = self.values
        return changed


def search_patches(target: Target, index: Ints, rng: Generator) -> tuple[Attack, Attack]:
    """Return the share of windows that the best patch of each size flips, and the same of a random patch."""
    _, length, fields = target.windows.shape
    # The first windows are of all classes alike, and so is each half.
    searched, held_out = np.array_split(index, 2)
    best: list[FlippedShare] = []
    control: list[FlippedShare] = []
    for rows, columns in _list_shapes(length, fields):
        patch = search_patch(target, searched, rows, columns, rng)
        strength = _count(columns, "field") if length == 1 else f"{_count(rows, 'row')} of {_count(columns, 'field')}"
        for points, tried in ((best, patch), (control, _draw_patch(target, rows, columns, rng))):
            points.append(flipped_share(strength, target.query(held_out, tried.apply(target.windows[held_out]))[0]))
    meaning = "the same few readings in every window"
    return (
        Attack(attack="trigger", meaning=f"{meaning}, searched on other windows", points=best),
        Attack(attack="random patch", meaning=f"{meaning}, not searched: the control", points=control),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _list_shapes(length: int, fields: int) -> list[tuple[int, int]]:
    """Return rows and fields of the patches, about as square as the window."""
    sides = [share**0.5 for share in PATCH_SHARES]
    return sorted({(max(1, round(length * side)), max(1, round(fields * side))) for side in sides})


def search_patch(target: Target, index: Ints, rows: int, columns: int, rng: Generator) -> Patch:
    """Return the patch of this size that flipped most of the windows at `index` (k,)."""
    best, fitness = _draw_patch(target, rows, columns, rng), (-1.0, -np.inf)
    for step in range(STEPS):
        # The first third looks for a place, the rest for values there.
        tried = best if step == 0 else _draw_patch(target, rows, columns, rng)
        if step > STEPS // 3:
            drawn = rng.random(best.values.shape) < 1 / 3
            tried = Patch(_fit(target, np.where(drawn, rng.random(drawn.shape), np.nan), best), best.row, best.field)
        flipped, margins = target.query(index, tried.apply(target.windows[index]))
        now = float(flipped.mean()), -float(margins.mean())
        if now > fitness:
            best, fitness = tried, now
    return best


def _draw_patch(target: Target, rows: int, columns: int, rng: Generator) -> Patch:
    """Draw a place, and for each field of it one limit of the sensor."""
    _, length, fields = target.windows.shape
    row, field = int(rng.integers(0, length - rows + 1)), int(rng.integers(0, fields - columns + 1))
    place = slice(field, field + columns)
    ends = np.where(rng.integers(0, 2, columns) > 0, target.limits.high[place], target.limits.low[place])
    return Patch(np.broadcast_to(ends, (rows, columns)).astype(np.float32), row, field)


def _fit(target: Target, shares: np.ndarray, patch: Patch) -> Float32s:
    """Return the patch's values, where `shares` (rows, columns) is not NaN replaced by that share of the range."""
    place = slice(patch.field, patch.field + shares.shape[1])
    low, high = target.limits.low[place], target.limits.high[place]
    return np.where(np.isnan(shares), patch.values, low + shares * (high - low)).astype(np.float32)
