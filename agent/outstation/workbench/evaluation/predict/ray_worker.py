"""Worker of a Ray cluster: probes the bundle that it is sent, loads it once, and predicts whole files.

It needs this package and, for `model run`, DATA and OUT at the same paths as the driver.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from outstation import __version__
from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.errors import BadBundle, FileBusy, OutstationError, UsageError
from outstation.ml.model import activation
from outstation.ml.model.bundle import bundle as bundles
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.model.inference.joins import JoinedValues
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.workbench.evaluation.predict.ledger import FileJob, RunTotals
from outstation.workbench.evaluation.predict.run import BatchPredictor

# A worker that the cluster has given up may still write; wait for its end.
LOCK_TIMEOUT_S, _RETRY_INTERVAL_S = 60.0, 0.5
# Workers that may die over a file before it is given up: the file may be what kills them.
MAX_ATTEMPTS = 4
SHARED_STORAGE_HINT = "DATA and OUT must be on a file system that all nodes have at the same path (NFS, or the like)"


class WorkerConfig(msgspec.Struct, frozen=True):
    """Bundle to run, and where its output goes.

    `marker` is a file beside the output that holds `token`: a worker that reads it sees that very folder, not another
    one of the same name. `joined` holds the files of further inputs by their absolute paths.
    """

    bundle_name: str
    files: dict[str, bytes]
    digest: str
    raw: bool
    marker: Path
    token: str
    joined: dict[str, Path] = {}
    agent: str = __version__
    runtime: str = runtime_name()


class WindowShard(msgspec.Struct, frozen=True, eq=False):
    """Rows (n, F) of a file, with `t` (n,), and the starts of the windows to predict."""

    index: int
    rows: Float32s
    t: Ints
    starts: Ints
    joined: JoinedValues | None = None


class WorkerResult(msgspec.Struct, frozen=True, eq=False):
    """Totals of a job, result of a shard, or an error; `is_usage_error` if the user can fix it."""

    target: Path = Path()
    totals: RunTotals | None = None
    index: int = 0
    result: InferenceResult | None = None
    error: str = ""
    is_usage_error: bool = False


class Worker:
    """Loads the bundle with the first job, so that a problem can be returned as its answer."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config, self._node = config, socket.gethostname()
        self._predictor: BatchPredictor | None = None

    def process(self, item: FileJob | WindowShard) -> WorkerResult:
        """Process a job or a shard; known errors are returned, not raised."""
        try:
            if isinstance(item, FileJob):
                return self._predict_file(item)
            cut = WindowCut(item.starts, len(item.starts), item.joined)
            result = self._ensure_loaded().inference.run_windows(item.rows, item.t, cut, with_outputs=True)
            return WorkerResult(index=item.index, result=result)
        except OutstationError as problem:
            return WorkerResult(error=f"node {self._node}: {problem}", is_usage_error=isinstance(problem, UsageError))
        except OSError as error:
            return WorkerResult(
                error=f"node {self._node}: {error}; finished files stay finished: fix it, and start this again"
            )

    def _predict_file(self, job: FileJob) -> WorkerResult:
        """Predict a file as `model run` does on one machine."""
        for file in (job.source, *self._config.joined.values()):
            if not file.exists():
                raise UsageError(f"{file} does not exist; {SHARED_STORAGE_HINT}, or run it without --engine ray")
        marker = self._config.marker
        try:
            seen = marker.read_text(encoding="utf-8") == self._config.token
        except FileNotFoundError:
            seen = False
        if not seen:
            raise UsageError(f"{marker.parent} is another folder than where the command runs; {SHARED_STORAGE_HINT}")
        predictor = self._ensure_loaded()
        if predictor.identity(job.source, job.target) != job.identity:
            files = " or a file of --join" if self._config.joined else ""
            problem = f"{job.source}{files} has another size or time than where the command runs"
            raise UsageError(f"{problem}; {SHARED_STORAGE_HINT}, and must not change")
        deadline_s = time.monotonic() + LOCK_TIMEOUT_S
        with self._count_attempt(job):
            while True:
                try:
                    totals = predictor.predict_file(job.source, job.target, lambda *_: None)
                    return WorkerResult(target=job.target, totals=totals)
                except FileBusy:
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(_RETRY_INTERVAL_S)

    def _ensure_loaded(self) -> BatchPredictor:
        """Load the bundle as it was sent, probed on this node, too, because processors differ. Raises UsageError."""
        if self._predictor is not None:
            return self._predictor
        config = self._config
        have, sent = f"{__version__} with {runtime_name()}", f"{config.agent} with {config.runtime}"
        if have != sent:
            raise UsageError(f"outstation is {have} here and {sent} where the command runs; install the same on all")
        bundle = bundles.from_files(config.bundle_name, config.files, config.digest)
        try:
            loaded = activation.open_for_files(bundle)
        except BadBundle as problem:
            raise BadBundle(f"{config.bundle_name}: {problem}") from None
        self._predictor = BatchPredictor(bundle, loaded, raw=config.raw, joined=config.joined)
        return self._predictor

    @contextmanager
    def _count_attempt(self, job: FileJob) -> Iterator[None]:
        """Record the attempt in a file, where it stays if this process dies. Raises OutstationError after too many."""
        path = job.target.with_name(f"{job.target.name}.part.tries")
        with path.open("a+", encoding="ascii") as file:
            file.seek(0)
            attempts = file.read().splitlines().count(self._config.token)
            file.write(f"{self._config.token}\n")
        if attempts >= MAX_ATTEMPTS:
            path.unlink()
            raise OutstationError(
                f"{job.source}: {attempts} workers died over it, most likely because memory ran out; give a worker "
                "more, or split the file"
            )
        try:
            yield
        finally:
            path.unlink()
