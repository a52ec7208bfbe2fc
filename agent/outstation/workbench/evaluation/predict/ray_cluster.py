"""Client of an existing Ray cluster: maps items through Ray Data, with one loaded model in each worker.

An item whose worker dies goes to another worker. No other module imports `ray`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from outstation.foundation.errors import OutstationError, UsageError
from outstation.foundation.extras import install_command
from outstation.workbench.evaluation.predict.ledger import FileJob
from outstation.workbench.evaluation.predict.ray_worker import (
    MAX_ATTEMPTS,
    WindowShard,
    Worker,
    WorkerConfig,
    WorkerResult,
)

_CONNECT_TIMEOUT_S = 5.0
_CHECK_INTERVAL_S = 1.0
# A head that answers nothing, or a cluster without workers, is given up after this time: nodes may be restarted. Ray
# waits for nodes without end, and ends this process without a word 60 s after it lost the head.
_LOST_AFTER_S = 30.0
_NO_CLUSTER_HINT = (
    "start one with `ray start --head`, name it with --address HOST:PORT or RAY_ADDRESS, and run this on one of its "
    "nodes, for example by `ray job submit -- outstation model run …`"
)

_RESUME_HINT = "start nodes (`ray start --address=HEAD`) and this again: finished files stay finished"
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
        # A call after the end must fail, not connect again.
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
        # Its core writes log files of its own.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            import ray.data
        except ImportError as error:
            needed = f"--engine ray needs Ray, here and on every node: {install_command('ray')}"
            raise UsageError(f"{needed} ({error})") from None
        # Ray before 2.64 accepts only in this way how often a task is retried.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", DeprecationWarning)
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
        # Workers of nodes that join later: with one item a worker the load never exceeds 1.
        context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self._stdout_redirect.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        # Without the head a shutdown waits until Ray ends this process, before the error is printed.
        with contextlib.suppress(OSError):
            _connect(self._ray.get_runtime_context().gcs_address)
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
            compute=ray.data.ActorPoolStrategy(
                min_size=1, initial_size=workers, max_size=len(items), max_tasks_in_flight_per_actor=1
            ),
            max_task_retries=MAX_ATTEMPTS - 1 if are_shards else -1,
        )
        try:
            yield from self._follow(
                pickle.loads(result)
                for batch in results.iter_batches(batch_size=None, prefetch_batches=0)
                for result in batch["result"]
            )
        except ray.exceptions.RayActorError as error:
            raise OutstationError(_WORKERS_DIED if are_shards else _failure_message(str(error))) from None
        except ray.exceptions.RayError as error:
            raise OutstationError(_failure_message(str(error))) from None

    def _follow(self, results: Iterator[WorkerResult]) -> Iterator[WorkerResult]:
        """Yield `results`, which a thread waits for. Raises OutstationError when the head or all workers are lost."""
        received: queue.SimpleQueue[WorkerResult | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(results, received), name="ray results", daemon=True).start()
        seen_s = time.monotonic()
        while True:
            try:
                item = received.get(timeout=_CHECK_INTERVAL_S)
            except queue.Empty:
                problem = self._find_loss()
                if problem is None:
                    seen_s = time.monotonic()
                elif time.monotonic() - seen_s > _LOST_AFTER_S:
                    raise OutstationError(f"{problem}; {_RESUME_HINT}") from None
                continue
            seen_s = time.monotonic()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _find_loss(self) -> str | None:
        """Return the resource that the cluster lacks, or None."""
        head = self._ray.get_runtime_context().gcs_address
        try:
            _connect(head)
        except OSError as error:
            return f"the cluster's head {head} has not answered for {_LOST_AFTER_S:.0f} s: {error}"
        nodes = self._ray.nodes()
        if any(node["Alive"] and node["Resources"].get("CPU") for node in nodes):
            return None
        lost = sorted({node["NodeManagerAddress"] for node in nodes if not node["Alive"]})
        names = f" (lost: {', '.join(lost)})" if lost else ""
        return f"no node of the cluster at {head} has had a processor for workers for {_LOST_AFTER_S:.0f} s{names}"


def _forward(results: Iterator[WorkerResult], received: queue.SimpleQueue[WorkerResult | BaseException | None]) -> None:
    try:
        for result in results:
            received.put(result)
        received.put(None)
    except BaseException as error:  # the caller's thread raises it
        received.put(error)


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
        _connect(address)
    except (OSError, OverflowError) as error:
        raise UsageError(_unreachable_message(address, error)) from None


def _connect(address: str) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()


def _unreachable_message(address: str, reason: object) -> str:
    return f"--address {address}: no Ray cluster answers: {reason}; {_NO_CLUSTER_HINT}"


def _failure_message(ray_error: str) -> str:
    if "No module named 'outstation'" in ray_error:
        return "a node of the cluster has no outstation: pip install 'outstation[ray]' there, the same as here"
    return f"the cluster gave up; {_RESUME_HINT}. Ray says: {' '.join(ray_error.split())[:300]}"
