"""What one worker of a cluster does: it proves the bundle that it was sent, loads it once, and answers whole files.

It needs this package and, of `model run`, the files of DATA and OUT at the paths the driver sees them at.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from agent import __version__
from agent.errors import BadBundle, FileBusy, OutstationError, UsageError
from agent.evaluation.predict.ledger import FileJob, RunTotals
from agent.evaluation.predict.run import BatchPredictor
from agent.model.bundle import bundle as bundles
from agent.model.inference import inference, runtime
from agent.model.inference.features import Floats, Ints, WindowCut
from agent.model.inference.inference import InferenceResult
from agent.model.sandbox import probe

# A worker that the cluster gave up may still write: its end is waited for.
LOCK_TIMEOUT_S, _RETRY_INTERVAL_S = 60.0, 0.5
# So many workers may die over a file before it is left: it may be what kills them.
MAX_ATTEMPTS = 4
SHARED_STORAGE_HINT = "DATA and OUT must be on a file system that all nodes have at the same path (NFS, or the like)"


class WorkerConfig(msgspec.Struct, frozen=True):
    """What all workers are given: a bundle's bytes, who sent them, and what is wanted.

    `mark` is a file beside the answers that holds `token`: who reads it there sees that folder, not one of that name.
    """

    bundle_name: str
    files: dict[str, bytes]
    digest: str
    raw: bool
    marker: Path
    token: str
    agent: str = __version__
    runtime: str = runtime.RUNTIME_NAME


class WindowShard(msgspec.Struct, frozen=True, eq=False):
    """The rows of a file, `rows` (n, F) and `t` (n,), and where the windows to answer begin."""

    index: int
    rows: Floats
    t: Ints
    starts: Ints


class WorkerResult(msgspec.Struct, frozen=True, eq=False):
    """What came of a job or a piece, or a problem; `wrong_use` where that is the user's to mend."""

    target: Path = Path()
    totals: RunTotals | None = None
    index: int = 0
    answers: InferenceResult | None = None
    error: str = ""
    is_usage_error: bool = False


class Worker:
    """Nothing is loaded before the first job, so that what is wrong can be said as its answer."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config, self._node = config, socket.gethostname()
        self._predictor: BatchPredictor | None = None

    def process(self, item: FileJob | WindowShard) -> WorkerResult:
        """Nothing is raised that is known to happen."""
        try:
            return self._predict_file(item) if isinstance(item, FileJob) else self._predict_shard(item)
        except OutstationError as problem:
            return WorkerResult(error=f"node {self._node}: {problem}", is_usage_error=isinstance(problem, UsageError))
        except OSError as error:
            return WorkerResult(
                error=f"node {self._node}: {error}; what is done stays done: mend it, and start this again"
            )

    def _predict_file(self, job: FileJob) -> WorkerResult:
        """One file, as the engine of one machine answers it."""
        self._require_shared_storage(job)
        work = self._ensure_loaded()
        if work.identity(job.source, job.target) != job.identity:
            said = f"{job.source} has another size or time than where the command runs"
            raise UsageError(f"{said}; {SHARED_STORAGE_HINT}, and stay as is")
        with self._count_attempt(job):
            return WorkerResult(target=job.target, totals=_predict_when_unlocked(work, job))

    def _predict_shard(self, shard: WindowShard) -> WorkerResult:
        cut = WindowCut(shard.starts, len(shard.starts))
        return WorkerResult(
            index=shard.index,
            answers=self._ensure_loaded().inference.run_windows(shard.rows, shard.t, cut, with_outputs=True),
        )

    def _ensure_loaded(self) -> BatchPredictor:
        self._predictor = self._predictor or self._load_bundle()
        return self._predictor

    def _load_bundle(self) -> BatchPredictor:
        """The bundle as it was sent, proved on this node, too: processors differ. Raises UsageError."""
        order = self._config
        have, sent = f"{__version__} with {runtime.RUNTIME_NAME}", f"{order.agent} with {order.runtime}"
        if have != sent:
            raise UsageError(f"outstation is {have} here and {sent} where the command runs; install the same on all")
        found = bundles.from_files(order.bundle_name, order.files, order.digest)
        try:
            probe.probe(found).raise_for_failure()
            loaded = inference.Inference(found.manifest, inference.load_model(found.manifest, found.model_bytes))
        except BadBundle as problem:
            raise BadBundle(f"{order.bundle_name}: {problem}") from None
        return BatchPredictor(found, loaded, raw=order.raw)

    def _require_shared_storage(self, job: FileJob) -> None:
        """Raises UsageError where this node has other folders than the driver."""
        if not job.source.exists():
            raise UsageError(f"{job.source} is not there; {SHARED_STORAGE_HINT}, or run it without --engine ray")
        mark = self._config.marker
        try:
            seen = mark.read_text(encoding="utf-8") == self._config.token
        except FileNotFoundError:
            seen = False
        if not seen:
            raise UsageError(f"{mark.parent} is another folder than where the command runs; {SHARED_STORAGE_HINT}")

    @contextmanager
    def _count_attempt(self, job: FileJob) -> Iterator[None]:
        """What ends this process leaves its line in a file. Raises OutstationError where there are too many."""
        path = job.target.with_name(f"{job.target.name}.part.tries")
        with path.open("a+", encoding="ascii") as file:
            file.seek(0)
            tries = file.read().splitlines().count(self._config.token)
            file.write(f"{self._config.token}\n")
        if tries >= MAX_ATTEMPTS:
            path.unlink()
            raise OutstationError(
                f"{job.source}: {tries} workers died over it, most likely of too little memory; give a worker more, or "
                "split the file"
            )
        try:
            yield
        finally:
            path.unlink()


def _predict_when_unlocked(predictor: BatchPredictor, job: FileJob) -> RunTotals:
    end = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return predictor.predict_file(job.source, job.target, lambda *_: None)
        except FileBusy:
            if time.monotonic() > end:
                raise
            time.sleep(_RETRY_INTERVAL_S)
