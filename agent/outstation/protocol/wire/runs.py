"""Run-length encoded columns: runs of integers, jittered times, repeated labels; of results and of quiet windows.

`docs/reference/wire-format.md` describes the forms. This module reads them; `outstation.device.batch_parts.columns`
writes them. Every bound is checked before a run is expanded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

# Results of one message, whatever their encoding: a message of a few bytes must not fill a reader's memory.
MAX_RESULTS = 1 << 14
# Repeated labels of one message, UTF-8. A device fills a message as if no label repeated, so none of its own has more.
MAX_REPEATED_BYTES = 1 << 20
_MAX_INT = 2**53 - 1
RunLength = Annotated[int, msgspec.Meta(ge=1, le=MAX_RESULTS)]
Step = Annotated[int, msgspec.Meta(ge=-_MAX_INT, le=_MAX_INT)]
Row = Annotated[int, msgspec.Meta(ge=1, le=_MAX_INT)]
EpochMicroseconds = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Label = Annotated[str, msgspec.Meta(max_length=4096)]
# Far beyond float32, in which models compute, and small enough that sums of squares stay finite.
Magnitude = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]


# Runs are arrays in JSON. They are structs and no tuples, because msgspec 0.22 reads past the end of its own type
# information where a union has both a number with limits and a tuple of fixed length.
class RowRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Arithmetic run of `count` rows that begins at `first`."""

    first: Row
    step: Step
    count: RunLength


class TimeRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Arithmetic run of `count` times that begins at `first`, epoch µs."""

    first: EpochMicroseconds
    step: Step
    count: RunLength


class LabelRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A label repeated `count` times."""

    label: Label
    count: RunLength


class JitteredTimes(msgspec.Struct, frozen=True):
    """Times near a regular grid, epoch µs: entry i is `first + i * step + offsets[i]`."""

    first: EpochMicroseconds
    step: Step
    offsets: Annotated[list[Step], msgspec.Meta(max_length=MAX_RESULTS)]


Run = RowRun | TimeRun | LabelRun
Integers = Sequence[int | RowRun] | Sequence[int | TimeRun] | JitteredTimes
_PLAIN = frozenset({int, str})


def count_entries(column: Integers | Sequence[Label | LabelRun]) -> int:
    """Return how many entries a column has, without expanding it."""
    if isinstance(column, JitteredTimes):
        return len(column.offsets)
    return len(column) + sum(run.count - 1 for run in _find_runs(column))


def repeated_bytes(column: Sequence[Label | LabelRun]) -> int:
    """Return the bytes (UTF-8) of all labels that runs stand for, without expanding them."""
    return sum(len(run.label.encode()) * run.count for run in _find_runs(column) if isinstance(run, LabelRun))


def check_range(column: Integers, low: int, high: int) -> None:
    """Check the entries that types leave open: the end of a run, and jittered times. Raises ValueError."""
    if isinstance(column, JitteredTimes):
        last = column.first + column.step * (len(column.offsets) - 1)
        extremes = (min(column.offsets), max(column.offsets)) if column.offsets else ()
        ends = [end + offset for end in (column.first, last) for offset in extremes]
    else:
        ends = [run.first + run.step * (run.count - 1) for run in _find_runs(column) if not isinstance(run, LabelRun)]
    for end in ends:
        if not low <= end <= high:
            raise ValueError(f"an entry reaches {end}, beyond {low} to {high}")


def smallest_row(column: Sequence[Row | RowRun]) -> int | None:
    """Return the smallest row without expanding runs, or None."""
    runs = [run for run in _find_runs(column) if isinstance(run, RowRun)]
    plain = column if not runs else [item for item in column if isinstance(item, int)]
    ends = [end for run in runs for end in (run.first, run.first + run.step * (run.count - 1))]
    return min([*plain, *ends], default=None)  # type: ignore[type-var,return-value]


def expand_integers(column: Integers) -> list[int]:
    """Return the entries (n,) of a column of rows or times."""
    if isinstance(column, JitteredTimes):
        return [column.first + i * column.step + offset for i, offset in enumerate(column.offsets)]
    entries: list[int] = []
    for item in column:
        if isinstance(item, int):
            entries.append(item)
        elif item.step:
            entries.extend(range(item.first, item.first + item.step * item.count, item.step))
        else:
            entries.extend([item.first] * item.count)
    return entries


