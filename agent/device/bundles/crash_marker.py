"""Crash marker: it is set while a model runs, so that the next start knows which bundle ended the daemon."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent.device.machine.marker import Marker

FILE = "running"


class CrashRecord(msgspec.Struct, frozen=True):
    """Run of a bundle for a task; `id` is unique among all runs of a boot."""

    task: str
    digest: str
    id: str


class CrashMarker(Marker[CrashRecord]):
    """Marker of the run in hand, in `folder`, for the one process that holds the store."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / FILE, CrashRecord, "a model that ends the daemon")
        self._process, self._run_counter = f"{os.getpid()}/{time.monotonic_ns()}", itertools.count(1)

    @contextlib.contextmanager
    def guard_run(self, task: str, digest: str) -> Iterator[None]:
        """Set the marker while the model of bundle `digest` is loaded or runs for `task`; an exception is no crash."""
        self.write(CrashRecord(task, digest, f"{self._process}/{next(self._run_counter)}"))
        try:
            yield
        finally:
            self.clear()
