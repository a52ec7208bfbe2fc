"""Leakage checks: rows, groups or times that the test shares with the training data, and fields that hold the label.

Duplicates are found by fingerprints of runs of rows. Target leakage is a field that alone predicts the label: often it
is the label, recorded among the readings.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation import clock
from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints
from outstation.foundation.text import list_names
from outstation.ml.performance.metrics import LabelledPredictions, compute_value
from outstation.workbench.evaluation.document import CheckResult, not_checked, passed, warning
from outstation.workbench.evaluation.examples import Dataset, LabelledWindows, training_mask
from outstation.workbench.evaluation.sensitivity import WindowSample

TRAIN_TEST_DUPLICATES, GROUP_LEAKAGE = "train-test duplicates", "group leakage"
DUPLICATE_GROUPS, TEMPORAL_LEAKAGE, TARGET_LEAKAGE = "duplicate groups", "temporal leakage", "target leakage"
# Share of windows that may hold rows of the training data.
_MAX_DUPLICATE_SHARE = 0.01
# Share of a group's windows; larger for windows of one row, because single rows repeat by chance.
_MAX_GROUP_DUPLICATES, _MAX_GROUP_DUPLICATES_ROWS = 0.05, 0.8
_MAX_NAMES = 5
# Rows of a window that make one fingerprint: more would miss windows that were cut elsewhere.
_ROWS_PER_FINGERPRINT = 8
_MAX_EXPECTED_MATCHES = 0.05
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Score of a single field that is leakage; the task is easy if other fields reach the second one.
LEAKAGE_SCORE, _EASY_TASK_SCORE = 0.98, 0.9
_MIN_WINDOWS = 40
Fingerprints = NDArray[np.uint64]


class TrainingRows(msgspec.Struct, frozen=True, eq=False):
    """Rows that the model was trained on: those of `dataset` that `mask` (n,) selects."""

    dataset: Dataset
    mask: Bools


def training_rows(dataset: Dataset, split: str | None, train: Dataset | None) -> TrainingRows | None:
    """Return the training data, or the training split of the test data; None without either."""
    if train is not None:
        return TrainingRows(train, np.ones(len(train.values), bool))
    return TrainingRows(dataset, training_mask(dataset.columns[split])) if split is not None else None


def check_train_test(
    windows: LabelledWindows, window_rows: int, group: str | None, train: TrainingRows | None
) -> list[CheckResult]:
    checks = [_check_duplicates(windows, window_rows, train), _check_groups(windows, group, train)]
    if group is not None:
        checks.append(_check_duplicate_groups(windows, window_rows, group))
    return [*checks, _check_time_order(windows, train)]


def _check_duplicates(windows: LabelledWindows, window_rows: int, train: TrainingRows | None) -> CheckResult:
    if train is None:
        return not_checked(TRAIN_TEST_DUPLICATES, "Name the training data (--train), or the split column (--split).")
    own, _ = fingerprint_rows(windows.dataset.values, window_rows)
    theirs, distinctive = fingerprint_rows(train.dataset.values, window_rows)
    distinctive &= train.mask[: len(theirs)] & train.mask[len(train.mask) - len(theirs) :]
    hit = any_in_windows(np.isin(own, theirs[distinctive]), windows.starts, window_rows)
    share = float(hit.mean())
    text = f"{int(hit.sum())} of {len(hit)} windows ({share:.1%}) hold rows of the training data"
    if share < _MAX_DUPLICATE_SHARE:
        return passed(TRAIN_TEST_DUPLICATES, f"{text}.")
    # Single rows repeat by chance, within the training data as well.
    counts = np.unique(theirs[distinctive], return_counts=True)[1]
    repeated = float(counts[counts > 1].sum()) / max(1, int(distinctive.sum()))
    if window_rows == 1 and share < _MAX_DUPLICATE_SHARE + 2 * repeated:
        return passed(TRAIN_TEST_DUPLICATES, f"{text}, about as many as repeat within the training data.")
    return warning(TRAIN_TEST_DUPLICATES, f"{text}: the metrics are of data that the model knows.")


def _check_groups(windows: LabelledWindows, group: str | None, train: TrainingRows | None) -> CheckResult:
    if group is None:
        return not_checked(GROUP_LEAKAGE, "Name the column of people, machines or sites (--group).")
    if train is None:
        return not_checked(GROUP_LEAKAGE, "Name the training data (--train), or the split column (--split).")
    if group not in train.dataset.columns:
        return not_checked(GROUP_LEAKAGE, f"The training data have no column {group}.")
    shared = sorted(set(windows.columns[group].tolist()) & set(train.dataset.columns[group][train.mask].tolist()))
    if not shared:
        return passed(GROUP_LEAKAGE, f"No {group} of the test is in the training data.")
    text = f"{group} {list_names(shared, _MAX_NAMES)} {'is' if len(shared) == 1 else 'are'} in the training data, too"
    return warning(GROUP_LEAKAGE, f"{text}: the metrics do not show how the model does on a new {group}.")


def _check_duplicate_groups(windows: LabelledWindows, window_rows: int, group: str) -> CheckResult:
    """Look for the same rows under two names."""
    dataset = windows.dataset
    own, distinctive = fingerprint_rows(dataset.values, window_rows)
    _, group_index = np.unique(dataset.columns[group], return_inverse=True)
    places = np.flatnonzero(distinctive)
    _, at = np.unique(own[places], return_inverse=True)
    low, high = np.full(at.max(initial=-1) + 1, len(group_index)), np.full(at.max(initial=-1) + 1, -1)
    np.minimum.at(low, at, group_index[places])
    np.maximum.at(high, at, group_index[places])
    shared = np.zeros(len(own), bool)
    shared[places] = (low < high)[at]
    hit = any_in_windows(shared, windows.starts, window_rows)
    checked = any_in_windows(distinctive, windows.starts, window_rows)
    names, limit = windows.columns[group], _MAX_GROUP_DUPLICATES if window_rows > 1 else _MAX_GROUP_DUPLICATES_ROWS
    duplicates = [
        str(name)
        for name in np.unique(names)
        if hit[names == name].sum() >= limit * max(1, checked[names == name].sum())
    ]
    if not duplicates:
        return passed(DUPLICATE_GROUPS, f"No {group} shares rows with another ({hit.mean():.1%} of windows).")
    share = f"{hit.mean():.1%} of all windows"
    text = f"{group} {list_names(duplicates, _MAX_NAMES)} share rows with another {group} ({share})"
    return warning(DUPLICATE_GROUPS, f"{text}: one of them is counted twice, perhaps under a wrong name.")


def _check_time_order(windows: LabelledWindows, train: TrainingRows | None) -> CheckResult:
    if train is None or not windows.dataset.has_time or not train.dataset.has_time:
        return not_checked(TEMPORAL_LEAKAGE, "It needs training data, and a column t in both.")
    latest = int(train.dataset.t[train.mask].max(initial=0))
    early = windows.dataset.t[windows.last] <= latest
    if not early.any():
        return passed(TEMPORAL_LEAKAGE, "All windows are later than the training data.")
    text = f"{early.mean():.0%} of the windows are not later than the last training row ({clock.to_rfc3339(latest)})"
    return warning(TEMPORAL_LEAKAGE, f"{text}: a deployed model never learns from the future.")


def check_target_leakage(sample: WindowSample) -> CheckResult:
    """Warn of fields that alone predict the label.

    Each field's mean, spread and last value in a window predicts by itself, from the nearest one in the other half of
    the windows: accuracy, or R². For anomalies, AUC of the value.
    """
    names = sample.inference.fields
    if len(names) < 2:
        return not_checked(TARGET_LEAKAGE, "There is one field only.")
    if len(sample.labelled) < _MIN_WINDOWS:
        return not_checked(TARGET_LEAKAGE, f"{len(sample.labelled)} windows are too few.")
    metric = {"classify": "accuracy", "regress": "R²", "anomaly": "AUC"}[sample.kind]
    scores = {name: max(_field_scores(sample, i)) for i, name in enumerate(names)}
    ranked = sorted(names, key=lambda name: -scores[name])
    leaking = [name for name in ranked if scores[name] >= LEAKAGE_SCORE]
    others = [name for name in ranked if name not in leaking]
    best = f"{ranked[0]} alone reaches {metric} {scores[ranked[0]]:.3f}"
    if not leaking:
        return passed(TARGET_LEAKAGE, f"No field alone predicts the label; {best}.")
    if len(leaking) > 1 and (not others or scores[others[0]] >= _EASY_TASK_SCORE):
        return passed(TARGET_LEAKAGE, f"Many fields predict the label, an easy task; {best}.")
    shown = ", ".join(f"{name} ({scores[name]:.3f})" for name in leaking[:_MAX_NAMES])
    other = f"; the best of the others, {others[0]}, {scores[others[0]]:.3f}" if others else ""
    text = f"{shown} alone predicts the label ({metric}{other}): was it known before the label was?"
    return warning(TARGET_LEAKAGE, text)


def _field_scores(sample: WindowSample, field: int) -> Iterator[float]:
    values = sample.windows[:, -sample.inference.rows :, field].astype(np.float64)
    known = np.isfinite(values)
    count = known.sum(axis=1)
    filled = np.where(known, values, 0.0)
    mean = filled.sum(axis=1) / np.maximum(count, 1)
    summaries = [np.where(known[:, -1], filled[:, -1], mean)]
    if values.shape[1] > 1:
        deviations = np.where(known, values - mean[:, None], 0.0)
        summaries += [mean, np.sqrt((deviations**2).sum(axis=1) / np.maximum(count, 1))]
    truth = sample.labelled.truth
    for summary in summaries:
        if sample.kind == "anomaly":
            score = compute_value("auc", "anomaly", LabelledPredictions(truth, value=summary))
            yield max(score, 1 - score)
        else:
            predicted = _predict_from_nearest(summary, truth)
            if sample.kind == "classify":
                yield float((predicted == truth).mean())
            else:
                yield compute_value("r2", "regress", LabelledPredictions(truth, value=predicted))


def _predict_from_nearest(values: Float64s, truth: Float64s) -> Float64s:
    """Predict each truth from that of the nearest value in the other half, which is every second window."""
    half = np.arange(len(values)) % 2
    predicted = np.empty(len(values))
    for learn, test in ((half == 0, half == 1), (half == 1, half == 0)):
        order = np.argsort(values[learn], kind="stable")
        known, known_truth = values[learn][order], truth[learn][order]
        above = np.clip(np.searchsorted(known, values[test]), 1, len(known) - 1)
        is_above = np.abs(known[above] - values[test]) < np.abs(known[above - 1] - values[test])
        predicted[test] = known_truth[np.where(is_above, above, above - 1)]
    return predicted


def fingerprint_rows(rows: Float32s, window_rows: int) -> tuple[Fingerprints, Bools]:
    """Return fingerprints (n - k + 1,) of k rows, and which are distinctive: not constant, not by chance."""
    k = min(_ROWS_PER_FINGERPRINT, window_rows)
    bits = (rows + np.float32(0)).view(np.uint32).astype(np.uint64)
    hashes = np.zeros(len(rows), np.uint64)
    for column in bits.T:
        words = hashes * _HASH_MULTIPLIER + column
        words = (words ^ (words >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        hashes = np.asarray(words ^ (words >> np.uint64(29)))
    count = max(0, len(rows) - k + 1)
    fingerprints, constant = np.zeros(count, np.uint64), np.ones(count, bool)
    for i in range(k):
        fingerprints = fingerprints * np.uint64(1_000_003) + hashes[i : i + count]
        constant &= hashes[i : i + count] == hashes[:count]
    if k > 1:
        return fingerprints, ~constant
    # How many equal rows are expected if fields are independent.
    expected = np.full(len(rows), float(len(rows)))
    for values in rows.T:
        _, at, repeats = np.unique(values, return_inverse=True, return_counts=True)
        expected *= repeats[at] / len(rows)
    return fingerprints, np.isfinite(rows).any(axis=1) & (expected < _MAX_EXPECTED_MATCHES)


def any_in_windows(mask: Bools, starts: Ints, window_rows: int) -> Bools:
    """Return (w,) whether the mask holds for one of the fingerprints within each window."""
    within = window_rows - min(_ROWS_PER_FINGERPRINT, window_rows) + 1
    sums = np.concatenate([[0], np.cumsum(mask)])
    return np.asarray(sums[starts + within] > sums[starts])
