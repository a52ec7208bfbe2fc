"""`model run` and the answers of `model evaluate` by the workers of a cluster: the same as one machine makes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from agent.errors import BadBundle, UsageError
from agent.evaluation.examples import Rows
from agent.evaluation.predict import output, run
from agent.evaluation.predict.ledger import DONE, Job, Ledger, Totals
from agent.evaluation.predict.ray_cluster import Cluster
from agent.evaluation.predict.ray_worker import Order, Piece, Said
from agent.evaluation.predict.run import Progress, Work
from agent.evaluation.predict.watched import Watched
from agent.model.bundle.bundle import Bundle
from agent.model.inference import scores
from agent.model.inference.features import Cut, Ints
from agent.model.inference.inference import Answers, Inference


def folder(cluster: Cluster, work: Work, bundle: Bundle, source: Path, out: Path, progress: Progress) -> Totals:
    """As `run.folder`. Raises UsageError, BadBundle, OutstationError."""
    source, out = source.resolve(), out.resolve()
    jobs = [work.job(path, out / path.name) for path in run.files(source, out)]
    ledger = Ledger(out)
    found = {job.target: done for job in jobs if (done := ledger.of(job)) is not None}
    with _marked(out / DONE) as (mark, token), Watched(jobs, progress) as watched:
        for job, totals in _each(cluster, _order(bundle, work.raw, mark, token), jobs, found, watched):
            ledger.add(job, totals)
    ledger.remove()
    return _sum(jobs, found)


def file(cluster: Cluster, work: Work, bundle: Bundle, source: Path, out: Path, progress: Progress) -> Totals:
    """As `Work.file`, by one worker. Raises UsageError, BadBundle, OutstationError."""
    source, out = source.resolve(), out.resolve()
    jobs, found = [work.job(source, out)], dict[Path, Totals]()
    with _marked(output.part_of(out)) as (mark, token), Watched(jobs, progress) as watched:
        for _ in _each(cluster, _order(bundle, work.raw, mark, token), jobs, found, watched):
            pass
    return _sum(jobs, found)


def answered(cluster: Cluster, bundle: Bundle) -> Callable[[Inference, Rows, Ints], Answers]:
    """`examples.answered` by a worker for each file. The rows are sent: nothing needs to be where the workers are."""

    def answer(_: Inference, rows: Rows, starts: Ints) -> Answers:
        pieces = []
        for i, of in enumerate(rows.files_rows()):
            some = starts[(starts >= of.start) & (starts < of.stop)] - of.start
            pieces.append(Piece(i, rows.rows[of], rows.t[of], some))
        found: dict[int, Answers] = {}
        for said in cluster.map(_order(bundle, True, Path(), ""), pieces):
            if said.answers is None:
                raise _problem(said)
            found[said.index] = said.answers
        parts = [found[i] for i in range(len(pieces))]
        outputs = np.concatenate([one.outputs for one in parts if one.outputs is not None])
        missing = np.concatenate([one.missing for one in parts])
        return Answers(Cut(starts, len(rows.rows)), scores.joined([one.scores for one in parts]), missing, outputs)

    return answer


def _each(
    cluster: Cluster, order: Order, jobs: Sequence[Job], found: dict[Path, Totals], watched: Watched
) -> Iterator[tuple[Job, Totals]]:
    """The jobs that are not in `found` yet, as they are done, which puts them there."""
    for job in jobs:
        if job.target in found:
            watched.add(job, found[job.target])
    waiting = {job.target: job for job in jobs if job.target not in found}
    for said in cluster.map(order, list(waiting.values())):
        if said.totals is None:
            raise _problem(said)
        job = waiting[said.target]
        found[job.target] = said.totals
        watched.add(job, said.totals)
        yield job, said.totals


def _order(bundle: Bundle, raw: bool, mark: Path, token: str) -> Order:
    name = f"{bundle.manifest.name} {bundle.manifest.version}"
    return Order(name, bundle.files, bundle.digest, raw, mark, token)


def _sum(jobs: Sequence[Job], found: dict[Path, Totals]) -> Totals:
    """In the order of the files, whichever was done first."""
    total = Totals()
    for job in jobs:
        total.add(found[job.target])
    return total


@contextmanager
def _marked(beside: Path) -> Iterator[tuple[Path, str]]:
    """(file, token): a file in the folder of the answers by which a worker tells that it sees this folder."""
    path, token = beside.with_name(f"{beside.name}.ray"), secrets.token_hex(16)
    with output.locked(path) as file:
        file.truncate(0)
        file.write(token.encode())
        file.flush()
        os.fsync(file.fileno())
        try:
            yield path, token
        finally:
            path.unlink(missing_ok=True)


def _problem(said: Said) -> UsageError | BadBundle:
    return UsageError(said.problem) if said.wrong_use else BadBundle(said.problem)
