"""Progress of files that other processes answer: seen by what these keep beside their answers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from agent.evaluation.predict import run
from agent.evaluation.predict.ledger import Job, Totals
from agent.evaluation.predict.run import Progress

_EVERY_S = 1.0


class Watched:
    """Used as `with Watched(jobs, progress) as watched: watched.add(job, totals)`; a thread tells `progress`."""

    def __init__(self, jobs: Sequence[Job], progress: Progress) -> None:
        self._progress = progress
        self._sizes = {job.target: job.source.stat().st_size for job in jobs}
        self._folders = {job.target.parent for job in jobs}
        self._done, self._rows = 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def add(self, job: Job, totals: Totals) -> None:
        """One that is done."""
        self._done += self._sizes[job.target]
        self._rows += totals.rows

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        states = {run.state_of(target).name for target in self._sizes}
        while not self._ended.wait(_EVERY_S):
            rows = self._rows + sum(run.kept_rows(path) for path in self._kept() if path.name in states)
            self._progress(self._done, sum(self._sizes.values()), rows)

    def _kept(self) -> list[Path]:
        return [path for folder in self._folders for path in folder.glob(f"*{run.STATE}")]
