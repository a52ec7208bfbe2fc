"""Time on machines whose clock may be wrong: elapsed time from the boot-time clock, wall time with its quality."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

Quality = Literal["synced", "restored", "unsynced"]

BUILD_FLOOR_US = 1_764_000_000_000_000  # 2025-11-24: a wall clock before this was never set
_TIME_ERROR = 5
_EPOCH = datetime(1970, 1, 1)
_TIMESYNCD = Path("/run/systemd/timesync/synchronized")


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
        quality = "synced" if synced() else "restored"
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


def synced() -> bool:
    """Whether a time daemon says that the clock is right: to the kernel (adjtimex(2)), or by timesyncd's marker.

    The marker counts where asking the kernel is not allowed, as in a service with ProtectClock=yes.
    """
    status = -1 if _ADJTIMEX is None else int(_ADJTIMEX(ctypes.create_string_buffer(256)))
    return _TIMESYNCD.exists() if status == -1 else status != _TIME_ERROR


def rfc3339(wall_us: int) -> str:
    """`2026-11-24T22:18:01.000000Z` of epoch µs; clamped to years 1–9999."""
    seconds, micro = divmod(wall_us, 1_000_000)
    seconds = min(max(seconds, -62_135_596_800), 253_402_300_799)
    # Not strftime: %Y of the year 1 is "1".
    return f"{(_EPOCH + timedelta(seconds=seconds)).isoformat()}.{micro:06d}Z"


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
