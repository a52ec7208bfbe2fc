"""Totals of a run, and the ledger of an output folder: which files are done."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import msgspec

from outstation.foundation import decoders, durable_files
from outstation.ml.datasets.tables import RowRejection

MAX_LISTED_REJECTS = 100  # rejected rows that are listed; all are counted
LEDGER_NAME = ".outstation-run.part"


class RunTotals(msgspec.Struct):
    """Rows read, results written, rows rejected (the first are listed); `incomplete` results miss too many values."""

    rows: int = 0
    results: int = 0
    incomplete: int = 0
    rejected_count: int = 0
    rejected_rows: list[RowRejection] = msgspec.field(default_factory=list)

    def add(self, other: RunTotals) -> None:
        self.rows += other.rows
        self.results += other.results
        self.incomplete += other.incomplete
        self._add_rejected(other.rejected_count, other.rejected_rows)

    def add_block(self, file: str, rows: int, rejected: list[RowRejection]) -> None:
        self.rows += rows
        self._add_rejected(len(rejected), [RowRejection(r.line, r.reason, r.file or file) for r in rejected])

    def _add_rejected(self, count: int, rejected: list[RowRejection]) -> None:
        self.rejected_count += count
        self.rejected_rows += rejected[: MAX_LISTED_REJECTS - len(self.rejected_rows)]


class FileJob(NamedTuple):
    """File to predict; `identity` changes with anything its output depends on."""

    source: Path
    target: Path
    identity: str


class _LedgerEntry(msgspec.Struct):
    identity: str
    totals: RunTotals


class RunLedger:
    """Finished jobs of an output folder: one line each, on the disk before the next job; torn lines are ignored."""

    def __init__(self, out: Path) -> None:
        self._path = out / LEDGER_NAME
        self._finished: dict[str, RunTotals] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self._path.read_bytes().splitlines():
                with contextlib.suppress(msgspec.MsgspecError):
                    entry = decoders.from_json(line, _LedgerEntry)
                    self._finished[entry.identity] = entry.totals

    def get(self, job: FileJob) -> RunTotals | None:
        """Return the totals of a finished job whose output is still there."""
        return self._finished.get(job.identity) if job.target.exists() else None

    def add(self, job: FileJob, totals: RunTotals) -> None:
        self._finished[job.identity] = totals
        with self._path.open("ab") as file:
            # A line of its own after one that a kill tore.
            file.write(b"\n" + msgspec.json.encode(_LedgerEntry(job.identity, totals)) + b"\n")
            durable_files.flush(file)

    def remove(self) -> None:
        """Delete the ledger, so that the next run starts from the beginning."""
        self._path.unlink(missing_ok=True)
