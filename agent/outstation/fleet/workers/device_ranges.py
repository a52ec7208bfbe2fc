"""Worker processes: run a job over ranges of devices on all processors, with progress."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

from outstation.fleet.database.store import DeviceRange, FleetStore
from outstation.foundation.errors import OutstationError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Advance = Callable[[int], None]

# A process costs half a second to start.
_MIN_MESSAGES = 5_000
# Ranges of unequal work: the last one should not keep all but one process waiting.
_RANGES_PER_PROCESS = 4
_PROGRESS_S = 0.2

_state: tuple[FleetStore, Any] | None = None


class RangeJob(Protocol[T_co]):
    """Function of a module that works on the devices of a range, and calls its third argument with progress."""

    def __call__(self, store: FleetStore, devices: DeviceRange, advance: Advance, /, *arguments: Any) -> T_co: ...


def split_devices(store: FleetStore, processes: int, most: int | None = None) -> list[DeviceRange]:
    """Return ranges of about as many messages, which together hold every device; one if more would not pay.

    `most`: ranges, if it matters little that one has more work than another.
    """
    weights: dict[str, int] = {}
    for device, _, last_seq in store.logs():
        # A row of an altered database may hold anything; it belongs to the range of its neighbours.
        if isinstance(device, str) and device.isascii() and isinstance(last_seq, int):
            weights[device] = weights.get(device, 0) + last_seq
    total = sum(weights.values())
    count = min(most or processes * _RANGES_PER_PROCESS, total // _MIN_MESSAGES, len(weights))
    if processes < 2 or count < 2:
        return [DeviceRange()]
    bounds: list[str] = []
    gathered = 0
    for device, weight in weights.items():
        if gathered >= total * (len(bounds) + 1) / count:
            bounds.append(device)
        gathered += weight
    return [DeviceRange(first, before) for first, before in zip([None, *bounds], [*bounds, None], strict=True)]


def run_over_devices(
    store: FleetStore,
    job: RangeJob[T],
    ranges: Sequence[tuple[DeviceRange, tuple[Any, ...]]],
    processes: int,
    advance: Advance,
) -> list[T]:
    """Run `job` over ranges of devices with further arguments, and return the results in the same order.

    Each process reads a snapshot of its own. Raises the errors of the job, OutstationError if a process dies.
    """
    if len(ranges) == 1 or processes == 1:
        return [job(store, devices, advance, *arguments) for devices, arguments in ranges]
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    reported = 0
    pool = ProcessPoolExecutor(min(processes, len(ranges)), context, _open, (store.location, counter))
    try:
        futures = [pool.submit(_run, job, devices, arguments) for devices, arguments in ranges]
        pending: Sequence[Future[T]] = futures
        while pending:
            done, rest = wait(pending, _PROGRESS_S)
            for future in done:
                future.result()
            pending, now = [*rest], int(counter.value)
            advance(now - reported)
            reported = now
        return [future.result() for future in futures]
    except BrokenProcessPool:
        problem = "a worker process ended (out of memory?); run it with fewer --processes"
        raise OutstationError(f"{store.name}: {problem}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _open(location: Path | str, counter: Any) -> None:
    global _state
    _state = FleetStore(location, read_only=True), counter


def _run(job: RangeJob[T], devices: DeviceRange, arguments: tuple[Any, ...]) -> T:
    assert _state is not None
    store, counter = _state

    def advance(n: int) -> None:
        with counter.get_lock():
            counter.value += n

    return job(store, devices, advance, *arguments)
