"""Progress of files that other processes answer: seen by what these keep beside their answers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from agent.evaluation.predict import run
from agent.evaluation.predict.ledger import FileJob, RunTotals
from agent.evaluation.predict.run import Progress

_POLL_INTERVAL_S = 1.0


class ProgressTracker:
    """Used as `with Watched(jobs, progress) as watched: watched.add(job, totals)`; a thread tells `progress`."""

    def __init__(self, jobs: Sequence[FileJob], progress: Progress) -> None:
        self._progress = progress
        self._sizes = {job.target: job.source.stat().st_size for job in jobs}
        self._folders = {job.target.parent for job in jobs}
        self._done, self._rows = 0, 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="progress", daemon=True)

    def complete(self, job: FileJob, totals: RunTotals) -> None:
        """One that is done."""
        self._done += self._sizes[job.target]
        self._rows += totals.rows

    def __enter__(self) -> ProgressTracker:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join()

    def _poll(self) -> None:
        states = {run.checkpoint_path(target).name for target in self._sizes}
        while not self._stopping.wait(_POLL_INTERVAL_S):
            rows = self._rows + sum(
                run.checkpoint_rows(path) for path in self._checkpoint_paths() if path.name in states
            )
            self._progress(self._done, sum(self._sizes.values()), rows)

    def _checkpoint_paths(self) -> list[Path]:
        return [path for folder in self._folders for path in folder.glob(f"*{run.CHECKPOINT_SUFFIX}")]
