"""Quiet drift windows: the columns of a run of drift windows that share a message."""

from __future__ import annotations

from typing import Annotated

import msgspec

from agent.wire import runs
from agent.wire.runs import EpochMicroseconds, JitteredTimes, Row, RowRun, TimeRun

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
            if (length := runs.count_entries(column)) != len(self):
                raise ValueError(f"column {name} has {length} entries, nearest has {len(self)}")
        for rows in (self.first, self.last, self.n):
            runs.check_range(rows, 1, 2**53 - 1)
        for times in (self.from_, self.to):
            runs.check_range(times, -(2**63), 2**63 - 1)
        previous = 0
        for (first, last), n in zip(self.expand_rows(), runs.expand_integers(self.n), strict=True):
            if not previous < first <= last:
                raise ValueError(f"rows [{first},{last}] of a window do not come after row {previous}")
            if n > last - first + 1:
                raise ValueError(f"{n} rows in rows [{first},{last}]")
            previous = last

    def __len__(self) -> int:
        return len(self.nearest)

    def expand_rows(self) -> list[tuple[int, int]]:
        """Return the first and last row of each window."""
        return list(zip(runs.expand_integers(self.first), runs.expand_integers(self.last), strict=True))

    def expand_times(self) -> list[tuple[int, int]]:
        """Return the times of these rows, epoch µs."""
        return list(zip(runs.expand_integers(self.from_), runs.expand_integers(self.to), strict=True))
