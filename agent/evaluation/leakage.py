"""Whether the test tells of new data at all: what the model may have seen before, and what gives the answer away."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent import clock
from agent.evaluation import prints
from agent.evaluation.document import Finding
from agent.evaluation.examples import Examples, Rows, training

_SAME = 0.01  # of the windows may hold rows seen elsewhere before it is a warning
_GROUP_SAME = 0.05
_GROUP_SAME_ROWS = 0.8  # where a window is one row: some are alike by chance
_SHOWN = 5


class Learned(msgspec.Struct, frozen=True, eq=False):
    """Rows the model learned from: those of `source` that `where` (n,) says."""

    source: Rows
    where: NDArray[np.bool_]


def learned(rows: Rows, split: str | None, train: Rows | None) -> Learned | None:
    """What there is to compare with: other files, or the training rows of the same."""
    if train is not None:
        return Learned(train, np.ones(len(train.rows), bool))
    return Learned(rows, training(rows.columns[split])) if split is not None else None


def measure(examples: Examples, window_rows: int, group: str | None, seen: Learned | None) -> list[Finding]:
    found = [_duplicates(examples, window_rows, seen)]
    found.append(_groups(examples, group, seen))
    if group is not None:
        found.append(_twice(examples, window_rows, group))
    return [*found, _order(examples, seen)]


def _duplicates(examples: Examples, window_rows: int, seen: Learned | None) -> Finding:
    check = "rows seen in training"
    if seen is None:
        return _unchecked(check, "give the training data (--train), or the column that splits (--split).")
    own, _ = prints.of_rows(examples.source.rows, window_rows)
    theirs, telling = prints.of_rows(seen.source.rows, window_rows)
    telling &= seen.where[: len(theirs)] & seen.where[len(seen.where) - len(theirs) :]
    hit = prints.in_windows(np.isin(own, theirs[telling]), examples.starts, window_rows)
    share = float(hit.mean())
    text = f"{int(hit.sum())} of {len(hit)} windows ({share:.1%}) hold rows that are in the training data, too"
    if share < _SAME:
        return _ok(check, f"{text}.")
    if window_rows == 1 and share < _SAME + 2 * _repeated(theirs[telling]):
        return _ok(check, f"{text}, about as many as repeat each other within the training data.")
    return _warned(check, f"{text}: the figures tell of data the model knows.")


def _repeated(some: prints.Prints) -> float:
    """Share of rows that come again in the same data: what chance gives."""
    _, count = np.unique(some, return_counts=True)
    return float(count[count > 1].sum()) / max(1, len(some))


def _groups(examples: Examples, group: str | None, seen: Learned | None) -> Finding:
    check = "groups in both splits"
    if group is None:
        return _unchecked(check, "name the column of people, machines or sites (--group).")
    if seen is None:
        return _unchecked(check, "give the training data (--train), or the column that splits (--split).")
    if group not in seen.source.columns:
        return _unchecked(check, f"the training data have no column {group}.")
    both = sorted(set(examples.columns[group].tolist()) & set(seen.source.columns[group][seen.where].tolist()))
    if not both:
        return _ok(check, f"No {group} of the test is in the training data.")
    text = f"{group} {_listed(both)} {'is' if len(both) == 1 else 'are'} in the training data, too"
    return _warned(check, f"{text}: the figures do not tell how the model does on a new one.")


def _twice(examples: Examples, window_rows: int, group: str) -> Finding:
    """The same rows under two names."""
    check = "rows in two groups"
    source = examples.source
    own, telling = prints.of_rows(source.rows, window_rows)
    _, code = np.unique(source.columns[group], return_inverse=True)
    places = np.flatnonzero(telling)
    _, at = np.unique(own[places], return_inverse=True)
    of_print = code[places]
    low, high = np.full(at.max(initial=-1) + 1, len(code)), np.full(at.max(initial=-1) + 1, -1)
    np.minimum.at(low, at, of_print)
    np.maximum.at(high, at, of_print)
    shared = np.zeros(len(own), bool)
    shared[places] = (low < high)[at]
    hit = prints.in_windows(shared, examples.starts, window_rows)
    names = examples.columns[group]
    least = _GROUP_SAME if window_rows > 1 else _GROUP_SAME_ROWS
    told = prints.in_windows(telling, examples.starts, window_rows)
    guilty = [
        str(name) for name in np.unique(names) if hit[names == name].sum() >= least * max(1, told[names == name].sum())
    ]
    if not guilty:
        return _ok(check, f"No {group} shares rows with another ({hit.mean():.1%} of windows).")
    text = f"{group} {_listed(guilty)} share rows with another {group} ({hit.mean():.1%} of all windows)"
    return _warned(check, f"{text}: one of them is counted twice, perhaps under a wrong name.")


def _order(examples: Examples, seen: Learned | None) -> Finding:
    check = "time order"
    if seen is None or not examples.source.timed or not seen.source.timed:
        return _unchecked(check, "it needs training data, and a column t in both.")
    latest = int(seen.source.t[seen.where].max(initial=0))
    early = examples.source.t[examples.last] <= latest
    if not early.any():
        return _ok(check, "All windows are later than the training data.")
    text = f"{early.mean():.0%} of the windows are not later than the last training row ({clock.rfc3339(latest)})"
    return _warned(check, f"{text}: a model in use never learns from the future.")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _ok(check: str, summary: str) -> Finding:
    return Finding(check=check, state="ok", summary=summary)


def _warned(check: str, summary: str) -> Finding:
    return Finding(check=check, state="warning", summary=summary)


def _unchecked(check: str, needs: str) -> Finding:
    return Finding(check=check, state="not checked", summary=needs[:1].upper() + needs[1:])
