"""Label checks: class imbalance, small classes, the majority baseline, and labels that the model contradicts.

Suspect labels follow confident learning (Northcutt, Jiang, Chuang 2021): a prediction is confident if its probability
reaches the mean probability of that class among results that bear its label.
"""

from __future__ import annotations

import numpy as np

from outstation.foundation.indices import bincount
from outstation.ml.performance.label_order import describe_better_order
from outstation.ml.performance.metrics import LabelledPredictions
from outstation.workbench.evaluation.document import CheckResult, SuspectLabel, passed, warning
from outstation.workbench.evaluation.examples import LabelledWindows

CLASS_IMBALANCE, SMALL_CLASS, MAJORITY_BASELINE = "class imbalance", "small class", "majority baseline"
LABEL_NOISE, LABEL_ORDER = "label noise", "label order"
_MAX_CLASS_RATIO = 10
_MIN_CLASS_WINDOWS = 20
_MAX_SUSPECTS = 20
_MAX_NOISE_SHARE = 0.02
_MIN_CONFIDENCE = 0.9


def check_class_balance(counts: dict[str, int], accuracy: float | None) -> list[CheckResult]:
    """Check the windows of each class; nothing without classes."""
    if not counts:
        return []
    most, least = max(counts, key=lambda c: counts[c]), min(counts, key=lambda c: counts[c])
    # Nothing is a multiple of a class without windows.
    rarest = min((label for label in counts if counts[label]), key=lambda c: counts[c], default=most)
    ratio = counts[most] / max(1, counts[rarest])
    share = counts[most] / sum(counts.values())
    warnings = []
    if ratio >= _MAX_CLASS_RATIO:
        text = f"{most} has {ratio:.0f} times as many windows as {rarest} ({counts[most]} and {counts[rarest]})"
        warnings.append(warning(CLASS_IMBALANCE, f"{text}: read F1 and the classes, not accuracy alone."))
    if counts[least] < _MIN_CLASS_WINDOWS:
        text = f"{least} has {counts[least]} windows: too few to say how well the model recognises it."
        warnings.append(warning(SMALL_CLASS, text))
    if accuracy is not None and accuracy <= share:
        text = f"Accuracy {accuracy:.3f} is no better than always predicting {most} ({share:.3f})."
        warnings.append(warning(MAJORITY_BASELINE, text))
    summary = f"Classes have {counts[least]} to {counts[most]} windows."
    return warnings or [passed(CLASS_IMBALANCE, summary)]


def check_label_order(labels: list[str], kind: str, predictions: LabelledPredictions) -> list[CheckResult]:
    """Warn if another order of the labels fits the data clearly better; nothing unless the model names one class."""
    if kind != "classify" or predictions.predicted is None:
        return []
    better = describe_better_order(labels, *predictions.classes)
    return [] if better is None else [warning(LABEL_ORDER, f"{better[0].upper()}{better[1:]}.")]


def check_label_noise(
    labels: list[str], predictions: LabelledPredictions, windows: LabelledWindows
) -> tuple[list[CheckResult], list[SuspectLabel]]:
    """Return the check, and the labels that are contradicted with confidence, the most confident first."""
    probabilities = predictions.probabilities
    if probabilities is None or predictions.predicted is None or not np.isfinite(probabilities).all():
        return [], []
    truth, predicted = predictions.classes
    own = probabilities[np.arange(len(truth)), truth]
    support = bincount(truth, minlength=probabilities.shape[1])
    with np.errstate(invalid="ignore"):
        usual = bincount(truth, own, probabilities.shape[1]) / support
    confidence = probabilities[np.arange(len(predicted)), predicted]
    required = np.maximum(np.nan_to_num(usual[predicted], nan=1.0), _MIN_CONFIDENCE)
    contradicted = (predicted != truth) & (confidence >= required)
    ordered = np.flatnonzero(contradicted)[np.argsort(-confidence[contradicted], kind="stable")]
    dataset = windows.dataset
    suspects = [
        SuspectLabel(
            row=int(dataset.row_numbers[windows.last[i]]),
            file=dataset.files[dataset.file_index[windows.last[i]]].name,
            label=labels[truth[i]],
            predicted=labels[predicted[i]],
            score=float(f"{confidence[i]:.4g}"),
        )
        for i in ordered[:_MAX_SUSPECTS]
    ]
    share = len(ordered) / len(truth)
    text = f"The model contradicts {len(ordered)} of {len(truth)} labels ({share:.1%}) with confidence"
    if share >= _MAX_NOISE_SHARE:
        return [warning(LABEL_NOISE, f"{text}: look at them before the model; some may be wrong labels.")], suspects
    return [passed(LABEL_NOISE, f"{text}.")], suspects
