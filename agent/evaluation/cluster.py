"""Files to the workers of an existing Ray cluster, through Ray Data: one model loaded in each, a file at a time.

A file whose worker dies is handed to another one, which goes on where that one was. The only module that knows `ray`.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import msgspec

from agent.errors import BadBundle, OutstationError, UsageError
from agent.evaluation import output, run
from agent.evaluation.run import Progress, Work
from agent.evaluation.totals import DONE, Job, Ledger, Totals
from agent.evaluation.watched import Watched
from agent.evaluation.worker import Order, Said, Worker
from agent.model.bundle import Bundle

NO_RAY = "--engine ray needs Ray, here and on every node: pip install 'outstation[ray]'"
_REACH_S = 5.0
_NO_CLUSTER = (
    "start one with `ray start --head`, name it with --address HOST:PORT or RAY_ADDRESS, and run this on a node of it, "
    "for example by `ray job submit -- outstation model run …`"
)


class Cluster:
    """Used as `with Cluster(address) as cluster`: this process is a driver of the cluster meanwhile."""

    def __init__(self, address: str | None = None) -> None:
        """Of RAY_ADDRESS, or this machine's, without an `address`. Raises UsageError where Ray is not installed."""
        # A driver has nothing to report to anybody.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # What its core has to say goes to its own log files.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            import ray.data
        except ImportError as error:
            raise UsageError(f"{NO_RAY} ({error})") from None
        self._ray: Any = ray
        self._address = address or os.environ.get("RAY_ADDRESS") or "auto"
        # What Ray tells of workers that died, it prints to stdout, which is for the answer.
        self._aside = redirect_stdout(sys.stderr)

    def __enter__(self) -> Cluster:
        """Raises UsageError where it cannot be reached."""
        _require_reached(self._address)
        try:
            self._ray.init(self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            said = str(error).strip().partition("\n")[0]
            raise UsageError(f"--address {self._address}: no Ray cluster is reached: {said}; {_NO_CLUSTER}") from None
        self._quiet()
        self._aside.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()
        self._aside.__exit__(None, None, None)

    def folder(self, work: Work, bundle: Bundle, source: Path, out: Path, progress: Progress) -> Totals:
        """As `run.folder`. Raises UsageError, BadBundle, OutstationError."""
        source, out = source.resolve(), out.resolve()
        jobs = [work.job(path, out / path.name) for path in run.files(source, out)]
        ledger = Ledger(out)
        found = {job.target: ledger.of(job) for job in jobs}
        with _marked(out / DONE) as (mark, token), Watched(jobs, progress) as watched:
            for job, totals in self._each(_order(work, bundle, mark, token), jobs, found, watched):
                ledger.add(job, totals)
        ledger.remove()
        return _sum(jobs, found)

    def file(self, work: Work, bundle: Bundle, source: Path, out: Path, progress: Progress) -> Totals:
        """As `Work.file`, by one worker. Raises UsageError, BadBundle, OutstationError."""
        source, out = source.resolve(), out.resolve()
        jobs, found = [work.job(source, out)], dict[Path, Totals | None]()
        with _marked(output.part_of(out)) as (mark, token), Watched(jobs, progress) as watched:
            for _ in self._each(_order(work, bundle, mark, token), jobs, found, watched):
                pass
        return _sum(jobs, found)

    def _each(
        self, order: Order, jobs: Sequence[Job], found: dict[Path, Totals | None], watched: Watched
    ) -> Iterator[tuple[Job, Totals]]:
        """The jobs that are not in `found` yet, as they are done, which puts them there."""
        open_ = []
        for job in jobs:
            totals = found.get(job.target)
            if totals is None:
                open_.append(job)
            else:
                watched.add(job, totals)
        by_target = {str(job.target): job for job in open_}
        for said in self._said(order, open_):
            if said.totals is None:
                raise _problem(said)
            job = by_target[said.target]
            found[job.target] = said.totals
            watched.add(job, said.totals)
            yield job, said.totals

    def _said(self, order: Order, jobs: Sequence[Job]) -> Iterator[Said]:
        """What workers say of each, in the order they are done. Raises OutstationError where the cluster goes away."""
        if not jobs:
            return
        ray = self._ray
        workers = max(1, min(len(jobs), int(ray.cluster_resources().get("CPU", 1))))
        rows = ray.data.from_items([{"job": _written(job)} for job in jobs], override_num_blocks=len(jobs))
        answered = rows.map_batches(
            _Actor,
            fn_constructor_args=(ray.put(order),),
            batch_size=1,
            # One file each, so that none waits behind a long one. Workers that die, or their nodes, are replaced, and
            # the file is handed out again: Ray Data's own rule, for ever; `Worker` ends it.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, max_tasks_in_flight_per_actor=1),
        )
        try:
            for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
                for text in batch["said"]:
                    yield msgspec.json.decode(str(text), type=Said)
        except ray.exceptions.RayError as error:
            raise OutstationError(_death(str(error))) from None

    def _quiet(self) -> None:
        """Ray Data's own bars and reports stand in the way of ours."""
        context = self._ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)


class _Actor:
    """A `Worker` as Ray Data calls it."""

    def __init__(self, order: Any) -> None:
        import ray

        self._worker = Worker(ray.get(order))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        jobs = [_read(str(text)) for text in batch["job"]]
        return {"said": [msgspec.json.encode(self._worker.answer(job)).decode() for job in jobs]}


def _written(job: Job) -> str:
    return msgspec.json.encode([str(job.source), str(job.target), job.identity]).decode()


def _read(text: str) -> Job:
    source, target, identity = msgspec.json.decode(text, type=tuple[str, str, str])
    return Job(Path(source), Path(target), identity)


def _order(work: Work, bundle: Bundle, mark: Path, token: str) -> Order:
    name = f"{bundle.manifest.name} {bundle.manifest.version}"
    return Order(name, bundle.files, bundle.digest, work.raw, str(mark), token)


def _sum(jobs: Sequence[Job], found: dict[Path, Totals | None]) -> Totals:
    """In the order of the files, whichever was done first."""
    total = Totals()
    for job in jobs:
        totals = found[job.target]
        assert totals is not None
        total.add(totals)
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


def _require_reached(address: str) -> None:
    """Raises UsageError within seconds, where Ray itself would try for a minute."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UsageError(f"--address {address}: is no HOST:PORT of a Ray cluster's head; {_NO_CLUSTER}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"--address {address}: no Ray cluster is reached: {error}; {_NO_CLUSTER}") from None


def _problem(said: Said) -> OutstationError:
    if said.wrong_use:
        return UsageError(said.problem)
    return BadBundle(said.problem)


def _death(said: str) -> str:
    if "No module named 'agent'" in said:
        return "a node of the cluster has no outstation: pip install 'outstation[ray]' there, the same as here"
    return (
        "the cluster gave the work up; start this again: what is done stays done. "
        f"Ray says: {' '.join(said.split())[:300]}"
    )
