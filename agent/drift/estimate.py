"""Expected accuracy without labels, from how sure the model is.

Source: confidence-based performance estimation (CBPE), Garg et al. (2022), Leveraging unlabeled data to predict
out-of-distribution performance, and NannyML. Here on score bins: the reference says how often an answer in each bin was
right, a drift window says how many answers fell in it. It sees doubt, not error made with confidence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from agent.drift.codec import Floats, Ints

ASSUMES = "scores mean what they meant on the reference data; no concept drift"
PRIOR = 2.0  # pseudo-counts of the overall accuracy in each bin


OVER = 3  # drift windows that are told of together


def usual(n: Ints, correct: Ints | None, scores: Ints) -> tuple[float, float] | None:
    """Mean of the accuracy that windows with `scores` (K, 32) lead to expect, and its sd over OVER of them in a row.

    Neighbouring windows are alike, and so are classes that are hard: chance in single answers would tell too little.
    None where nobody has told which answers were right.
    """
    if correct is None or not correct.any() or len(scores) <= OVER:
        return None
    together = np.lib.stride_tricks.sliding_window_view(scores, OVER, axis=0).sum(-1)
    right = _right(n, correct)
    expected = (together * right).sum(1) / np.maximum(together.sum(1), 1)
    return float(expected.mean()), float(expected.std(ddof=1))


def _right(n: Ints, correct: Ints) -> Floats:
    """(32,) how often an answer in each bin is right."""
    return np.asarray((correct + PRIOR * correct.sum() / n.sum()) / (n + PRIOR))


def cbpe(n: Ints, correct: Ints, current: Ints) -> dict[str, Any] | None:
    """Accuracy with a 95 % interval from reference answers `n`, how many were `correct`, and `current` ones per bin.

    The interval covers chance in the window's answers and in the reference's table. None without answers.
    """
    answers, known = int(current.sum()), int(n.sum())
    if not answers or not known:
        return None
    right = _right(n, correct)
    share = current / answers
    accuracy = float((share * right).sum())
    doubt = right * (1 - right)
    spread = 1.96 * float(np.sqrt((share * doubt / answers + share**2 * doubt / (n + PRIOR + 1)).sum()))
    return {
        "accuracy": round(accuracy, 4),
        "low": round(max(0.0, accuracy - spread), 4),
        "high": round(min(1.0, accuracy + spread), 4),
        "method": "cbpe",
        "assumes": ASSUMES,
    }
