"""Heap: memory that was freed goes back to the system."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agent.device.machine import heap


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
