"""Substitution: readings replaced by those of another time, of another window, or of a sensor that lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.random import Generator

from outstation.foundation.arrays import Float32s, Ints
from outstation.workbench.evaluation.adversarial.results import Attack, flipped_share
from outstation.workbench.evaluation.adversarial.target import Target

_REPLAYED_SHARES = (0.1, 0.25, 0.5, 1.0)
_DELAY_SHARES = (0.1, 0.25, 0.5, 1.0, 2.0)
SPOOFED_VALUES = ("held", "mean", "lowest", "highest", "other class")
SUBSTITUTION_QUERIES = len(_REPLAYED_SHARES) + len(_DELAY_SHARES)


class Recording(msgspec.Struct, frozen=True, eq=False):
    """Rows (n, F) that the target's windows were cut from: the `first` row (m,) of each, and the `earliest` (m,) that
    no gap separates from it.
    """

    rows: Float32s
    first: Ints
    earliest: Ints


def draw_others(target: Target, index: Ints, rng: Generator) -> Ints:
    """Return for each window at `index` (k,) one with another answer, -1 if there is none."""
    codes = target.codes
    others = np.full(len(index), -1, np.int64)
    for code in np.unique(codes[index]):
        own, candidates = np.flatnonzero(codes[index] == code), np.flatnonzero(codes != code)
        if len(candidates):
            others[own] = rng.choice(candidates, len(own))
    return others


def replay_windows(target: Target, index: Ints, rng: Generator) -> Attack | None:
    """Replace the newest rows of windows by those of a window with another answer; None if there is none."""
    others = draw_others(target, index, rng)
    index, others = index[others >= 0], others[others >= 0]
    length = target.windows.shape[1]
    points = []
    for rows in _count_rows(_REPLAYED_SHARES, length) if len(index) else ():
        changed = target.windows[index]
        changed[:, length - rows :] = target.windows[others][:, length - rows :]
        points.append(flipped_share(f"{rows} of {length} rows", target.query(index, changed)[0]))
    meaning = "newest rows of a window with another answer"
    return Attack(attack="replay", meaning=meaning, points=points) if points else None


def delay_windows(target: Target, index: Ints, recording: Recording) -> Attack | None:
    """Replace windows by the rows some rows earlier; None where no row comes before."""
    length, points = target.windows.shape[1], []
    for rows in _count_rows(_DELAY_SHARES, length):
        first = recording.first[index] - rows
        possible = index[first >= recording.earliest[index]]
        if len(possible):
            extents = recording.first[possible, None] - rows + np.arange(length)
            points.append(
                flipped_share(
                    f"{rows} row{'s' if rows > 1 else ''}", target.query(possible, recording.rows[extents])[0]
                )
            )
    return Attack(attack="delay", meaning="rows that come late", points=points) if points else None


def _count_rows(shares: Sequence[float], length: int) -> list[int]:
    return sorted({max(1, round(share * length)) for share in shares})


def spoof_fields(target: Target, index: Ints, fields: Sequence[int], rng: Generator) -> Iterator[Attack]:
    """Replace one field by a constant, or by that of a window with another answer: an attack for each way."""
    names, limits = target.inference.fields, target.limits
    others = draw_others(target, index, rng)
    meanings = {
        "held": "one field repeats its first value",
        "mean": "one field is constant at its mean",
        "lowest": "one field is constant at its lower limit",
        "highest": "one field is constant at its upper limit",
        "other class": "one field of a window with another answer",
    }
    for name in SPOOFED_VALUES:
        points = []
        if name == "held" and target.windows.shape[1] == 1:
            continue
        for field in fields:
            chosen = index if name != "other class" else index[others >= 0]
            changed = target.windows[chosen]
            constants = {"mean": limits.mean, "lowest": limits.low, "highest": limits.high}
            if name in constants:
                changed[:, :, field] = constants[name][field]
            elif name == "held":
                changed[:, :, field] = changed[:, :1, field]
            else:
                changed[:, :, field] = target.windows[others[others >= 0]][:, :, field]
            if len(chosen):
                points.append(flipped_share(names[field], target.query(chosen, changed)[0]))
        if points:
            yield Attack(attack=f"spoof {name}", meaning=meanings[name], points=points)
