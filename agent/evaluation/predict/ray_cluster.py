"""Client of an existing Ray cluster: maps items through Ray Data, with one loaded model in each worker.

An item whose worker dies goes to another worker. No other module imports `ray`.
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
from agent.extras import install_command

_CONNECT_TIMEOUT_S = 5.0
_NO_CLUSTER_HINT = (
    "start one with `ray start --head`, name it with --address HOST:PORT or RAY_ADDRESS, and run this on one of its "
    "nodes, for example by `ray job submit -- outstation model run …`"
)

_WORKERS_DIED = (
    f"{MAX_ATTEMPTS} workers died over the windows of one file, most likely because memory ran out; give a worker "
    "more, or split the file"
)


class RayCluster:
    """Context manager: inside it, this process is a driver of the cluster."""

    def __init__(self, address: str | None = None) -> None:
        """Default to RAY_ADDRESS, or to this machine's cluster. Raises UsageError if Ray is not installed."""
        # No usage statistics.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Its core writes log files of its own.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            import ray.data
        except ImportError as error:
            needed = f"--engine ray needs Ray, here and on every node: {install_command('ray')}"
            raise UsageError(f"{needed} ({error})") from None
        self._ray: Any = ray
        self._address = address or os.environ.get("RAY_ADDRESS") or "auto"
        # Ray prints deaths of workers to stdout, which is for the result.
        self._stdout_redirect = redirect_stdout(sys.stderr)

    def __enter__(self) -> RayCluster:
        """Raise UsageError if the cluster cannot be reached."""
        _require_reachable(self._address)
        try:
            self._ray.init(self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UsageError(_unreachable_message(self._address, reason)) from None
        context = self._ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self._stdout_redirect.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()
        self._stdout_redirect.__exit__(None, None, None)

    def map(self, config: WorkerConfig, items: Sequence[FileJob | WindowShard]) -> Iterator[WorkerResult]:
        """Yield the workers' results as they finish. Raises OutstationError if cluster or workers die."""
        if not items:
            return
        ray = self._ray
        workers = max(1, min(len(items), int(ray.cluster_resources().get("CPU", 1))))
        are_shards = isinstance(items[0], WindowShard)
        rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
        results = rows.map_batches(
            _RayActor,
            fn_constructor_args=(ray.put(config),),
            batch_size=1,
            # One item each, so that none waits behind a long one. Ray Data replaces workers and nodes that die, and
            # hands the item out again, without end. For files the worker counts the attempts and names the file; for
            # shards, which need no shared folder, Ray counts them.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, max_tasks_in_flight_per_actor=1),
            max_task_retries=MAX_ATTEMPTS - 1 if are_shards else -1,
        )
        try:
            for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
                for result in batch["result"]:
                    yield pickle.loads(result)
        except ray.exceptions.RayActorError as error:
            raise OutstationError(_WORKERS_DIED if are_shards else _failure_message(str(error))) from None
        except ray.exceptions.RayError as error:
            raise OutstationError(_failure_message(str(error))) from None


class _RayActor:
    """Adapter of `Worker` for Ray Data."""

    def __init__(self, config: Any) -> None:
        import ray

        self._worker = Worker(ray.get(config))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = [pickle.dumps(self._worker.process(pickle.loads(item))) for item in batch["item"]]
        # The None keeps numpy from making one array of equally long bytes.
        return {"result": np.array([*results, None], object)[:-1]}


def _require_reachable(address: str) -> None:
    """Raise UsageError within seconds; Ray itself would try for a minute."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UsageError(f"--address {address}: not HOST:PORT of a Ray cluster's head; {_NO_CLUSTER_HINT}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(_unreachable_message(address, error)) from None


def _unreachable_message(address: str, reason: object) -> str:
    return f"--address {address}: no Ray cluster answers: {reason}; {_NO_CLUSTER_HINT}"


def _failure_message(ray_error: str) -> str:
    if "No module named 'agent'" in ray_error:
        return "a node of the cluster has no outstation: pip install 'outstation[ray]' there, the same as here"
    return (
        "the cluster gave up; start this again: finished files stay finished. "
        f"Ray says: {' '.join(ray_error.split())[:300]}"
    )
