"""What came of a file or of many, and the ledger of a folder's files that are done."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import msgspec

from agent import durable_files
from agent.datasets.tables import RowRejection

MAX_LISTED_REJECTS = 100  # rejected rows that are named; all are counted
LEDGER_NAME = ".outstation-run.part"


class RejectedRow(msgspec.Struct, frozen=True):
    """A rejected row."""

    file: str
    line: int
    reason: str


class RunTotals(msgspec.Struct):
    """What was read, answered and rejected; `rejected` names the first of `refused`.

    `partly`: results of windows of which more is missing than the bundle allows without a word.
    """

    rows: int = 0
    results: int = 0
    incomplete: int = 0
    rejected_count: int = 0
    rejected_rows: list[RejectedRow] = msgspec.field(default_factory=list)

    def add(self, other: RunTotals) -> None:
        self.rows += other.rows
        self.results += other.results
        self.incomplete += other.incomplete
        self.rejected_count += other.rejected_count
        self.rejected_rows += other.rejected_rows[: MAX_LISTED_REJECTS - len(self.rejected_rows)]

    def add_block(self, file: str, rows: int, rejected: list[RowRejection]) -> None:
        self.rows += rows
        self.rejected_count += len(rejected)
        self.rejected_rows += [
            RejectedRow(r.file or file, r.line, r.reason)
            for r in rejected[: MAX_LISTED_REJECTS - len(self.rejected_rows)]
        ]


class FileJob(NamedTuple):
    """A file to answer; `identity` changes with anything its answers depend on."""

    source: Path
    target: Path
    identity: str


class _LedgerEntry(msgspec.Struct):
    identity: str
    totals: RunTotals


class RunLedger:
    """The jobs of an output folder that are done: a line each, on the disk before the next; a torn line is none."""

    def __init__(self, out: Path) -> None:
        self._path = out / LEDGER_NAME
        self._done: dict[str, RunTotals] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self._path.read_bytes().splitlines():
                with contextlib.suppress(msgspec.MsgspecError):
                    found = msgspec.json.decode(line, type=_LedgerEntry)
                    self._done[found.identity] = found.totals

    def get(self, job: FileJob) -> RunTotals | None:
        """What came of a job that is done, and whose output is there."""
        return self._done.get(job.identity) if job.target.exists() else None

    def add(self, job: FileJob, totals: RunTotals) -> None:
        self._done[job.identity] = totals
        with self._path.open("ab") as file:
            # A line of its own after one that a kill tore.
            file.write(b"\n" + msgspec.json.encode(_LedgerEntry(job.identity, totals)) + b"\n")
            durable_files.flush(file)

    def remove(self) -> None:
        """All is done: the next run begins anew."""
        self._path.unlink(missing_ok=True)
