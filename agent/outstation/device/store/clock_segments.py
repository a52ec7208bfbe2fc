"""Clock segments: periods of a boot in which wall time minus boot time is constant.

Within a segment, a row's wall time gives its boot time. A segment is identified by its offset: a step back to an offset
that this boot had before returns to that segment, so a clock that two time services pull to and fro makes two segments,
not thousands. Rows with a time from their producer belong to a segment only if that time was read from this machine's
clock; otherwise to none (PRODUCER_TIME).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from outstation.device.store.tables import meta, schema
from outstation.foundation.clock import ClockQuality, ClockReading

# Time services step by 0.4 s (timesyncd) or 1 s (chrony) and slew smaller errors; both clocks slew together.
STEP_US = 500_000
PRODUCER_TIME = 0
# Names in table meta: the log that holds the anchors; "" once it has an anchor of every segment; boot and number of the
# segment in force, and of the last anchor.
ANCHORED_LOG, UNANNOUNCED = "clock anchored log", "clock unannounced"
_CURRENT_SEGMENT, _LAST_ANNOUNCED = "clock segment", "clock announced"
QUALITIES: tuple[ClockQuality, ...] = ("synced", "restored", "unsynced")
_TOLERANCE_US = 5_000_000
# The end of a segment is written this often at most; a step and an anchor write it at once.
_SAVE_INTERVAL_US = 60_000_000
_COLUMNS = "boot, segment, offset_us, first_us, last_us, quality, error_us"
_INSERT = f"INSERT INTO clock_segments ({_COLUMNS}, announced) VALUES (?, ?, ?, ?, ?, ?, ?, 0)"
_LAST_CHUNK = "SELECT boot, boot_us FROM chunks WHERE boot < ? ORDER BY id DESC LIMIT 1"
_LAST_SEEN = (
    "SELECT boot, max(last_us) FROM checked_clock_segments WHERE boot < ? GROUP BY boot ORDER BY boot DESC LIMIT 1"
)


class ClockStamp(msgspec.Struct, frozen=True):
    """Clock of the rows from `first` on: `segment` of `boot` (PRODUCER_TIME: times from their producer)."""

    first: int
    boot: int
    segment: int
    quality: int


class ClockSegment(msgspec.Struct, frozen=True):
    """Clock segment; `offset_us` is wall minus boot time, seen in force from boot time `first_us` to `last_us`."""

    boot: int
    number: int
    offset_us: int
    first_us: int
    last_us: int
    quality: int
    error_us: int | None

    def fits(self, now: ClockReading) -> bool:
        return abs(now.offset_us - self.offset_us) < STEP_US

    def covers(self, first_t: int, last_t: int) -> bool:
        """Return True if times from `first_t` to `last_t` can have been read from the clock in this segment."""
        begin, end = self.first_us + self.offset_us - _TOLERANCE_US, self.last_us + self.offset_us + _TOLERANCE_US
        return begin <= first_t and last_t <= end


class ClockSegments:
    """Clock segments of one boot, inside a `Transaction`."""

    def __init__(self, db: sqlite3.Connection, boot: int) -> None:
        self._db, self._boot = db, boot
        self._cache: dict[int, ClockSegment] | None = None
        self._number: int | None = None

    def observe(self, now: ClockReading) -> ClockSegment:
        """Return the segment at `now`; a new one after a step to an offset that is new in this boot."""
        segments = self._load_all()
        if self._number is None:
            boot, number = meta.get(self._db, _CURRENT_SEGMENT, "0 0").split()
            self._number = int(number) if int(boot) == self._boot else PRODUCER_TIME
        current = segments.get(self._number)
        if current is None or not current.fits(now):
            if current is not None:
                # Its exact end is unknown: the step may have come at any time since the last look.
                self._extend(current, now)
            current = next((segment for segment in segments.values() if segment.fits(now)), None) or self._create(now)
            meta.put(self._db, _CURRENT_SEGMENT, f"{self._boot} {current.number}")
            self._number = current.number
            return self._extend(current, now)
        changed = current.quality != QUALITIES.index(now.quality)
        return self._extend(current, now) if changed or now.boot_us - current.last_us >= _SAVE_INTERVAL_US else current

    def find_covering(self, now: ClockReading, first_t: int, last_t: int) -> ClockSegment | None:
        """Return the segment whose clock gave the times from `first_t` to `last_t`, received at `now`, or None."""
        current = self.observe(now)
        # Its end is now, whenever it was last written.
        if replace(current, last_us=max(current.last_us, now.boot_us)).covers(first_t, last_t):
            return current
        return next((s for s in reversed(self._load_all().values()) if s.covers(first_t, last_t)), None)

    def unannounced(self) -> list[ClockSegment]:
        """Return segments, of earlier boots too, without an anchor in the log."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM checked_clock_segments WHERE NOT announced ORDER BY boot, segment"
        )
        return [ClockSegment(*row) for row in rows]

    def mark_announced(self, segment: ClockSegment, *, current: bool) -> None:
        """Record that the log has an anchor of a segment; `current`: it is the last anchor."""
        key = (segment.boot, segment.number)
        self._db.execute("UPDATE clock_segments SET announced = 1 WHERE boot = ? AND segment = ?", key)
        meta.put(self._db, UNANNOUNCED, "yes" if self.unannounced() else "")
        if current:
            meta.put(self._db, _LAST_ANNOUNCED, f"{segment.boot} {segment.number}")

    def reset_announcements(self) -> None:
        """Forget all anchors: a new log has none."""
        self._db.execute("UPDATE clock_segments SET announced = 0")
        meta.delete(self._db, _LAST_ANNOUNCED)

    def last_announced_key(self) -> tuple[int, int]:
        """Return (boot, segment) of the last anchor in the log, which messages without `clocks` refer to."""
        boot, number = meta.get(self._db, _LAST_ANNOUNCED, "0 0").split()
        return int(boot), int(number)

    def last_announced(self) -> ClockSegment | None:
        """Return the segment of the last anchor in the log; None if that was in another boot."""
        boot, number = self.last_announced_key()
        return self._load_all().get(number) if boot == self._boot else None

    def bind_to_log(self, log: str) -> None:
        """Have all segments announced again if the anchors are in another log."""
        if meta.get(self._db, ANCHORED_LOG, "") != log:
            self._db.execute("UPDATE clock_segments SET announced = 0")
            meta.put(self._db, UNANNOUNCED, "yes")
            meta.put(self._db, _LAST_ANNOUNCED, "0 0")
            meta.put(self._db, ANCHORED_LOG, log)

    def previous_boot_end(self) -> tuple[int, int] | None:
        """Return (boot, last known boot time µs) of the boot before this one."""
        rows = [self._db.execute(sql, (self._boot,)).fetchone() for sql in (_LAST_CHUNK, _LAST_SEEN)]
        return max(((int(boot), int(end)) for boot, end in filter(None, rows)), default=None)

    def prune(self) -> None:
        """Delete announced segments of earlier boots that no stored row belongs to."""
        oldest = "SELECT coalesce(min(boot), :boot) FROM chunks"
        sql = f"DELETE FROM clock_segments WHERE announced AND boot < :boot - 1 AND boot < ({oldest})"
        self._db.execute(sql, {"boot": self._boot})

    def _create(self, now: ClockReading) -> ClockSegment:
        number = max(self._load_all(), default=PRODUCER_TIME) + 1
        quality = QUALITIES.index(now.quality)
        made = ClockSegment(self._boot, number, now.offset_us, now.boot_us, now.boot_us, quality, now.error_us)
        self._db.execute(
            _INSERT, (made.boot, number, made.offset_us, made.first_us, made.last_us, made.quality, made.error_us)
        )
        meta.put(self._db, UNANNOUNCED, "yes")
        return made

    def _extend(self, segment: ClockSegment, now: ClockReading) -> ClockSegment:
        """Extend a segment to `now`; quality and error are updated while the clock is still in it."""
        grown = replace(segment, last_us=max(segment.last_us, now.boot_us), first_us=min(segment.first_us, now.boot_us))
        if segment.fits(now):
            grown = replace(grown, quality=QUALITIES.index(now.quality), error_us=now.error_us)
        self._db.execute(
            schema.EXTEND_SEGMENT,
            (grown.first_us, grown.last_us, grown.quality, grown.error_us, grown.boot, grown.number),
        )
        self._load_all()[grown.number] = grown
        return grown

    def _load_all(self) -> dict[int, ClockSegment]:
        if self._cache is None:
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM checked_clock_segments WHERE boot = ? ORDER BY segment", (self._boot,)
            )
            segments = (ClockSegment(*row) for row in rows)
            self._cache = {segment.number: segment for segment in segments}
        return self._cache


def merge_stamps(stamps: Iterable[ClockStamp]) -> tuple[ClockStamp, ...]:
    """Drop stamps that repeat the one before; `stamps` ascend by `first`."""
    merged: list[ClockStamp] = []
    for stamp in stamps:
        if not merged or replace(stamp, first=merged[-1].first) != merged[-1]:
            merged.append(stamp)
    return tuple(merged)


def clip_stamps(stamps: Iterable[ClockStamp], first: int, last: int) -> tuple[ClockStamp, ...]:
    """Return the stamps of rows `first` to `last`."""
    inside: list[ClockStamp] = []
    for stamp in stamps:
        if stamp.first > last:
            break
        if stamp.first <= first:
            inside = [replace(stamp, first=first)]
        else:
            inside.append(stamp)
    return tuple(inside)
