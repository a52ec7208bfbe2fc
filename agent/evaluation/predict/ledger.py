"""What came of a file or of many, and the ledger of a folder's files that are done."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import msgspec

from agent.datasets.blocks import Rejected

MOST_NAMED = 100  # rejected rows that are named; all are counted
DONE = ".outstation-run.part"


class Named(msgspec.Struct, frozen=True):
    """A rejected row."""

    file: str
    line: int
    reason: str


class Totals(msgspec.Struct):
    """What was read, answered and rejected; `rejected` names the first of `refused`.

    `partly`: results of windows of which more is missing than the bundle allows without a word.
    """

    rows: int = 0
    results: int = 0
    partly: int = 0
    refused: int = 0
    rejected: list[Named] = msgspec.field(default_factory=list)

    def add(self, other: Totals) -> None:
        self.rows += other.rows
        self.results += other.results
        self.partly += other.partly
        self.refused += other.refused
        self.rejected += other.rejected[: MOST_NAMED - len(self.rejected)]

    def count(self, file: str, rows: int, rejected: list[Rejected]) -> None:
        self.rows += rows
        self.refused += len(rejected)
        self.rejected += [Named(r.file or file, r.line, r.reason) for r in rejected[: MOST_NAMED - len(self.rejected)]]


class Job(NamedTuple):
    """A file to answer; `identity` changes with anything its answers depend on."""

    source: Path
    target: Path
    identity: str


class _Line(msgspec.Struct):
    identity: str
    totals: Totals


class Ledger:
    """The jobs of an output folder that are done: a line each, on the disk before the next; a torn line is none."""

    def __init__(self, out: Path) -> None:
        self._path = out / DONE
        self._done: dict[str, Totals] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self._path.read_bytes().splitlines():
                with contextlib.suppress(msgspec.MsgspecError):
                    found = msgspec.json.decode(line, type=_Line)
                    self._done[found.identity] = found.totals

    def of(self, job: Job) -> Totals | None:
        """What came of a job that is done, and whose output is there."""
        return self._done.get(job.identity) if job.target.exists() else None

    def add(self, job: Job, totals: Totals) -> None:
        self._done[job.identity] = totals
        with self._path.open("ab") as file:
            # A line of its own after one that a kill tore.
            file.write(b"\n" + msgspec.json.encode(_Line(job.identity, totals)) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """All is done: the next run begins anew."""
        self._path.unlink(missing_ok=True)
