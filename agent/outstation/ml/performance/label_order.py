"""Label order: the assignment of a model's outputs to labels that agrees best with labelled windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outstation.foundation.arrays import Ints
from outstation.foundation.indices import bincount

_MAX_CLASSES = 200
_MAX_NAMED = 20
_MIN_WINDOWS = 20
_MIN_GAIN = 0.1


def describe_better_order(labels: Sequence[str], truth: Ints, predicted: Ints) -> str | None:
    """Return a sentence with the order of `labels` in which accuracy is clearly higher; None if there is none.

    `truth` and `predicted` (n,) are indices of labels. Clearly: by 0.1, more than chance, and above the largest class,
    so that a model that always names one class gives no hint.
    """
    n, k = len(truth), len(labels)
    if n < _MIN_WINDOWS or not 2 <= k <= _MAX_CLASSES:
        return None
    confusion = bincount(predicted * k + truth, minlength=k * k).reshape(k, k)
    order = _assign(confusion)
    accuracy, other = np.trace(confusion) / n, confusion[np.arange(k), order].sum() / n
    largest = confusion.sum(axis=0).max() / n
    if other < max(accuracy, largest) + max(_MIN_GAIN, 2 / np.sqrt(n)):
        return None
    names = ", ".join(labels[i] for i in order[:_MAX_NAMED]) + (", …" if k > _MAX_NAMED else "")
    return (
        f"with labels in the order [{names}] accuracy would be {other:.2f}, as they are it is {accuracy:.2f}: compare "
        "with the order of the training"
    )


def _assign(confusion: Ints) -> Ints:
    """Return a label for each output: the largest cells first, then exchanges of two labels while they gain."""
    k = len(confusion)
    order = np.full(k, -1)
    is_free = np.ones(k, bool)
    for cell in np.argsort(-confusion, axis=None, kind="stable").tolist():
        output, label = divmod(cell, k)
        if order[output] < 0 and is_free[label]:
            order[output], is_free[label] = label, False
    while True:
        own = confusion[np.arange(k), order]
        crossed = confusion[:, order]
        gain = crossed + crossed.T - own[:, None] - own[None, :]
        first, second = divmod(int(gain.argmax()), k)
        if gain[first, second] <= 0:
            return order
        order[[first, second]] = order[[second, first]]
