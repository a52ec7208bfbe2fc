"""What the labels look like: classes that are rare, and labels the model contradicts with certainty.

Source of the latter: confident learning (Northcutt, Jiang, Chuang 2021): an answer is certain where its probability
reaches the usual one of that class among results that bear its label.
"""

from __future__ import annotations

import numpy as np

from agent.evaluation.document import CheckResult, SuspectLabel
from agent.evaluation.examples import LabelledWindows
from agent.performance.metrics import LabelledPredictions

_MAX_CLASS_RATIO = 10
_MIN_CLASS_WINDOWS = 20
_MAX_SUSPECTS = 20
_MAX_NOISE_SHARE = 0.02
_MIN_CONFIDENCE = 0.9


def check_class_balance(counts: dict[str, int], accuracy: float | None) -> list[CheckResult]:
    """Of classes, by how many windows each has."""
    if not counts:
        return []
    most, least = max(counts, key=lambda c: counts[c]), min(counts, key=lambda c: counts[c])
    ratio = counts[most] / max(1, counts[least])
    share = counts[most] / sum(counts.values())
    found = []
    if ratio >= _MAX_CLASS_RATIO:
        text = f"{most} has {ratio:.0f} times as many windows as {least} ({counts[most]} and {counts[least]})"
        found.append(_warning("imbalance", f"{text}: read F1 and the classes, not accuracy alone."))
    if counts[least] < _MIN_CLASS_WINDOWS:
        text = f"{least} has {counts[least]} windows: too few to say how well it is told."
        found.append(_warning("few", text))
    if accuracy is not None and accuracy <= share:
        text = f"Accuracy {accuracy:.3f} is no better than always saying {most} ({share:.3f})."
        found.append(_warning("no better than one answer", text))
    usual = f"Classes have {counts[least]} to {counts[most]} windows."
    return found or [CheckResult(check="imbalance", state="ok", summary=usual)]


def check_label_noise(
    labels: list[str], pairs: LabelledPredictions, examples: LabelledWindows
) -> tuple[list[CheckResult], list[SuspectLabel]]:
    """Labels that are contradicted with certainty, the most certain first."""
    if pairs.probabilities is None or pairs.predicted is None or not np.isfinite(pairs.probabilities).all():
        return [], []
    truth, said, full = pairs.truth.astype(np.int64), pairs.predicted, pairs.probabilities
    own = full[np.arange(len(truth)), truth]
    meant = np.bincount(truth, minlength=full.shape[1])
    with np.errstate(invalid="ignore"):
        usual = np.bincount(truth, own, full.shape[1]) / meant
    told = full[np.arange(len(said)), said]
    certain = (said != truth) & (told >= np.maximum(np.nan_to_num(usual[said], nan=1.0), _MIN_CONFIDENCE))
    ordered = np.flatnonzero(certain)[np.argsort(-told[certain], kind="stable")]
    suspects = [
        SuspectLabel(
            row=int(examples.dataset.row_numbers[examples.last[i]]),
            file=examples.dataset.files[examples.dataset.file_index[examples.last[i]]].name,
            label=labels[truth[i]],
            said=labels[said[i]],
            score=float(f"{told[i]:.4g}"),
        )
        for i in ordered[:_MAX_SUSPECTS]
    ]
    share = len(ordered) / len(truth)
    text = f"{len(ordered)} of {len(truth)} labels ({share:.1%}) are contradicted with certainty"
    if share >= _MAX_NOISE_SHARE:
        return [_warning("label noise", f"{text}: look at them before the model; some may be wrong labels.")], suspects
    return [CheckResult(check="label noise", state="ok", summary=f"{text}.")], suspects


def _warning(check: str, summary: str) -> CheckResult:
    return CheckResult(check=check, state="warning", summary=summary)
