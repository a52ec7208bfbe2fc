"""Noise search: the smallest bounded noise on some fields that flips an answer.

A random search keeps each change that makes the old answer less likely. It changes blocks of neighbouring rows and
fields to the bound, ever smaller ones, and begins with a constant offset of each field. Halving the change then finds
the smallest one in its direction.

Source: Andriushchenko, Croce, Flammarion, Hein (2020), Square Attack: a query-efficient black-box adversarial attack
via random search, ECCV, for the norm L∞, here in standard deviations of each field.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints
from outstation.workbench.evaluation.adversarial.target import Target

HALVINGS = 6
_FIRST_SHARE, _LAST_SHARE = 0.8, 0.05  # of the values of a window that one step changes


def count_queries(bounds: Sequence[float], steps: int) -> int:
    """Return the most invocations for one window."""
    return len(bounds) * (steps + 1) + HALVINGS


def find_smallest_noise(
    target: Target, index: Ints, fields: Bools, bounds: Sequence[float], steps: int, rng: Generator
) -> Float64s:
    """Return the size (k,) in sd of the smallest noise that flips the windows at `index` (k,), inf for none found.

    `fields` (k, F) may change, by up to each of the ascending `bounds` in sd; `steps` steps search each bound.
    """
    sizes, originals = np.full(len(index), np.inf), target.windows[index]
    changes = np.zeros_like(originals)
    for bound in bounds:
        left = np.flatnonzero(np.isinf(sizes))
        if not len(left):
            break
        flipped, tried = search_bound(target, index[left], fields[left], np.float32(bound), steps, rng)
        sizes[left[flipped]], changes[left[flipped]] = bound, tried[flipped]
    done = np.flatnonzero(np.isfinite(sizes))
    if len(done):
        sizes[done] = _shorten(target, index[done], originals[done], changes[done])
    return sizes


def search_bound(
    target: Target, index: Ints, fields: Bools, bound: np.float32, steps: int, rng: Generator
) -> tuple[Bools, Float32s]:
    """Return which windows (k,) flipped, and the changes (k, L, F) that did it."""
    originals = target.windows[index]
    amplitude = np.where(fields, target.limits.sd * bound, np.float32(0.0))[:, None, :]
    signs = np.broadcast_to(_draw_signs(rng, len(index), originals.shape[2]), originals.shape).copy()
    flipped, margins = np.zeros(len(index), np.bool_), np.full(len(index), np.inf)
    for step in range(steps + 1):
        left = np.flatnonzero(~flipped)
        if not len(left):
            break
        # The second try is the opposite offset.
        tried = signs[left] if step == 0 else -signs[left] if step == 1 else _mutate(signs[left], step / steps, rng)
        changed = target.limits.clip(originals[left] + tried * amplitude[left], originals[left])
        now_flipped, now_margins = target.query(index[left], changed)
        better = now_flipped | (now_margins <= margins[left])
        signs[left[better]], margins[left[better]] = tried[better], now_margins[better]
        flipped[left] = now_flipped
    return flipped, target.limits.clip(originals + signs * amplitude, originals) - originals


def _draw_signs(rng: Generator, count: int, fields: int) -> Float32s:
    return (rng.integers(0, 2, (count, 1, fields)) * 2 - 1).astype(np.float32)


def _mutate(signs: Float32s, progress: float, rng: Generator) -> Float32s:
    """Return signs (k, L, F) with one block of new ones in each window."""
    count, length, fields = signs.shape
    side = np.sqrt(max(_LAST_SHARE, _FIRST_SHARE * (1 - progress) ** 2))
    blocks = [_draw_block(rng, count, size, max(1, round(size * side))) for size in (length, fields)]
    inside = blocks[0][:, :, None] & blocks[1][:, None, :]
    return np.where(inside, _draw_signs(rng, count, fields), signs)


def _draw_block(rng: Generator, count: int, size: int, width: int) -> Bools:
    """Return a random run of `width` of `size` places for each window (count, size)."""
    begin = rng.integers(0, size - width + 1, (count, 1))
    places = np.arange(size)
    return np.asarray((places >= begin) & (places < begin + width))


def _shorten(target: Target, index: Ints, originals: Float32s, changes: Float32s) -> Float64s:
    """Return the size (k,) in sd of the smallest part of each change that still flips."""
    sd = np.where(target.limits.sd > 0, target.limits.sd, np.float32(np.inf))
    full = np.nan_to_num(np.abs(changes) / sd).max(axis=(1, 2)).astype(np.float64)
    below, above = np.zeros(len(index)), np.ones(len(index))
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        flipped, _ = target.query(index, originals + changes * middle[:, None, None].astype(np.float32))
        above, below = np.where(flipped, middle, above), np.where(flipped, below, middle)
    return np.asarray(full * above)
