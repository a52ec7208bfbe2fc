"""Order of labels: a wrong one is named, and chance or a lazy model gives no hint."""

from __future__ import annotations

import numpy as np
import pytest

from outstation.ml.performance.label_order import describe_better_order


def test_reversed_labels_are_named_with_both_accuracies() -> None:
    truth = np.arange(100) % 2
    predicted = 1 - truth
    predicted[:2] = truth[:2]
    text = describe_better_order(["blocked", "ok"], truth, predicted)
    assert text is not None
    assert text.startswith("with labels in the order [ok, blocked] accuracy would be 0.98, as they are it is 0.02")


def test_a_permutation_of_many_labels_is_named_despite_errors() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 7, 2000)
    order = rng.permutation(7)
    predicted = np.argsort(order)[truth]
    wrong = rng.random(2000) < 0.4
    predicted[wrong] = rng.integers(0, 7, int(wrong.sum()))
    text = describe_better_order([f"c{i}" for i in range(7)], truth, predicted)
    assert text is not None
    assert f"[{', '.join(f'c{i}' for i in order)}]" in text


@pytest.mark.parametrize("kind", ["right", "chance", "one class"])
def test_no_order_is_proposed_without_evidence(kind: str) -> None:
    rng = np.random.default_rng(4)
    truth = rng.choice(3, 200, p=[0.2, 0.3, 0.5])
    predicted = {"right": truth, "chance": rng.integers(0, 3, 200), "one class": np.zeros(200, np.int64)}[kind]
    assert describe_better_order(["a", "b", "c"], truth, predicted) is None


def test_few_windows_propose_nothing() -> None:
    truth = np.arange(19) % 2
    assert describe_better_order(["a", "b"], truth, 1 - truth) is None
