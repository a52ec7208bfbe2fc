"""Batch prediction and evaluation on a Ray cluster, with the same results as on one machine."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from outstation.foundation import durable_files
from outstation.foundation.arrays import Ints
from outstation.foundation.errors import BadBundle, UsageError
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.workbench.evaluation.examples import NO_FILES, Dataset, concatenate_results, cut_at
from outstation.workbench.evaluation.predict import output, run
from outstation.workbench.evaluation.predict.ledger import LEDGER_NAME, FileJob, RunLedger, RunTotals
from outstation.workbench.evaluation.predict.ray_cluster import RayCluster
from outstation.workbench.evaluation.predict.ray_worker import WindowShard, WorkerConfig, WorkerResult
from outstation.workbench.evaluation.predict.run import BatchPredictor, Progress

_POLL_INTERVAL_S = 1.0


def predict_folder(
    cluster: RayCluster, predictor: BatchPredictor, bundle: Bundle, source: Path, out: Path, progress: Progress
) -> RunTotals:
    """Predict a folder as `run.predict_folder` does. Raises UsageError, BadBundle, OutstationError."""
    source, out = source.resolve(), out.resolve()
    jobs = [predictor.make_job(path, out / path.name) for path in run.list_inputs(source, out)]
    ledger = RunLedger(out)
    completed = {job.target: totals for job in jobs if (totals := ledger.get(job)) is not None}
    with _shared_marker(out / LEDGER_NAME) as marker, ProgressTracker(jobs, progress) as tracker:
        config = _worker_config(bundle, *marker, raw=predictor.raw, joined=predictor.joined)
        for job, totals in _run_jobs(cluster, config, jobs, completed, tracker):
            ledger.add(job, totals)
    ledger.remove()
    total = RunTotals()
    # In the order of the files, whichever ended first.
    for job in jobs:
        total.add(completed[job.target])
    return total


def predict_file(
    cluster: RayCluster, predictor: BatchPredictor, bundle: Bundle, source: Path, out: Path, progress: Progress
) -> RunTotals:
    """Predict a file in one worker. Raises UsageError, BadBundle, OutstationError."""
    jobs = [predictor.make_job(source.resolve(), out.resolve())]
    with _shared_marker(output.partial_path(out.resolve())) as marker, ProgressTracker(jobs, progress) as tracker:
        config = _worker_config(bundle, *marker, raw=predictor.raw, joined=predictor.joined)
        [(_, totals)] = _run_jobs(cluster, config, jobs, {}, tracker)
    return totals


def make_predictor(cluster: RayCluster, bundle: Bundle) -> Callable[[Inference, Dataset, Ints], InferenceResult]:
    """Return `examples.predict` by a worker for each file; the rows are sent, so workers need no shared storage."""

    def predict(inference: Inference, dataset: Dataset, starts: Ints) -> InferenceResult:
        shards = []
        for i, part in enumerate(dataset.file_slices()):
            cut = cut_at(inference, dataset, starts, i)
            shards.append(WindowShard(i, dataset.values[part], dataset.t[part], cut.starts, cut.joined))
        results: dict[int, InferenceResult] = {}
        for answer in cluster.map(_worker_config(bundle, Path(), "", raw=True), shards):
            if answer.result is None:
                raise _to_error(answer)
            results[answer.index] = answer.result
        return concatenate_results([results[i] for i in range(len(shards))], starts, dataset)

    return predict


class ProgressTracker:
    """Progress of jobs in other processes, read from their checkpoint files by a thread."""

    def __init__(self, jobs: Sequence[FileJob], progress: Progress) -> None:
        self._progress = progress
        self._sizes = {job.target: job.source.stat().st_size for job in jobs}
        self._done, self._rows = 0, 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="progress", daemon=True)

    def complete(self, job: FileJob, totals: RunTotals) -> None:
        self._done += self._sizes[job.target]
        self._rows += totals.rows

    def __enter__(self) -> ProgressTracker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _poll(self) -> None:
        names = {run.checkpoint_path(target).name for target in self._sizes}
        folders = {target.parent for target in self._sizes}
        while not self._stopping.wait(_POLL_INTERVAL_S):
            paths = [path for folder in folders for path in folder.glob(f"*{run.CHECKPOINT_SUFFIX}")]
            rows = self._rows + sum(run.checkpoint_rows(path) for path in paths if path.name in names)
            self._progress(self._done, sum(self._sizes.values()), rows)


def _run_jobs(
    cluster: RayCluster,
    config: WorkerConfig,
    jobs: Sequence[FileJob],
    completed: dict[Path, RunTotals],
    tracker: ProgressTracker,
) -> Iterator[tuple[FileJob, RunTotals]]:
    """Run the jobs that are not completed, and yield each as it ends."""
    for job in jobs:
        if job.target in completed:
            tracker.complete(job, completed[job.target])
    waiting = {job.target: job for job in jobs if job.target not in completed}
    for answer in cluster.map(config, list(waiting.values())):
        if answer.totals is None:
            raise _to_error(answer)
        job = waiting[answer.target]
        completed[job.target] = answer.totals
        tracker.complete(job, answer.totals)
        yield job, answer.totals


def _worker_config(
    bundle: Bundle, marker: Path, token: str, *, raw: bool, joined: Mapping[str, Path] = NO_FILES
) -> WorkerConfig:
    name = f"{bundle.manifest.name} {bundle.manifest.version}"
    return WorkerConfig(name, bundle.files, bundle.digest, raw, marker, token, dict(joined))


@contextmanager
def _shared_marker(target: Path) -> Iterator[tuple[Path, str]]:
    """Write a marker file beside the output, by which a worker proves that it sees this folder; yield (file, token)."""
    path, token = target.with_name(f"{target.name}.ray"), secrets.token_hex(16)
    with output.open_locked(path) as file:
        file.truncate(0)
        file.write(token.encode())
        durable_files.flush(file)
        try:
            yield path, token
        finally:
            path.unlink(missing_ok=True)


def _to_error(answer: WorkerResult) -> UsageError | BadBundle:
    return UsageError(answer.error) if answer.is_usage_error else BadBundle(answer.error)
