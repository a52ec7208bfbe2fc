"""Clock readings: elapsed time from the boot-time clock, and wall time with its quality."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec

ClockQuality = Literal["synced", "restored", "unsynced"]

MAX_TIME_S = 4_102_444_800.0  # 2100-01-01: no reading or label is of a later time
BUILD_FLOOR_US = 1_764_000_000_000_000  # 2025-11-24: an earlier wall clock was never set
# The kernel's limits (NTP_PHASE_LIMIT, MAXFREQ): after the last synchronization the error grows by 500 ppm, and at 16 s
# the clock counts as unsynchronized.
MAX_ERROR_US = 16_000_000
_ERROR_GROWTH_RATE = 500e-6
_TIME_ERROR = 5
_EPOCH = datetime(1970, 1, 1)
_TIMESYNCD_MARKER = Path("/run/systemd/timesync/synchronized")
_MAX_READ_GAP_S = 0.001


class _Timex(ctypes.Structure):
    """Head of `struct timex`, adjtimex(2), with room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("rest", ctypes.c_char * 256),
    )


class ClockReading(msgspec.Struct, frozen=True):
    """Reading of both clocks: `wall_us` epoch µs and its `quality`, `boot_s` seconds since boot (sleep included).

    `error_us`: maximum error of the wall time by the time service; None without one.
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
        """Wall time minus boot time. Constant between steps: slewing moves both clocks."""
        return self.wall_us - self.boot_us


# Clock and boot id of a simulated machine.
_simulated: tuple[Callable[[], ClockReading], Callable[[], str]] | None = None


@contextmanager
def simulated(read_clock: Callable[[], ClockReading], read_boot_id: Callable[[], str]) -> Iterator[None]:
    """Replace the clocks and the boot id that this process reads, for simulations."""
    global _simulated
    before, _simulated = _simulated, (read_clock, read_boot_id)
    try:
        yield
    finally:
        _simulated = before


def read(floor_us: int = BUILD_FLOOR_US, last_synced_us: int = 0) -> ClockReading:
    """Read both clocks at one moment.

    The wall time is `unsynced` below `floor_us`, the latest time from the collector, and below `last_synced_us`, the
    latest time from a time service, unless a time service confirms it now. Below BUILD_FLOOR_US it is always
    `unsynced`.
    """
    if _simulated is not None:
        return _simulated[0]()
    error = sync_error_us()
    wall, boot_s = _read_both_clocks()
    if error is not None:
        # Asked before and after the reading: the clock may have been set in between.
        error = sync_error_us()
    if wall < BUILD_FLOOR_US or (error is None and wall < max(floor_us, last_synced_us)):
        return ClockReading(wall, boot_s, "unsynced")
    return ClockReading(wall, boot_s, "restored" if error is None else "synced", error)


def _read_both_clocks() -> tuple[int, float]:
    """Return wall time (µs) and boot time (s), read together: a preempted thread would see a step."""
    for _ in range(10):
        before = boot_seconds()
        wall = time.time_ns() // 1000
        after = boot_seconds()
        if after - before < _MAX_READ_GAP_S:
            break
    return wall, after


def boot_seconds() -> float:
    """Return seconds since boot, sleep included. Steps of the wall clock do not change it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if _simulated is None else _simulated[0]().boot_s


def boot_id() -> str:
    """Return the kernel's id of this boot, or ""."""
    if _simulated is not None:
        return _simulated[1]()
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def sync_error_us() -> int | None:
    """Return the maximum error of the wall clock in µs; None if it is not synchronized.

    The kernel knows (adjtimex(2)). Where that call is forbidden, as in a service with ProtectClock=yes, the age of the
    marker that timesyncd touches at each synchronization gives the error.
    """
    timex = _Timex()
    status = -1 if _ADJTIMEX is None else int(_ADJTIMEX(ctypes.byref(timex)))
    if status == -1:
        try:
            age_s = abs(time.time() - _TIMESYNCD_MARKER.stat().st_mtime)
        except OSError:
            return None
        error = round(age_s * _ERROR_GROWTH_RATE * 1e6)
        return error if error < MAX_ERROR_US else None
    return None if status == _TIME_ERROR else min(int(timex.maxerror), MAX_ERROR_US)


def to_rfc3339(wall_us: int) -> str:
    """Format epoch µs as `2026-11-24T22:18:01.000000Z`, clamped to the years 1 to 9999."""
    seconds, micro = divmod(wall_us, 1_000_000)
    seconds = min(max(seconds, -62_135_596_800), 253_402_300_799)
    # strftime gives "1" for the year 1.
    return f"{(_EPOCH + timedelta(seconds=seconds)).isoformat()}.{micro:06d}Z"


def now_rfc3339() -> str:
    """Return the wall clock's time as RFC 3339."""
    return to_rfc3339(read().wall_us)


def to_datetime(wall_us: int) -> datetime:
    """Return the time in UTC, clamped as in `to_rfc3339`."""
    return datetime.fromisoformat(to_rfc3339(wall_us))


def parse_rfc3339(text: str) -> int:
    """Parse an RFC 3339 time to epoch µs. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def parse_local(text: str) -> datetime | None:
    """Return the time of a text that gives one without a time zone; None for any other text."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return moment if moment.tzinfo is None else None


def _load_adjtimex() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None).adjtimex
    except (AttributeError, OSError):
        return None


_ADJTIMEX = _load_adjtimex()
