"""Time on machines whose clock may be wrong: elapsed time from the boot-time clock, wall time with its quality."""

from __future__ import annotations

import ctypes
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec

ClockQuality = Literal["synced", "restored", "unsynced"]

BUILD_FLOOR_US = 1_764_000_000_000_000  # 2025-11-24: a wall clock before this was never set
# The kernel's own limits (NTP_PHASE_LIMIT, MAXFREQ): since the last word of a time service the error grows by 500 ppm,
# and at 16 s the clock counts as unsynchronized.
MAX_ERROR_US = 16_000_000
_ERROR_GROWTH_RATE = 500e-6
_TIME_ERROR = 5
_EPOCH = datetime(1970, 1, 1)
_TIMESYNCD_MARKER = Path("/run/systemd/timesync/synchronized")
_MAX_READ_GAP_S = 0.001


class _Timex(ctypes.Structure):
    """The head of `struct timex`, adjtimex(2); room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("rest", ctypes.c_char * 256),
    )


class ClockReading(msgspec.Struct, frozen=True):
    """One reading of both clocks: `wall_us` epoch µs, `boot_s` seconds since boot (counts sleep), `quality` of wall.

    `error_us`: by how much a time service says that wall may be off; None where none does.
    """

    wall_us: int
    boot_s: float
    quality: ClockQuality
    error_us: int | None = None

    @property
    def boot_us(self) -> int:
        return round(self.boot_s * 1e6)

    @property
    def offset_us(self) -> int:
        """Wall less boot time. Constant between two steps: what slews the one clock slews the other."""
        return self.wall_us - self.boot_us


def read(floor_us: int = BUILD_FLOOR_US, last_synced_us: int = 0) -> ClockReading:
    """Both clocks at one moment.

    Wall time under `floor_us`, the latest that the collector gave, or under `seen_us`, the latest that a time service
    gave, is `unsynced`, unless a time service vouches for it now; under BUILD_FLOOR_US it is whoever vouches for it.
    """
    error = sync_error_us()
    wall, boot_s = _read_both_clocks()
    if error is not None:
        # Asked on both sides of the look at the clock: what was set in between is not vouched for.
        error = sync_error_us()
    if wall < BUILD_FLOOR_US or (error is None and wall < max(floor_us, last_synced_us)):
        return ClockReading(wall, boot_s, "unsynced")
    return ClockReading(wall, boot_s, "restored" if error is None else "synced", error)


def _read_both_clocks() -> tuple[int, float]:
    """Wall time, µs, and boot time, s, taken together: a thread put aside in between would look like a step."""
    for _ in range(10):
        before = boot_seconds()
        wall = time.time_ns() // 1000
        after = boot_seconds()
        if after - before < _MAX_READ_GAP_S:
            break
    return wall, after


def boot_seconds() -> float:
    """Seconds since boot, sleep included; no step of the wall clock moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """The kernel's id of this boot; `""` where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def sync_error_us() -> int | None:
    """By how much a time service says that the clock may be off, µs; None where none says that it is right.

    The kernel knows (adjtimex(2)). Where asking it is not allowed, as in a service with ProtectClock=yes, the marker
    that timesyncd touches at each synchronization counts, by the kernel's rule.
    """
    timex = _Timex()
    status = -1 if _ADJTIMEX is None else int(_ADJTIMEX(ctypes.byref(timex)))
    if status == -1:
        return _marker_error_us()
    return None if status == _TIME_ERROR else min(int(timex.maxerror), MAX_ERROR_US)


def _marker_error_us() -> int | None:
    try:
        age_s = abs(time.time() - _TIMESYNCD_MARKER.stat().st_mtime)
    except OSError:
        return None
    error = round(age_s * _ERROR_GROWTH_RATE * 1e6)
    return error if error < MAX_ERROR_US else None


def to_rfc3339(wall_us: int) -> str:
    """`2026-11-24T22:18:01.000000Z` of epoch µs; clamped to years 1–9999."""
    seconds, micro = divmod(wall_us, 1_000_000)
    seconds = min(max(seconds, -62_135_596_800), 253_402_300_799)
    # Not strftime: %Y of the year 1 is "1".
    return f"{(_EPOCH + timedelta(seconds=seconds)).isoformat()}.{micro:06d}Z"


def parse_rfc3339(text: str) -> int:
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
