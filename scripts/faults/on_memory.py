"""Memory faults: failing allocations in the daemon."""

from __future__ import annotations

import resource
import time
from random import Random

from scripts.faults import fault
from scripts.faults.disk import memory_cgroup, no_cgroup
from scripts.faults.world import World


@fault(
    "memory-limit",
    means="The kernel kills the daemon during its work because its cgroup is out of memory.",
    sees="nothing but a new `started` event in the audit log",
    missing=no_cgroup,
)
def memory_limit(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 0.8))
    before, most = world.restarts, round(rng.uniform(0.1, 3.0) * 2**20)
    with memory_cgroup(world) as limit:
        until = time.monotonic() + 20.0
        while world.restarts == before and time.monotonic() < until:
            limit(most)
            most //= 2
            time.sleep(0.5)
    assert world.restarts > before, "nobody was killed"


@fault(
    "allocation-refused",
    means="For a second or two the daemon gets no more address space: allocations fail at random places.",
    sees="a `MemoryError` in the journal, and a new `started` event in the audit log if it restarted",
)
def allocation_refused(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 0.8))
    pid = world.device.pid
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (round(rng.uniform(0.0, 1.0) * 2**20), before[1]))
    time.sleep(rng.uniform(0.5, 2.0))
    if world.device.is_running and world.device.pid == pid:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
