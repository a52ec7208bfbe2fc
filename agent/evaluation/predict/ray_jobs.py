"""`model run` and the answers of `model evaluate` by the workers of a cluster: the same as one machine makes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from agent import durable_files
from agent.errors import BadBundle, UsageError
from agent.evaluation.examples import Dataset
from agent.evaluation.predict import output, run
from agent.evaluation.predict.ledger import LEDGER_NAME, FileJob, RunLedger, RunTotals
from agent.evaluation.predict.ray_cluster import RayCluster
from agent.evaluation.predict.ray_worker import WindowShard, WorkerConfig, WorkerResult
from agent.evaluation.predict.run import BatchPredictor, Progress
from agent.evaluation.predict.watched import ProgressTracker
from agent.model.bundle.bundle import Bundle
from agent.model.inference import scores
from agent.model.inference.features import Ints, WindowCut
from agent.model.inference.inference import Inference, InferenceResult


def predict_folder(
    cluster: RayCluster, predictor: BatchPredictor, bundle: Bundle, source: Path, out: Path, progress: Progress
) -> RunTotals:
    """As `run.folder`. Raises UsageError, BadBundle, OutstationError."""
    source, out = source.resolve(), out.resolve()
    jobs = [predictor.make_job(path, out / path.name) for path in run.list_inputs(source, out)]
    ledger = RunLedger(out)
    found = {job.target: done for job in jobs if (done := ledger.get(job)) is not None}
    with _shared_marker(out / LEDGER_NAME) as (mark, token), ProgressTracker(jobs, progress) as watched:
        for job, totals in _run_jobs(cluster, _worker_config(bundle, predictor.raw, mark, token), jobs, found, watched):
            ledger.add(job, totals)
    ledger.remove()
    return _sum_totals(jobs, found)


def predict_file(
    cluster: RayCluster, predictor: BatchPredictor, bundle: Bundle, source: Path, out: Path, progress: Progress
) -> RunTotals:
    """As `Work.file`, by one worker. Raises UsageError, BadBundle, OutstationError."""
    source, out = source.resolve(), out.resolve()
    jobs, found = [predictor.make_job(source, out)], dict[Path, RunTotals]()
    with _shared_marker(output.partial_path(out)) as (mark, token), ProgressTracker(jobs, progress) as watched:
        for _ in _run_jobs(cluster, _worker_config(bundle, predictor.raw, mark, token), jobs, found, watched):
            pass
    return _sum_totals(jobs, found)


def make_predictor(cluster: RayCluster, bundle: Bundle) -> Callable[[Inference, Dataset, Ints], InferenceResult]:
    """`examples.answered` by a worker for each file. The rows are sent: nothing needs to be where the workers are."""

    def predict(_: Inference, dataset: Dataset, starts: Ints) -> InferenceResult:
        pieces = []
        for i, of in enumerate(dataset.file_slices()):
            some = starts[(starts >= of.start) & (starts < of.stop)] - of.start
            pieces.append(WindowShard(i, dataset.values[of], dataset.t[of], some))
        found: dict[int, InferenceResult] = {}
        for said in cluster.map(_worker_config(bundle, True, Path(), ""), pieces):
            if said.answers is None:
                raise _to_error(said)
            found[said.index] = said.answers
        parts = [found[i] for i in range(len(pieces))]
        outputs = np.concatenate([one.outputs for one in parts if one.outputs is not None])
        missing = np.concatenate([one.missing_share for one in parts])
        return InferenceResult(
            WindowCut(starts, len(dataset.values)), scores.concatenate([one.scores for one in parts]), missing, outputs
        )

    return predict


def _run_jobs(
    cluster: RayCluster,
    config: WorkerConfig,
    jobs: Sequence[FileJob],
    completed: dict[Path, RunTotals],
    tracker: ProgressTracker,
) -> Iterator[tuple[FileJob, RunTotals]]:
    """The jobs that are not in `found` yet, as they are done, which puts them there."""
    for job in jobs:
        if job.target in completed:
            tracker.complete(job, completed[job.target])
    waiting = {job.target: job for job in jobs if job.target not in completed}
    for said in cluster.map(config, list(waiting.values())):
        if said.totals is None:
            raise _to_error(said)
        job = waiting[said.target]
        completed[job.target] = said.totals
        tracker.complete(job, said.totals)
        yield job, said.totals


def _worker_config(bundle: Bundle, raw: bool, marker: Path, token: str) -> WorkerConfig:
    name = f"{bundle.manifest.name} {bundle.manifest.version}"
    return WorkerConfig(name, bundle.files, bundle.digest, raw, marker, token)


def _sum_totals(jobs: Sequence[FileJob], completed: dict[Path, RunTotals]) -> RunTotals:
    """In the order of the files, whichever was done first."""
    total = RunTotals()
    for job in jobs:
        total.add(completed[job.target])
    return total


@contextmanager
def _shared_marker(target: Path) -> Iterator[tuple[Path, str]]:
    """(file, token): a file in the folder of the answers by which a worker tells that it sees this folder."""
    path, token = target.with_name(f"{target.name}.ray"), secrets.token_hex(16)
    with output.open_locked(path) as file:
        file.truncate(0)
        file.write(token.encode())
        durable_files.flush(file)
        try:
            yield path, token
        finally:
            path.unlink(missing_ok=True)


def _to_error(result: WorkerResult) -> UsageError | BadBundle:
    return UsageError(result.error) if result.is_usage_error else BadBundle(result.error)
