"""Expected accuracy without labels, from how sure the model is.

Source: confidence-based performance estimation (CBPE), Garg et al. (2022), Leveraging unlabeled data to predict
out-of-distribution performance, and NannyML. Here on score bins: the reference says how often an answer in each bin was
right, a drift window says how many answers fell in it. It sees doubt, not error made with confidence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from agent.drift.codec import Ints

ASSUMES = "scores mean what they meant on the reference data; no concept drift"
PRIOR = 2.0  # pseudo-counts of the overall accuracy in each bin


def cbpe(n: Ints, correct: Ints, current: Ints) -> dict[str, Any] | None:
    """Accuracy with a 95 % interval from reference answers `n`, how many were `correct`, and `current` ones per bin.

    The interval covers chance in the window's answers and in the reference's table. None without answers.
    """
    answers, known = int(current.sum()), int(n.sum())
    if not answers or not known:
        return None
    right = (correct + PRIOR * correct.sum() / known) / (n + PRIOR)
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
