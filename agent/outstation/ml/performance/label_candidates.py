"""Choice of results to label next: the least certain, the most drifted, the rarest classes, and some at random.

A label teaches most where the model doubts, where its input has moved away from the reference, and where a class has
few labels (active learning: Lewis and Gale 1994). Only the random ones, which are a fair sample, measure accuracy
without bias. At most one result of a batch is chosen for a reason, because neighbours teach the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints

Reason = Literal["uncertain", "drifted", "rare", "random"]
REASONS: tuple[Reason, ...] = ("uncertain", "drifted", "rare", "random")


class UnlabelledResults(msgspec.Struct, frozen=True):
    """Results without a label, oldest first.

    `batch` (n,): of the results that came together. `doubt` (n,): 0 where the model is certain, NaN without a score.
    `drift` (n,): how far the input of its drift window was from the reference, 0 without drift. `predicted`: n labels,
    None for numbers.
    """

    batch: Ints
    doubt: Float64s
    drift: Float64s
    predicted: Sequence[str | None]


class Candidate(msgspec.Struct, frozen=True):
    """`index` of a result, why it should get a label, and how strongly: doubt, drift, labels of its class, or 0."""

    index: int
    reason: Reason
    strength: float


def choose(
    results: UnlabelledResults, labels_by_class: Mapping[str, int], limit: int, seed: int, turn: int = 0
) -> list[Candidate]:
    """Return up to `limit` results, of each reason in turn the next best; the same `seed` chooses the same ones.

    `turn` counts the tasks of one list: each begins with another reason, so that a list of one result of each task has
    all reasons.
    """
    queues: dict[Reason, Iterator[tuple[int, float]]] = {
        "uncertain": _by_strength(results.doubt),
        "drifted": _by_strength(results.drift),
        "rare": _rarest(results.predicted, labels_by_class),
        "random": ((int(index), 0.0) for index in np.random.default_rng(seed).permutation(len(results.batch))),
    }
    chosen: dict[int, Candidate] = {}
    batches: set[tuple[Reason, int]] = set()
    begin = turn % len(REASONS)
    in_turn = [*REASONS[begin:], *REASONS[:begin]]
    while queues and len(chosen) < limit:
        for reason in [each for each in in_turn if each in queues]:
            for index, strength in queues[reason]:
                batch = (reason, int(results.batch[index]))
                if index not in chosen and batch not in batches:
                    chosen[index] = Candidate(index, reason, strength)
                    batches.add(batch)
                    break
            else:
                del queues[reason]
            if len(chosen) == limit:
                break
    return [*chosen.values()]


def _by_strength(strength: Float64s) -> Iterator[tuple[int, float]]:
    """Yield (index, strength) of those above 0, the strongest and then the newest first."""
    known = np.nan_to_num(strength, nan=0.0)
    order = np.lexsort((-np.arange(len(known)), -known))
    return ((int(index), float(known[index])) for index in order if known[index] > 0)


def _rarest(predicted: Sequence[str | None], labels_by_class: Mapping[str, int]) -> Iterator[tuple[int, float]]:
    """Yield (index, labels of its class) of the newest results, classes with the fewest labels and results first."""
    places: dict[str, list[int]] = {}
    for index, label in enumerate(predicted):
        if label is not None:
            places.setdefault(label, []).append(index)
    if len({*places, *labels_by_class}) < 2:
        return
    fewest_first = sorted(places, key=lambda label: (labels_by_class.get(label, 0), len(places[label]), label))
    for label in fewest_first[: max(1, len(fewest_first) // 2)]:
        for index in reversed(places[label]):
            yield index, float(labels_by_class.get(label, 0))
