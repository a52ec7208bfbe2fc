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
from agent.errors import BadBundle, Busy, OutstationError, UsageError
from agent.evaluation.predict.ledger import Job, Totals
from agent.evaluation.predict.run import Work
from agent.model.bundle import bundle as bundles
from agent.model.inference import inference, runtime
from agent.model.inference.features import Cut, Floats, Ints
from agent.model.inference.inference import Answers
from agent.model.sandbox import probe

# A worker that the cluster gave up may still write: its end is waited for.
PATIENCE_S, _LOOK_EVERY_S = 60.0, 0.5
# So many workers may die over a file before it is left: it may be what kills them.
MOST_TRIES = 4
SHARE = "DATA and OUT must be on a file system that all nodes have at the same path (NFS, or the like)"


class Order(msgspec.Struct, frozen=True):
    """What all workers are given: a bundle's bytes, who sent them, and what is wanted.

    `mark` is a file beside the answers that holds `token`: who reads it there sees that folder, not one of that name.
    """

    bundle: str
    files: dict[str, bytes]
    digest: str
    raw: bool
    mark: Path
    token: str
    agent: str = __version__
    runtime: str = runtime.NAME


class Piece(msgspec.Struct, frozen=True, eq=False):
    """The rows of a file, `rows` (n, F) and `t` (n,), and where the windows to answer begin."""

    index: int
    rows: Floats
    t: Ints
    starts: Ints


class Said(msgspec.Struct, frozen=True, eq=False):
    """What came of a job or a piece, or a problem; `wrong_use` where that is the user's to mend."""

    target: Path = Path()
    totals: Totals | None = None
    index: int = 0
    answers: Answers | None = None
    problem: str = ""
    wrong_use: bool = False


class Worker:
    """Nothing is loaded before the first job, so that what is wrong can be said as its answer."""

    def __init__(self, order: Order) -> None:
        self._order, self._node = order, socket.gethostname()
        self._work: Work | None = None

    def do(self, item: Job | Piece) -> Said:
        """Nothing is raised that is known to happen."""
        try:
            return self._file(item) if isinstance(item, Job) else self._answers(item)
        except OutstationError as problem:
            return Said(problem=f"node {self._node}: {problem}", wrong_use=isinstance(problem, UsageError))
        except OSError as error:
            return Said(problem=f"node {self._node}: {error}; what is done stays done: mend it, and start this again")

    def _file(self, job: Job) -> Said:
        """One file, as the engine of one machine answers it."""
        self._require_seen(job)
        work = self._ready()
        if work.identity(job.source, job.target) != job.identity:
            said = f"{job.source} has another size or time than where the command runs"
            raise UsageError(f"{said}; {SHARE}, and stay as is")
        with self._tried(job):
            return Said(target=job.target, totals=_patiently(work, job))

    def _answers(self, piece: Piece) -> Said:
        cut = Cut(piece.starts, len(piece.starts))
        return Said(index=piece.index, answers=self._ready().inference.answer(piece.rows, piece.t, cut, raw=True))

    def _ready(self) -> Work:
        self._work = self._work or self._loaded()
        return self._work

    def _loaded(self) -> Work:
        """The bundle as it was sent, proved on this node, too: processors differ. Raises UsageError."""
        order = self._order
        have, sent = f"{__version__} with {runtime.NAME}", f"{order.agent} with {order.runtime}"
        if have != sent:
            raise UsageError(f"outstation is {have} here and {sent} where the command runs; install the same on all")
        found = bundles.held(order.bundle, order.files, order.digest)
        try:
            probe.probe(found).require()
            loaded = inference.Inference(found.manifest, inference.load(found.manifest, found.model))
        except BadBundle as problem:
            raise BadBundle(f"{order.bundle}: {problem}") from None
        return Work(found, loaded, raw=order.raw)

    def _require_seen(self, job: Job) -> None:
        """Raises UsageError where this node has other folders than the driver."""
        if not job.source.exists():
            raise UsageError(f"{job.source} is not there; {SHARE}, or run it without --engine ray")
        mark = self._order.mark
        try:
            seen = mark.read_text(encoding="utf-8") == self._order.token
        except FileNotFoundError:
            seen = False
        if not seen:
            raise UsageError(f"{mark.parent} is another folder than where the command runs; {SHARE}")

    @contextmanager
    def _tried(self, job: Job) -> Iterator[None]:
        """What ends this process leaves its line in a file. Raises OutstationError where there are too many."""
        path = job.target.with_name(f"{job.target.name}.part.tries")
        with path.open("a+", encoding="ascii") as file:
            file.seek(0)
            tries = file.read().splitlines().count(self._order.token)
            file.write(f"{self._order.token}\n")
        if tries >= MOST_TRIES:
            path.unlink()
            raise OutstationError(
                f"{job.source}: {tries} workers died over it, most likely of too little memory; give a worker more, or "
                "split the file"
            )
        try:
            yield
        finally:
            path.unlink()


def _patiently(work: Work, job: Job) -> Totals:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return work.file(job.source, job.target, lambda *_: None)
        except Busy:
            if time.monotonic() > end:
                raise
            time.sleep(_LOOK_EVERY_S)