def expand_labels(column: Sequence[Label | LabelRun]) -> list[str]:
    """Return the labels (n,)."""
    if _PLAIN.issuperset(map(type, column)):
        return [*column]  # type: ignore[list-item]
    entries: list[str] = []
    for item in column:
        if isinstance(item, str):
            entries.append(item)
        else:
            entries.extend([item.label] * item.count)
    return entries


def _find_runs(column: Sequence[int | str | Run]) -> list[Run]:
    # Most columns have no run, or nothing else.
    if _PLAIN.issuperset(map(type, column)):
        return []
    return [item for item in column if type(item) not in _PLAIN]  # type: ignore[misc]


class ResultColumns(msgspec.Struct, frozen=True):
    """Columns of one length. Entries of `row`, `t` and `label` may be runs."""

    row: list[Row | RowRun]
    t: list[EpochMicroseconds | TimeRun] | JitteredTimes
    # A multi-label model joins its labels with "|".
    label: list[Label | LabelRun] | None = None
    score: list[Magnitude | None] | None = None
    value: list[Magnitude | None] | None = None
    # Share of a result's input that was missing, where it exceeds the bundle's limit; 0 elsewhere.
    missing: list[Magnitude] | None = None

    def __post_init__(self) -> None:
        count = len(self)
        if count > MAX_RESULTS:
            raise ValueError(f"{count} results in one message, the limit is {MAX_RESULTS}")
        lengths = {
            "t": count_entries(self.t),
            "label": count if self.label is None else count_entries(self.label),
            "score": count if self.score is None else len(self.score),
            "value": count if self.value is None else len(self.value),
            "missing": count if self.missing is None else len(self.missing),
        }
        for name, length in lengths.items():
            if length != count:
                raise ValueError(f"column {name} has {length} entries, row has {count}")
        repeated = 0 if self.label is None else repeated_bytes(self.label)
        if repeated > MAX_REPEATED_BYTES:
            raise ValueError(f"labels in runs have {repeated} bytes, the limit is {MAX_REPEATED_BYTES}")
        # Plain entries are in range by their type.
        if count != len(self.row):
            check_range(self.row, 1, 2**53 - 1)
        if isinstance(self.t, JitteredTimes) or count != len(self.t):
            check_range(self.t, -(2**63), 2**63 - 1)

    def __len__(self) -> int:
        return count_entries(self.row)

    def expand_rows(self) -> list[int]:
        return expand_integers(self.row)

    def expand_times(self) -> list[int]:
        """Return the times (n,), epoch µs."""
        return expand_integers(self.t)

    def expand_labels(self) -> list[str] | None:
        return None if self.label is None else expand_labels(self.label)


# Of one message: the columns take less room than the sums of a few fields.
MAX_QUIET_WINDOWS = 512
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class QuietWindows(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """Columns of one length: rows and times of each drift window of a run, which are numbered without a gap.

    `nearest`: largest sum of a drift test after the window, as a share of its limit; None if it has too few rows.
    """

    first: list[Row | RowRun]
    last: list[Row | RowRun]
    from_: list[EpochMicroseconds | TimeRun] | JitteredTimes
    to: list[EpochMicroseconds | TimeRun] | JitteredTimes
    n: list[Row | RowRun]
    nearest: Annotated[list[Share | None], msgspec.Meta(min_length=2, max_length=MAX_QUIET_WINDOWS)]

    def __post_init__(self) -> None:
        columns = {"first": self.first, "last": self.last, "from": self.from_, "to": self.to, "n": self.n}
        for name, column in columns.items():
            if (length := count_entries(column)) != len(self):
                raise ValueError(f"column {name} has {length} entries, nearest has {len(self)}")
        for rows in (self.first, self.last, self.n):
            check_range(rows, 1, 2**53 - 1)
        for times in (self.from_, self.to):
            check_range(times, -(2**63), 2**63 - 1)
        previous = 0
        for (first, last), n in zip(self.expand_rows(), expand_integers(self.n), strict=True):
            if not previous < first <= last:
                raise ValueError(f"rows [{first},{last}] of a window do not come after row {previous}")
            if n > last - first + 1:
                raise ValueError(f"{n} rows in rows [{first},{last}]")
            previous = last

    def __len__(self) -> int:
        return len(self.nearest)

    def expand_rows(self) -> list[tuple[int, int]]:
        """Return the first and last row of each window."""
        return list(zip(expand_integers(self.first), expand_integers(self.last), strict=True))

    def expand_times(self) -> list[tuple[int, int]]:
        """Return the times of these rows, epoch µs."""
        return list(zip(expand_integers(self.from_), expand_integers(self.to), strict=True))
