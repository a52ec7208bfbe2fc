"""Whether the test tells of new data at all: what the model may have seen before, and what gives the answer away."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent import clock
from agent.evaluation import prints
from agent.evaluation.document import CheckResult
from agent.evaluation.examples import Dataset, LabelledWindows, training_mask

_MAX_DUPLICATE_SHARE = 0.01  # of the windows may hold rows seen elsewhere before it is a warning
_MAX_GROUP_DUPLICATES = 0.05
_MAX_GROUP_DUPLICATES_ROWS = 0.8  # where a window is one row: some are alike by chance
_MAX_NAMES = 5


class TrainingRows(msgspec.Struct, frozen=True, eq=False):
    """Rows the model learned from: those of `source` that `where` (n,) says."""

    dataset: Dataset
    mask: NDArray[np.bool_]


def training_rows(dataset: Dataset, split: str | None, train: Dataset | None) -> TrainingRows | None:
    """What there is to compare with: other files, or the training rows of the same."""
    if train is not None:
        return TrainingRows(train, np.ones(len(train.values), bool))
    return TrainingRows(dataset, training_mask(dataset.columns[split])) if split is not None else None


def run_checks(
    examples: LabelledWindows, window_rows: int, group: str | None, train: TrainingRows | None
) -> list[CheckResult]:
    found = [_check_duplicates(examples, window_rows, train)]
    found.append(_check_group_overlap(examples, group, train))
    if group is not None:
        found.append(_check_duplicate_groups(examples, window_rows, group))
    return [*found, _check_time_order(examples, train)]


def _check_duplicates(examples: LabelledWindows, window_rows: int, train: TrainingRows | None) -> CheckResult:
    check = "rows seen in training"
    if train is None:
        return _not_checked(check, "give the training data (--train), or the column that splits (--split).")
    own, _ = prints.fingerprint_rows(examples.dataset.values, window_rows)
    theirs, telling = prints.fingerprint_rows(train.dataset.values, window_rows)
    telling &= train.mask[: len(theirs)] & train.mask[len(train.mask) - len(theirs) :]
    hit = prints.any_in_windows(np.isin(own, theirs[telling]), examples.starts, window_rows)
    share = float(hit.mean())
    text = f"{int(hit.sum())} of {len(hit)} windows ({share:.1%}) hold rows that are in the training data, too"
    if share < _MAX_DUPLICATE_SHARE:
        return _passed(check, f"{text}.")
    if window_rows == 1 and share < _MAX_DUPLICATE_SHARE + 2 * _duplicate_share(theirs[telling]):
        return _passed(check, f"{text}, about as many as repeat each other within the training data.")
    return _warning(check, f"{text}: the figures tell of data the model knows.")


def _duplicate_share(fingerprints: prints.Fingerprints) -> float:
    """Share of rows that come again in the same data: what chance gives."""
    _, count = np.unique(fingerprints, return_counts=True)
    return float(count[count > 1].sum()) / max(1, len(fingerprints))


def _check_group_overlap(examples: LabelledWindows, group: str | None, train: TrainingRows | None) -> CheckResult:
    check = "groups in both splits"
    if group is None:
        return _not_checked(check, "name the column of people, machines or sites (--group).")
    if train is None:
        return _not_checked(check, "give the training data (--train), or the column that splits (--split).")
    if group not in train.dataset.columns:
        return _not_checked(check, f"the training data have no column {group}.")
    both = sorted(set(examples.columns[group].tolist()) & set(train.dataset.columns[group][train.mask].tolist()))
    if not both:
        return _passed(check, f"No {group} of the test is in the training data.")
    text = f"{group} {_format_names(both)} {'is' if len(both) == 1 else 'are'} in the training data, too"
    return _warning(check, f"{text}: the figures do not tell how the model does on a new one.")


def _check_duplicate_groups(examples: LabelledWindows, window_rows: int, group: str) -> CheckResult:
    """The same rows under two names."""
    check = "rows in two groups"
    source = examples.dataset
    own, telling = prints.fingerprint_rows(source.values, window_rows)
    _, code = np.unique(source.columns[group], return_inverse=True)
    places = np.flatnonzero(telling)
    _, at = np.unique(own[places], return_inverse=True)
    of_print = code[places]
    low, high = np.full(at.max(initial=-1) + 1, len(code)), np.full(at.max(initial=-1) + 1, -1)
    np.minimum.at(low, at, of_print)
    np.maximum.at(high, at, of_print)
    shared = np.zeros(len(own), bool)
    shared[places] = (low < high)[at]
    hit = prints.any_in_windows(shared, examples.starts, window_rows)
    names = examples.columns[group]
    least = _MAX_GROUP_DUPLICATES if window_rows > 1 else _MAX_GROUP_DUPLICATES_ROWS
    told = prints.any_in_windows(telling, examples.starts, window_rows)
    guilty = [
        str(name) for name in np.unique(names) if hit[names == name].sum() >= least * max(1, told[names == name].sum())
    ]
    if not guilty:
        return _passed(check, f"No {group} shares rows with another ({hit.mean():.1%} of windows).")
    text = f"{group} {_format_names(guilty)} share rows with another {group} ({hit.mean():.1%} of all windows)"
    return _warning(check, f"{text}: one of them is counted twice, perhaps under a wrong name.")


def _check_time_order(examples: LabelledWindows, train: TrainingRows | None) -> CheckResult:
    check = "time order"
    if train is None or not examples.dataset.has_time or not train.dataset.has_time:
        return _not_checked(check, "it needs training data, and a column t in both.")
    latest = int(train.dataset.t[train.mask].max(initial=0))
    early = examples.dataset.t[examples.last] <= latest
    if not early.any():
        return _passed(check, "All windows are later than the training data.")
    text = f"{early.mean():.0%} of the windows are not later than the last training row ({clock.to_rfc3339(latest)})"
    return _warning(check, f"{text}: a model in use never learns from the future.")


def _format_names(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else "")


def _passed(check: str, summary: str) -> CheckResult:
    return CheckResult(check=check, state="ok", summary=summary)


def _warning(check: str, summary: str) -> CheckResult:
    return CheckResult(check=check, state="warning", summary=summary)


def _not_checked(check: str, needs: str) -> CheckResult:
    return CheckResult(check=check, state="not checked", summary=needs[:1].upper() + needs[1:])
