"""Sensor faults of one field in one drift window: told apart from drift, because the fix is another one.

missing        more than 5 % of values absent, and more than twice the reference's share; at a site that has learned,
               more than 1 % and more than twice the share of any learned window. Up to 5 % the window counts, too
saturated      more than 5 % of values at the window's highest or lowest, far more than on the next value to it
quantized      hardly any of the finest steps from row to row that a site had, up to four times their size
stuck          one value repeated more than max(10, 5 x the reference's longest run) times, rest values excepted
swapped        statistics fit a site's reference of another field of the same unit, and that one's this one's
reversed       they fit it with the sign reversed
unit           outside those limits, or far calmer than the reference ever was, but like it in another unit
out_of_range   more than 1 % of values outside the reference's limits widened by half their span
spikes         lone jumps of more than 10 robust sd of the differences, from neighbours that agree: at least 2
               and more than one row in 1000
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from agent.drift import channels, steps
from agent.drift import units as other_units
from agent.drift.codec import Bools, Floats, Ints
from agent.drift.extremes import piled

if TYPE_CHECKING:
    from agent.drift.reference import Reference
    from agent.drift.summary import Summary

MISSING, MISSING_FACTOR = 0.05, 2
MISSING_HERE, FEWEST_MISSING = 0.01, 10  # share, and rows, at a site that has learned how many are missing
RUN, RUN_FACTOR = 10, 5
OUTSIDE, WIDER = 0.01, 0.5
JUMP, AGREE = 10.0, 5.0  # robust sd of first differences
SPIKES, SPIKE_SHARE = 2, 0.001
# What is read is another quantity than it was: nothing that follows from it is drift.
MISREAD = frozenset({"swapped", "reversed", "unit"})


@dataclass(frozen=True)
class Fault:
    """Of one field in one drift window. `detail` says what it was recognised as, where there is more to say.

    A `slight` one spoils no statistics: the window is tested like others.
    """

    name: str
    detail: str = ""
    slight: bool = False


@dataclass(frozen=True, eq=False)
class Tail:
    """What the next rows need of those before: the last two rows (up to 2, F), and how long each last value has run."""

    rows: Floats
    run: Ints
    t: int = 0  # epoch µs of the last one

    @classmethod
    def empty(cls, fields: int) -> Tail:
        return cls(np.empty((0, fields)), np.zeros(fields, np.int64))


def scan(rows: Floats, tail: Tail, rest: tuple[tuple[float, ...], ...], jump: Floats) -> tuple[Ints, Ints, Tail]:
    """Longest run of equal values and number of lone jumps per field in `rows` (n, F), which follow on from `tail`.

    `jump` (F,) is the robust sd of first differences; 0 switches that rule off. A row's jump is judged once the row
    after it is there, so the counts are the same however the rows were cut.
    """
    if not len(rows):
        return np.zeros(rows.shape[1], np.int64), np.zeros(rows.shape[1], np.int64), tail
    joined = np.concatenate([tail.rows, rows])
    longest, run = _runs(joined, len(rows), tail.run, rest)
    return longest, _lone_jumps(joined, jump), Tail(joined[-2:].copy(), run)


def _runs(joined: Floats, n: int, before: Ints, rest: tuple[tuple[float, ...], ...]) -> tuple[Ints, Ints]:
    same = joined[1:] == joined[:-1]
    if len(joined) == n:
        same = np.concatenate([np.zeros((1, joined.shape[1]), np.bool_), same])
    same, longest, last = same[-n:], np.ones(joined.shape[1], np.int64), np.ones(joined.shape[1], np.int64)
    place = np.arange(1, n + 1)
    for field in np.flatnonzero(same.any(0)):
        runs_on = same[:, field]
        for value in rest[field]:
            runs_on = runs_on & (joined[-n:, field] != value)
        broken = np.maximum.accumulate(np.where(runs_on, 0, place))
        length = np.where(broken > 0, place - broken + 1, before[field] + place)
        longest[field], last[field] = length.max(), length[-1]
    return longest, last


def _lone_jumps(joined: Floats, jump: Floats) -> Ints:
    if len(joined) < 3:
        return np.zeros(joined.shape[1], np.int64)
    step = joined[1:] - joined[:-1]
    far = np.abs(step) > JUMP * jump
    back = np.abs(joined[2:] - joined[:-2]) <= AGREE * jump
    lone = far[1:] & far[:-1] & back & (jump > 0)
    return np.asarray(lone.sum(0), dtype=np.int64)


def find(
    summary: Summary,
    reference: Reference,
    units: Sequence[str] = (),
    site: Reference | None = None,
    misread: Bools | None = None,
) -> tuple[Fault | None, ...]:
    """The fault of each field (of these `units`) in a drift window, if any; of several the first listed above.

    `reference` is the shipped one. Without a site's own it is not known how a field is mounted there. `misread` (F,):
    those that were read wrongly up to now.
    """
    rows = max(summary.rows, 1)
    missing = _missing(summary, reference, site)
    stuck = summary.longest > run_limits(reference, rows)
    saturated = piled(summary.extremes, reference, rows).any(1)
    outside = summary.outside > OUTSIDE * rows
    spikes = (summary.spikes >= SPIKES) & (summary.spikes > SPIKE_SHARE * rows)
    unit = other_units.recognised(summary, reference, outside, tuple(units))
    coarser = np.zeros(len(unit), np.int64)
    none = np.zeros(len(unit), np.bool_)
    other, mirrored = ("",) * len(unit), none
    if site is not None:
        other, mirrored = channels.exchanged(summary, site, units, none if misread is None else misread)
        coarser = steps.coarser(summary, site)
    another = np.array([one is not None for one in unit])
    exchanged = np.array([bool(name) for name in other])
    # Coarse values repeat for long; and in another unit, or another field's, steps have another size.
    rounded = (coarser > 0) & ~(another | exchanged | mirrored | outside)
    kinds = {
        "missing": missing,
        "saturated": saturated,
        "quantized": rounded,
        "stuck": stuck,
        "swapped": exchanged,
        "reversed": mirrored,
        "unit": another,
        "out_of_range": outside,
        "spikes": spikes,
    }
    names = np.select(list(kinds.values()), list(kinds), "").tolist()
    details = [
        {"unit": one.told if one else "", "swapped": with_field, "quantized": f"{times} times"}.get(name, "")
        for one, with_field, times, name in zip(unit, other, coarser, names, strict=True)
    ]
    slight = (summary.missing <= MISSING * rows).tolist()
    return tuple(
        Fault(name, detail, name == "missing" and few) if name else None
        for name, detail, few in zip(names, details, slight, strict=True)
    )


def _missing(summary: Summary, reference: Reference, site: Reference | None) -> np.ndarray:
    rows = max(summary.rows, 1)
    here = site.site.rate if site is not None and site.site is not None else None
    if here is None:
        usual = reference.missing / np.maximum(reference.n + reference.missing, 1)
        return np.asarray(summary.missing > np.maximum(MISSING, MISSING_FACTOR * usual) * rows)
    more = summary.missing > np.maximum(MISSING_HERE, MISSING_FACTOR * here.missing) * rows
    return np.asarray(more & (summary.missing >= FEWEST_MISSING))


def spoiled(found: Sequence[Fault | None]) -> bool:
    """Whether one of them keeps the window out of all tests."""
    return any(fault is not None and not fault.slight for fault in found)


def run_limits(reference: Reference, rows: int) -> Ints:
    """Longest run that is still normal, (F,): never so long that a drift window could not show a longer one,
    except where the reference itself held one value that long."""
    allowed = np.minimum(RUN_FACTOR * reference.longest, rows - 1)
    return np.maximum(np.maximum(RUN, allowed), reference.longest)
