"""Blocks of the shipped `exercise` and of variants, over recordings outside their training sets.

Recordings are drawn with replacement and concatenated, so the truth is the value over all of them.
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
from agent.model.inference import features, runtime, scores
from agent.wire.messages import BundleStats, Moments
from scripts.kit.rigged import SHIPPED, build_rigged_bundle

STEP = 50


@dataclass(frozen=True)
class Both:
    """Per-window results of both bundles on one recording: correctness, agreement and predicted probabilities."""

    same: NDArray[np.bool_]
    right: NDArray[np.bool_]
    candidate: NDArray[np.bool_]
    chance: NDArray[np.float64]
    other: NDArray[np.float64]


@cache
def recordings(change: str) -> tuple[Both, ...]:
    """Return recordings of both bundles.

    `sensitive` names the first class for large values; `scaled` has a scaling off by 30 %.
    """
    shipped = bundle.read(SHIPPED, None)
    model = runtime.load_model(shipped.manifest, shipped.model_bytes)
    other = runtime.TfliteModel(build_rigged_bundle("sensitive")["model.tflite"]) if change == "sensitive" else model
    factor = np.float32(1.3 if change == "scaled" else 1.0)
    with np.load(SHIPPED.parent / "recordings" / "exercise.npz") as archive:
        rows, begins, labels, names = archive["rows"], archive["starts"], archive["label"], archive["labels"]
    order = [list(shipped.manifest.output.labels or []).index(str(name)) for name in names]
    window = shipped.manifest.input.window
    assert window is not None
    made = []
    for (a, b), label in zip(itertools.pairwise(begins.tolist()), labels.tolist(), strict=True):
        windows = features.build_windows(rows, np.arange(a, b - window.rows + 1, STEP), shipped.manifest.input)
        ours, theirs = model.invoke(windows), other.invoke(windows * factor)
        predicted, others, true = ours.argmax(axis=1), theirs.argmax(axis=1), order[label]
        made.append(
            Both(predicted == others, predicted == true, others == true, *_chances(shipped.manifest, ours, theirs))
        )
    return tuple(made)


def _chances(manifest: Manifest, *outputs: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """Return the probability that each answer is correct, from its score."""
    score_list = [scores.from_outputs(output, manifest).score for output in outputs]
    return [output for output in score_list if output is not None]


def truths(chosen_recordings: Sequence[Both]) -> dict[str, float]:
    n = sum(len(recording.same) for recording in chosen_recordings)
    return {
        "agreement": sum(int(recording.same.sum()) for recording in chosen_recordings) / n,
        "labelled gain": sum(
            int(recording.candidate.sum()) - int(recording.right.sum()) for recording in chosen_recordings
        )
        / n,
        "expected gain": sum(float(recording.other.sum() - recording.chance.sum()) for recording in chosen_recordings)
        / n,
    }


def drawn(
    random: np.random.Generator, chosen_recordings: Sequence[Both], windows: int, count: int
) -> list[ComparisonBlock]:
    """Draw blocks of windows."""
    chosen: list[Both] = []
    while sum(len(recording.same) for recording in chosen) < windows * count:
        chosen.append(chosen_recordings[int(random.integers(len(chosen_recordings)))])
    joined = Both(
        *(np.concatenate([getattr(recording, name) for recording in chosen]) for name in Both.__dataclass_fields__)
    )
    return [ComparisonBlock(_tally(joined, slice(i * windows, (i + 1) * windows))) for i in range(count)]


def _tally(recording: Both, part: slice) -> ComparisonStats:
    ours, theirs, n = recording.right[part], recording.candidate[part], len(recording.same[part])
    counts = [int(mask.sum()) for mask in (ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs)]
    model = BundleStats(n, 0.0, expected_accuracy=Moments(n, float(recording.chance[part].mean())))
    other_stats = BundleStats(n, 0.0, expected_accuracy=Moments(n, float(recording.other[part].mean())))
    return ComparisonStats(
        1,
        n,
        int(recording.same[part].sum()),
        Moments(),
        model,
        other_stats,
        (counts[0], counts[1], counts[2], counts[3]),
    )


Drawn = Callable[[np.random.Generator], list[ComparisonBlock]]


def cases() -> dict[str, tuple[Drawn, dict[str, float]]]:
    """Return, by name, the generator of the blocks and the truth of each estimate."""
    cases_by_name: dict[str, tuple[Drawn, dict[str, float]]] = {}
    for change, windows, count in itertools.product(("sensitive", "scaled"), (6, 24), (12, 20, 60)):
        chosen_recordings = recordings(change)
        name = f"recordings, {change}, {windows} windows a message, {count} messages"
        cases_by_name[name] = (
            partial(drawn, chosen_recordings=chosen_recordings, windows=windows, count=count),
            truths(chosen_recordings),
        )
    return cases_by_name
