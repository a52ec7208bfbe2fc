"""Heap: memory that was freed is used again, or goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from outstation.device.machine import heap


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096 / 2**20


def test_memory_in_the_middle_of_the_heap_is_given_back() -> None:
    # Below the size that the C library maps by itself; every second array keeps the end of the heap in use.
    arrays = [np.ones(8000) for _ in range(2000)]
    remaining = arrays[1::2]
    before = resident_mb()
    del arrays
    heap.release_free()
    assert resident_mb() < before - 40
    assert len(remaining) == 1000


# 20 MB are allocated and freed ten times: 5,000 pages.
REPEATED = """
import resource
import numpy as np
from outstation.device.machine import heap
heap.keep_free()
for round in range(11):
    arrays = [np.ones(1 << 18) for _ in range(10)]
    del arrays
    if round == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_arrays_that_follow_freed_ones_take_no_fresh_pages() -> None:
    # In a process of its own: other tests keep the usual heap.
    done = subprocess.run([sys.executable, "-c", REPEATED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
