"""Confidence-based performance estimation (CBPE): the accuracy to expect without labels, from the model's scores.

Source: Garg et al. (2022), Leveraging unlabeled data to predict out-of-distribution performance, and NannyML. Here on
score bins: the reference holds how often answers in each bin were right, made to ascend, and a drift window how many
answers fell in it. CBPE sees doubt; it does not see confident errors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from outstation.foundation.arrays import Float64s, Ints
from outstation.foundation.indices import repeat

ASSUMES = "scores mean what they meant on the reference data; no concept drift"
PRIOR = 2.0  # pseudo-counts of the overall accuracy in each bin, for the uncertainty of the table itself
EMPTY_BIN_WEIGHT = 1e-6  # weight of a bin without reference answers, which then follows its neighbours
MAX_BIN_ANSWERS = 1 << 40  # sums over bins fit 64 bits
POOLED_WINDOWS = 3  # consecutive drift windows that are estimated together


def promised_spread(promised: Float64s, counts: Ints) -> tuple[float, float] | None:
    """Return mean and sd of what windows promise by `counts` (K, 32), POOLED_WINDOWS in a row at a time.

    `promised` (32,) is the accuracy of each bin, or its error. The sd comes from windows, not from single answers,
    because neighbouring windows are alike. None if bins promise nothing.
    """
    if not promised.any() or len(counts) <= POOLED_WINDOWS:
        return None
    together = np.lib.stride_tricks.sliding_window_view(counts, POOLED_WINDOWS, axis=0).sum(-1)
    expected = (together * promised).sum(1) / np.maximum(together.sum(1), 1)
    return float(expected.mean()), float(expected.std(ddof=1))


def estimate_bin_accuracy(n: Ints, correct: Ints) -> Float64s:
    """Return the accuracy (32,) of each bin, from `n` reference answers, at least one, of which some are `correct`."""
    weight = np.asarray(n + EMPTY_BIN_WEIGHT, np.float64)
    return isotonic_regression((correct + EMPTY_BIN_WEIGHT * correct.sum() / n.sum()) / weight, weight)


def estimate_accuracy(
    n: Ints, correct: Ints, current: Ints, bin_accuracy: Float64s | None = None
) -> dict[str, Any] | None:
    """Return the expected accuracy with a 95 % interval, from `n` and `correct` reference answers and `current` ones.

    The interval covers chance in the window's answers and in the reference's table. None without answers.
    `bin_accuracy` is the result of `estimate_bin_accuracy`, if it is known already.
    """
    answers, known = int(current.sum()), int(n.sum())
    if not answers or not known:
        return None
    bin_accuracy = estimate_bin_accuracy(n, correct) if bin_accuracy is None else bin_accuracy
    overall = correct.sum() / known
    share = current / answers
    accuracy = float((share * bin_accuracy).sum())
    # A few right answers do not make a bin certain.
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
    """Return the probability (w,) that answers with `scores` are right, by a table with bins between `edges`."""
    often = (correct + PRIOR * float(correct.sum()) / max(1, int(n.sum()))) / (n + PRIOR)
    return np.asarray(often[np.searchsorted(edges, scores, side="right")], np.float64)


def isotonic_regression(values: Float64s, weights: Float64s) -> Float64s:
    """Return the ascending sequence nearest to `values` by weighted squares (Ayer et al. 1955)."""
    blocks: list[tuple[float, float, int]] = []  # value, weight, count
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        count = 1
        while blocks and blocks[-1][0] >= value:
            before, its_weight, its_count = blocks.pop()
            value = (before * its_weight + value * weight) / (its_weight + weight)
            weight, count = weight + its_weight, count + its_count
        blocks.append((value, weight, count))
    return repeat([value for value, _, _ in blocks], [count for *_, count in blocks])
