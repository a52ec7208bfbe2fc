"""Memory faults: failing allocations in the daemon."""

from __future__ import annotations

import resource
import time
from random import Random

from scripts.faults import fault
from scripts.faults.disk import memory_cgroup, no_cgroup
from scripts.faults.world import Setting, World


@fault(Setting(missing=no_cgroup))
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


@fault()
def allocation_refused(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 0.8))
    pid = world.device.pid
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (round(rng.uniform(0.0, 1.0) * 2**20), before[1]))
    time.sleep(rng.uniform(0.5, 2.0))
    if world.device.is_running and world.device.pid == pid:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
