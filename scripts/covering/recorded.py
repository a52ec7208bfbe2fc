"""Blocks of the shipped `exercise` and bundles that differ from it, over the recordings that none of them was made of.

Recordings are drawn with replacement and follow one another, so the truth is what all of them say together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from agent.comparison.paired_intervals import ComparisonBlock
from agent.comparison.tally import ComparisonStats
from agent.model.bundle import bundle
from agent.model.bundle.manifest import Manifest
from agent.model.inference import features, inference, runtime, scores
from agent.wire.messages import BundleStats, Moments
from scripts.kit.rigged import SHIPPED, build_rigged_bundle

STEP = 50


@dataclass(frozen=True)
class Both:
    """Of one recording, window by window: who was right, and whether both said the same; the chances they gave."""

    same: NDArray[np.bool_]
    right: NDArray[np.bool_]
    beside: NDArray[np.bool_]
    chance: NDArray[np.float64]
    other: NDArray[np.float64]


@cache
def recordings(change: str) -> tuple[Both, ...]:
    """`sensitive`: names the first class where values are large. `scaled`: its scaling is off by 30 %."""
    shipped = bundle.read(SHIPPED, None)
    model = inference.load_model(shipped.manifest, shipped.model_bytes)
    other = runtime.TfliteModel(build_rigged_bundle("sensitive")["model.tflite"]) if change == "sensitive" else model
    factor = np.float32(1.3 if change == "scaled" else 1.0)
    with np.load(SHIPPED.parent / "recordings" / "exercise.npz") as found:
        rows, begins, labels, names = found["rows"], found["starts"], found["label"], found["labels"]
    order = [list(shipped.manifest.output.labels or []).index(str(name)) for name in names]
    window = shipped.manifest.input.window
    assert window is not None
    made = []
    for (a, b), label in zip(itertools.pairwise(begins.tolist()), labels.tolist(), strict=True):
        windows = features.build_windows(rows, np.arange(a, b - window.rows + 1, STEP), shipped.manifest.input)
        ours, theirs = model.invoke(windows), other.invoke(windows * factor)
        said, others, true = ours.argmax(axis=1), theirs.argmax(axis=1), order[label]
        made.append(Both(said == others, said == true, others == true, *_chances(shipped.manifest, ours, theirs)))
    return tuple(made)


def _chances(manifest: Manifest, *outputs: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """That each answer is right, by its score."""
    found = [scores.from_outputs(one, manifest).score for one in outputs]
    return [one for one in found if one is not None]


def truths(some: Sequence[Both]) -> dict[str, float]:
    n = sum(len(one.same) for one in some)
    return {
        "agreement": sum(int(one.same.sum()) for one in some) / n,
        "labelled gain": sum(int(one.beside.sum()) - int(one.right.sum()) for one in some) / n,
        "expected gain": sum(float(one.other.sum() - one.chance.sum()) for one in some) / n,
    }


def drawn(random: np.random.Generator, some: Sequence[Both], windows: int, count: int) -> list[ComparisonBlock]:
    """So many blocks of so many windows."""
    chosen: list[Both] = []
    while sum(len(one.same) for one in chosen) < windows * count:
        chosen.append(some[int(random.integers(len(some)))])
    joined = Both(*(np.concatenate([getattr(one, name) for one in chosen]) for name in Both.__dataclass_fields__))
    return [ComparisonBlock(_tally(joined, slice(i * windows, (i + 1) * windows))) for i in range(count)]


def _tally(one: Both, part: slice) -> ComparisonStats:
    ours, theirs, n = one.right[part], one.beside[part], len(one.same[part])
    counts = [int(found.sum()) for found in (ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs)]
    model = BundleStats(n, 0.0, expected=Moments(n, float(one.chance[part].mean())))
    beside = BundleStats(n, 0.0, expected=Moments(n, float(one.other[part].mean())))
    return ComparisonStats(
        1, n, int(one.same[part].sum()), Moments(), model, beside, (counts[0], counts[1], counts[2], counts[3])
    )


Drawn = Callable[[np.random.Generator], list[ComparisonBlock]]


def cases() -> dict[str, tuple[Drawn, dict[str, float]]]:
    """By name: what draws the blocks, and the truth of each estimate."""
    found: dict[str, tuple[Drawn, dict[str, float]]] = {}
    for change, windows, count in itertools.product(("sensitive", "scaled"), (6, 24), (12, 20, 60)):
        some = recordings(change)
        name = f"recordings, {change}, {windows} windows a message, {count} messages"
        found[name] = (partial(drawn, some=some, windows=windows, count=count), truths(some))
    return found
