"""Time on machines whose clock may be wrong: elapsed time from the boot-time clock, wall time with its quality."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

Quality = Literal["synced", "restored", "unsynced"]

BUILD_FLOOR_US = 1_764_000_000_000_000  # 2025-11-24: a wall clock before this was never set
_TIME_ERROR = 5


@dataclass(frozen=True, slots=True)
class Now:
    """One reading of both clocks: `wall_us` epoch µs, `boot_s` seconds since boot (counts sleep), `quality` of wall."""

    wall_us: int
    boot_s: float
    quality: Quality


def read(floor_us: int = BUILD_FLOOR_US) -> Now:
    """Both clocks; wall time under `floor_us`, the latest time known to have passed, is `unsynced`."""
    wall = time.time_ns() // 1000
    if wall < floor_us:
        quality: Quality = "unsynced"
    else:
        quality = "synced" if kernel_synced() else "restored"
    return Now(wall, boot_seconds(), quality)


def boot_seconds() -> float:
    """Seconds since boot, sleep included; no step of the wall clock moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """The kernel's id of this boot; `""` where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def kernel_synced() -> bool:
    """Whether a time daemon has told the kernel that the clock is right (adjtimex(2))."""
    if _ADJTIMEX is None:
        return False
    return int(_ADJTIMEX(ctypes.create_string_buffer(256))) not in (-1, _TIME_ERROR)


def rfc3339(wall_us: int) -> str:
    """`2026-11-24T22:18:01.000000Z` of epoch µs; clamped to years 1–9999."""
    seconds, micro = divmod(wall_us, 1_000_000)
    seconds = min(max(seconds, -62_135_596_800), 253_402_300_799)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{micro:06d}Z"


def epoch_us(text: str) -> int:
    """Epoch µs of an RFC 3339 time. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _load_adjtimex() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None).adjtimex
    except (AttributeError, OSError):
        return None


_ADJTIMEX = _load_adjtimex()
