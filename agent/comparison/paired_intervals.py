"""95 % intervals of what two bundles made of the same windows, from blocks of them: one message each.

Neighbouring windows are alike, and so are neighbouring blocks, though less; devices are not. So blocks count, not
windows, fewer of them where they follow one another; from FEWEST devices on, devices do. Fewer of either say nothing.
What pulls hard comes in bursts, of which few blocks see too few: so the block that pulls hardest counts twice.

Sources: linearized ratios, Cochran (1977), Sampling techniques, chapter 6; Wilson (1927) with the effective number of
answers, Korn & Graubard (1998), for shares; Bonett & Price (2012) for the least doubt in a paired difference; Student's
quantile by Abramowitz & Stegun (1964), 26.7.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.comparison.tally import Tally
from agent.performance.intervals import Z, wilson
from agent.wire.messages import Answered, Moments

Floats = NDArray[np.float64]

# Devices that are enough to count by; blocks of few devices.
FEWEST, FEWEST_BLOCKS = 5, 10
# So many windows at most count as one where they all agree, and nothing tells how alike they are.
_ALIKE = 5.0
_MOST_CORRELATED = 0.9
# Correlation of a block with the one before, where little is known of it; as if so many had shown it.
_USUAL, _SEEN = 0.4, 4


class Block(msgspec.Struct, frozen=True):
    """The tally of one message, of one device; blocks of a device are given in their order."""

    tally: Tally
    device: str = ""


class Estimate(msgspec.Struct, frozen=True):
    """`value` with its 95 % interval, from `n` windows in `units` blocks or devices (`of`)."""

    value: float
    low: float
    high: float
    n: int
    units: int
    of: str


def agreement(blocks: Sequence[Block]) -> Estimate | None:
    """The share of windows that both answered alike."""
    some = [one for one in blocks if one.tally.n and one.tally.same is not None]
    n = _column(some, lambda tally: tally.n)
    same = _column(some, lambda tally: tally.same or 0)
    return _share(same, n, some)


def failing(blocks: Sequence[Block]) -> tuple[float, float, float]:
    """The share of batches in which `beside` failed, and its interval; a batch fails by itself."""
    batches = sum(one.tally.batches for one in blocks)
    errors = sum(one.tally.errors for one in blocks)
    share = errors / batches if batches else 0.0
    return (share, *wilson(share, batches))


def slowness(blocks: Sequence[Block], *, new_is_beside: bool) -> Estimate | None:
    """Time a window in the new bundle's model, as a multiple of the old one's."""
    pairs = [(one, *_sides(one.tally, new_is_beside)) for one in blocks]
    pairs = [(one, new, old) for one, new, old in pairs if new.windows and old.windows]
    # What pulls hardest here is a machine that was busy with other things, which says nothing of either bundle.
    rows = [(one, new.seconds, new.windows, old.seconds, old.windows) for one, new, old in pairs]
    return _growth(rows, bursts=False)


def error_growth(blocks: Sequence[Block], *, new_is_beside: bool) -> Estimate | None:
    """Mean absolute error of the new bundle's values, as a multiple of the old one's."""
    pairs = [(one, *_sides(one.tally, new_is_beside)) for one in blocks]
    pairs = [(one, new, old) for one, new, old in pairs if new.off.n and old.off.n]
    return _growth([(one, _total(new.off), new.off.n, _total(old.off), old.off.n) for one, new, old in pairs])


def labelled_gain(blocks: Sequence[Block], *, new_is_beside: bool) -> Estimate | None:
    """Accuracy of the new bundle less that of the old one, in the same labelled windows."""
    some = [one for one in blocks if sum(one.tally.labelled)]
    sign = 1 if new_is_beside else -1
    n = _column(some, lambda tally: sum(tally.labelled))
    gained = sign * _column(some, lambda tally: tally.labelled[2] - tally.labelled[1])
    if not some:
        return None
    total = float(n.sum())
    value = float(gained.sum()) / total
    found = _Spread.seen((gained - value * n) / total, some)
    if found is None:
        return None
    changed = [(sum(one.tally.labelled[i] for one in some) + 1) / (total + 2) for i in (1, 2)]
    least = (sum(changed) - (changed[0] - changed[1]) ** 2) / (total + 2)
    half = max(found.half, Z * math.sqrt(least))
    return Estimate(value, max(-1.0, value - half), min(1.0, value + half), int(total), found.units, found.of)


def expected_gain(blocks: Sequence[Block], *, new_is_beside: bool) -> Estimate | None:
    """Accuracy that the new bundle's scores lead to expect, less that of the old one's."""
    pairs = [(one, *_sides(one.tally, new_is_beside)) for one in blocks]
    pairs = [(one, new, old) for one, new, old in pairs if new.expected.n and old.expected.n]
    if not pairs:
        return None
    some = [one for one, _, _ in pairs]
    new_n, old_n = _array([new.expected.n for _, new, _ in pairs]), _array([old.expected.n for _, _, old in pairs])
    ours, theirs = (
        _array([_total(new.expected) for _, new, _ in pairs]),
        _array([_total(old.expected) for _, _, old in pairs]),
    )
    new_mean, old_mean = ours.sum() / new_n.sum(), theirs.sum() / old_n.sum()
    found = _Spread.seen((ours - new_mean * new_n) / new_n.sum() - (theirs - old_mean * old_n) / old_n.sum(), some)
    if found is None:
        return None
    value = float(new_mean - old_mean)
    return Estimate(value, value - found.half, value + found.half, int(new_n.sum()), found.units, found.of)


class _Spread(msgspec.Struct, frozen=True):
    """Half the width of an interval, from how blocks or devices pull a statistic about; 0 where none does."""

    half: float
    units: int
    of: str

    @classmethod
    def seen(cls, pulls: Floats, blocks: Sequence[Block], *, bursts: bool = True) -> _Spread | None:
        """`pulls` (b,) of the blocks, which come to nothing together. None where there are too few."""
        names = np.array([one.device for one in blocks])
        each = [pulls[names == device] for device in sorted(set(names.tolist()))]
        if len(each) >= FEWEST:
            return cls(_half(_array([float(one.sum()) for one in each])), len(each), "devices")
        if len(pulls) < FEWEST_BLOCKS:
            return None
        alike = sum(len(one) * following(one) for one in each) / len(pulls)
        halves = [_half(pulls, alike, bursts=bursts)]
        size = 2
        while sum(len(one) // size for one in each) >= FEWEST:
            parts = [part for one in each for part in np.array_split(one, max(1, len(one) // size))]
            halves.append(_half(_array([float(part.sum()) for part in parts]), bursts=bursts))
            size *= 2
        return cls(max(halves), len(pulls), "blocks")


def _half(pulls: Floats, alike: float = 1.0, *, bursts: bool = False) -> float:
    """Of so many independent pulls; `alike` of which count as one. `bursts`: as if the hardest came once more."""
    units, squares = len(pulls), np.square(pulls)
    total = float(squares.sum()) + (float(squares.max()) if bursts else 0.0)
    spread = math.sqrt(units / (units - 1) * total * alike)
    return student(max(3.0, units / alike - 1)) * spread


def following(values: Floats) -> float:
    """How many blocks count as one, from (b,) in order, as of an AR(1) process.

    Of few the correlation comes out too low, by about (1 + 3r) / b (Kendall 1954), and chance decides: they count as if
    some more had been seen that are alike.
    """
    n = len(values)
    total = float(np.square(values).sum())
    if n < FEWEST or total <= 0:
        return (1 + _USUAL) / (1 - _USUAL)
    r = float((values[1:] * values[:-1]).sum()) / total
    r = min(max((r * n + 1 + _SEEN * _USUAL) / (n - 3 + _SEEN), 0.0), _MOST_CORRELATED)
    return (1 + r) / (1 - r)


def student(degrees: float) -> float:
    """The 97.5 % quantile, of at least 3 degrees of freedom."""
    z, d = Z, degrees
    first = (z**3 + z) / (4 * d)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    return z + first + second + third


def _share(hits: Floats, n: Floats, blocks: Sequence[Block]) -> Estimate | None:
    if not blocks:
        return None
    total = float(n.sum())
    share = float(hits.sum()) / total
    found = _Spread.seen((hits - share * n) / total, blocks)
    if found is None:
        return None
    effective = max(float(found.units), total / _ALIKE)
    if found.half > 0:
        effective = min(total, share * (1 - share) * (Z / found.half) ** 2)
    low, high = wilson(share, effective)
    return Estimate(share, low, high, int(total), found.units, found.of)


def _growth(rows: Sequence[tuple[Block, float, int, float, int]], *, bursts: bool = True) -> Estimate | None:
    """Of a mean over another, by their logarithms: (block, sum and number of the new one's, of the old one's)."""
    if not rows:
        return None
    ours, theirs = _array([row[1] for row in rows]), _array([row[3] for row in rows])
    n, m = _array([row[2] for row in rows]), _array([row[4] for row in rows])
    if ours.sum() <= 0 or theirs.sum() <= 0:
        return None
    ratio = float(ours.sum() / n.sum() / (theirs.sum() / m.sum()))
    pulls = ours / ours.sum() - n / n.sum() - theirs / theirs.sum() + m / m.sum()
    found = _Spread.seen(pulls, [row[0] for row in rows], bursts=bursts)
    if found is None:
        return None
    factor = math.exp(min(50.0, found.half))
    return Estimate(ratio, ratio / factor, ratio * factor, int(n.sum()), found.units, found.of)


def _sides(tally: Tally, new_is_beside: bool) -> tuple[Answered, Answered]:
    return (tally.beside, tally.model) if new_is_beside else (tally.model, tally.beside)


def _total(moments: Moments) -> float:
    return moments.n * moments.mean


def _column(blocks: Sequence[Block], number: Callable[[Tally], float]) -> Floats:
    return _array([number(one.tally) for one in blocks])


def _array(values: Sequence[float]) -> Floats:
    return np.array(values, np.float64)
