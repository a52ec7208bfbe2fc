"""An existing Ray cluster, and work for it through Ray Data: one model loaded in each worker, an item at a time.

An item whose worker dies is handed to another one. The only module that knows `ray`.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from agent.errors import OutstationError, UsageError
from agent.evaluation.predict.ledger import FileJob
from agent.evaluation.predict.ray_worker import MAX_ATTEMPTS, WindowShard, Worker, WorkerConfig, WorkerResult

NO_RAY = "--engine ray needs Ray, here and on every node: pip install 'outstation[ray]'"
_CONNECT_TIMEOUT_S = 5.0
_NO_CLUSTER_HINT = (
    "start one with `ray start --head`, name it with --address HOST:PORT or RAY_ADDRESS, and run this on a node of it, "
    "for example by `ray job submit -- outstation model run …`"
)

_WORKERS_DIED = (
    f"{MAX_ATTEMPTS} workers died over the windows of one file, most likely of too little memory; give a worker more, or "
    "split the file"
)


class RayCluster:
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
        self._stdout_redirect = redirect_stdout(sys.stderr)

    def __enter__(self) -> RayCluster:
        """Raises UsageError where it cannot be reached."""
        _require_reachable(self._address)
        try:
            self._ray.init(self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            said = str(error).strip().partition("\n")[0].rstrip(".")
            raise UsageError(
                f"--address {self._address}: no Ray cluster is reached: {said}; {_NO_CLUSTER_HINT}"
            ) from None
        self._silence_ray()
        self._stdout_redirect.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()
        self._stdout_redirect.__exit__(None, None, None)

    def map(self, config: WorkerConfig, items: Sequence[FileJob | WindowShard]) -> Iterator[WorkerResult]:
        """What workers say of each, in the order they are done.

        Raises OutstationError where the cluster goes away, or worker after worker dies over a piece.
        """
        if not items:
            return
        ray = self._ray
        workers = max(1, min(len(items), int(ray.cluster_resources().get("CPU", 1))))
        pieces = isinstance(items[0], WindowShard)
        rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
        told = rows.map_batches(
            _RayActor,
            fn_constructor_args=(ray.put(config),),
            batch_size=1,
            # One item each, so that none waits behind a long one. Workers that die, or their nodes, are replaced, and
            # the item is handed out again: Ray Data's own rule, for ever. `Worker` ends it for files, which it can
            # name; for pieces, which have no folder that all nodes share, Ray counts the tries.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, max_tasks_in_flight_per_actor=1),
            max_task_retries=MAX_ATTEMPTS - 1 if pieces else -1,
        )
        try:
            for batch in told.iter_batches(batch_size=None, prefetch_batches=0):
                for said in batch["said"]:
                    yield pickle.loads(said)
        except ray.exceptions.RayActorError as error:
            raise OutstationError(_WORKERS_DIED if pieces else _failure_message(str(error))) from None
        except ray.exceptions.RayError as error:
            raise OutstationError(_failure_message(str(error))) from None

    def _silence_ray(self) -> None:
        """Ray Data's own bars and reports stand in the way of ours."""
        context = self._ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)


class _RayActor:
    """A `Worker` as Ray Data calls it."""

    def __init__(self, config: Any) -> None:
        import ray

        self._worker = Worker(ray.get(config))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        said = [pickle.dumps(self._worker.process(pickle.loads(item))) for item in batch["item"]]
        return {"said": np.array([*said, None], object)[:-1]}


def _require_reachable(address: str) -> None:
    """Raises UsageError within seconds, where Ray itself would try for a minute."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UsageError(f"--address {address}: is no HOST:PORT of a Ray cluster's head; {_NO_CLUSTER_HINT}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"--address {address}: no Ray cluster is reached: {error}; {_NO_CLUSTER_HINT}") from None


def _failure_message(ray_error: str) -> str:
    if "No module named 'agent'" in ray_error:
        return "a node of the cluster has no outstation: pip install 'outstation[ray]' there, the same as here"
    return (
        "the cluster gave the work up; start this again: what is done stays done. "
        f"Ray says: {' '.join(ray_error.split())[:300]}"
    )
