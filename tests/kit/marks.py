"""Skip conditions."""

from __future__ import annotations

import os
import platform

import pytest

# Both runtimes check for every other operation that would end a process.
crashing = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the crashing model divides by what ends a process on x86-64 only"
)

root_only = pytest.mark.skipif(
    os.geteuid() != 0,
    reason="needs root, which alone can change users, give files away and mount disks",
)
