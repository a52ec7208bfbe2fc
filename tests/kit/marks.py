"""Skip conditions."""

from __future__ import annotations

import platform

import pytest

# Both runtimes check for every other operation that would end a process.
crashing = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the crashing model divides by what ends a process on x86-64 only"
)
