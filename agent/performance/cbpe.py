"""Expected accuracy without labels, from how sure the model is.

Source: confidence-based performance estimation (CBPE), Garg et al. (2022), Leveraging unlabeled data to predict
out-of-distribution performance, and NannyML. Here on score bins: the reference says how often an answer in each bin was
right, never less often where the model was surer, and a drift window says how many answers fell in it. It sees doubt,
not error made with confidence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from agent.arrays import Float64s, Ints

ASSUMES = "scores mean what they meant on the reference data; no concept drift"
PRIOR = 2.0  # pseudo-counts of the overall accuracy in each bin, for how sure the table itself is
EMPTY_BIN_WEIGHT = 1e-6  # for a bin without reference answers, which then takes after its neighbours
POOLED_WINDOWS = 3  # drift windows that are told of together


def expected_accuracy_spread(n: Ints, correct: Ints | None, scores: Ints) -> tuple[float, float] | None:
    """Mean of the accuracy that windows with `scores` (K, 32) lead to expect, and its sd over OVER of them in a row.

    Neighbouring windows are alike, and so are classes that are hard: chance in single answers would tell too little.
    None where nobody has told which answers were right.
    """
    if correct is None or not correct.any() or len(scores) <= POOLED_WINDOWS:
        return None
    together = np.lib.stride_tricks.sliding_window_view(scores, POOLED_WINDOWS, axis=0).sum(-1)
    expected = (together * estimate_bin_accuracy(n, correct)).sum(1) / np.maximum(together.sum(1), 1)
    return float(expected.mean()), float(expected.std(ddof=1))


def estimate_bin_accuracy(n: Ints, correct: Ints) -> Float64s:
    """(32,) how often an answer in each bin is right, of reference answers `n`, more than none, how many were
    `correct`."""
    weight = np.asarray(n + EMPTY_BIN_WEIGHT, np.float64)
    return isotonic_regression((correct + EMPTY_BIN_WEIGHT * correct.sum() / n.sum()) / weight, weight)


def estimate_accuracy(
    n: Ints, correct: Ints, current: Ints, bin_accuracy: Float64s | None = None
) -> dict[str, Any] | None:
    """Accuracy with a 95 % interval from reference answers `n`, how many were `correct`, and `current` ones per bin.

    The interval covers chance in the window's answers and in the reference's table. None without answers. `right` is
    what `often_right` says, where that is known already.
    """
    answers, known = int(current.sum()), int(n.sum())
    if not answers or not known:
        return None
    bin_accuracy, overall = (
        estimate_bin_accuracy(n, correct) if bin_accuracy is None else bin_accuracy,
        correct.sum() / known,
    )
    share = current / answers
    accuracy = float((share * bin_accuracy).sum())
    # A bin whose few answers were all right is not beyond doubt.
    cautious = (correct + PRIOR * overall) / (n + PRIOR)
    doubt = cautious * (1 - cautious)
    spread = 1.96 * float(np.sqrt((share * doubt / answers + share**2 * doubt / (n + PRIOR + 1)).sum()))
    return {
        "accuracy": round(accuracy, 4),
        "low": round(max(0.0, accuracy - spread), 4),
        "high": round(min(1.0, accuracy + spread), 4),
        "method": "cbpe",
        "assumes": ASSUMES,
    }


def correctness_probabilities(n: Ints, correct: Ints, edges: Float64s, scores: Float64s) -> Float64s:
    """How often answers with `scores` (w,) are right by the reference's table, whose bins lie between `edges`."""
    often = (correct + PRIOR * float(correct.sum()) / max(1, int(n.sum()))) / (n + PRIOR)
    return np.asarray(often[np.searchsorted(edges, scores, side="right")], np.float64)


def isotonic_regression(values: Float64s, weights: Float64s) -> Float64s:
    """The never falling sequence that is nearest to `values` by weighted squares.

    Source: Ayer et al. (1955), An empirical distribution function for sampling with incomplete information: pools
    adjacent violators, as isotonic calibration does on single scores.
    """
    blocks: list[tuple[float, float, int]] = []  # value, weight, how many
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        count = 1
        while blocks and blocks[-1][0] >= value:
            before, its_weight, its_count = blocks.pop()
            value = (before * its_weight + value * weight) / (its_weight + weight)
            weight, count = weight + its_weight, count + its_count
        blocks.append((value, weight, count))
    return np.repeat([value for value, _, _ in blocks], [count for *_, count in blocks])
