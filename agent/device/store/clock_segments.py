"""Segments of the wall clock: in one, wall time less boot time is constant, so that a row's time gives its boot time.

A segment is known by its offset. A step to an offset that this boot had before goes back to that segment, so a clock
that two services pull to and fro makes two of them, not thousands. Rows whose producer gave the time belong to a
segment only where that time was plainly read from this machine's clock; else to none (GIVEN).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from agent.clock import ClockQuality, ClockReading
from agent.device.store import meta

# Time services step for 0.4 s (timesyncd) or 1 s (chrony) and slew what is less; both clocks slew together.
STEP_US = 500_000
PRODUCER_TIME = 0
# In `meta`: the log that the anchors are in.
ANCHORED_LOG = "clock log"
# In `meta`: "" once the log has an anchor of every segment.
UNANNOUNCED = "clock unannounced"
QUALITIES: tuple[ClockQuality, ...] = ("synced", "restored", "unsynced")
_TOLERANCE_US = 5_000_000
# So often at most is a segment's end written down; a step and an anchor write it at once.
_SAVE_INTERVAL_US = 60_000_000
_COLUMNS = "boot, segment, offset_us, first_us, last_us, quality, error_us"
_INSERT = "INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, 0)"
_LAST_CHUNK = "SELECT boot, boot_us FROM chunks WHERE boot < ? ORDER BY id DESC LIMIT 1"
_LAST_SEEN = "SELECT boot, max(last_us) FROM segments WHERE boot < ? GROUP BY boot ORDER BY boot DESC LIMIT 1"


class ClockStamp(msgspec.Struct, frozen=True):
    """Rows from `first` on have their times from `segment` of `boot` (GIVEN: from their producer)."""

    first: int
    boot: int
    segment: int
    quality: int


class ClockSegment(msgspec.Struct, frozen=True):
    """`offset_us` is wall less boot time; in force, as far as was seen, from boot time `first_us` to `last_us`."""

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
        """Whether times from `first_t` to `last_t` can have been read from the clock while it was in force."""
        begin, end = self.first_us + self.offset_us - _TOLERANCE_US, self.last_us + self.offset_us + _TOLERANCE_US
        return begin <= first_t and last_t <= end


class ClockSegments:
    """Those of one boot, inside the caller's transaction."""

    def __init__(self, db: sqlite3.Connection, boot: int) -> None:
        self._db, self._boot = db, boot
        self._cache: dict[int, ClockSegment] | None = None
        self._number: int | None = None

    def observe(self, now: ClockReading) -> ClockSegment:
        """The segment at `now`; a new one where the clock was stepped to an offset that this boot had not yet."""
        known = self._load_all()
        current = known.get(self._current_number())
        if current is None or not current.fits(now):
            if current is not None:
                # Until when exactly nobody saw.
                self._extend(current, now)
            current = next((one for one in known.values() if one.fits(now)), None) or self._create(now)
            self._put_meta("clock segment", f"{self._boot} {current.number}")
            self._number = current.number
            return self._extend(current, now)
        changed = current.quality != QUALITIES.index(now.quality)
        return self._extend(current, now) if changed or now.boot_us - current.last_us >= _SAVE_INTERVAL_US else current

    def find_covering(self, now: ClockReading, first_t: int, last_t: int) -> ClockSegment | None:
        """The segment whose clock gave the times from `first_t` to `last_t`, handed over at `now`; None where none."""
        current = self.observe(now)
        # Its end is now, whenever that was last written down.
        if replace(current, last_us=max(current.last_us, now.boot_us)).covers(first_t, last_t):
            return current
        return next((one for one in reversed(self._load_all().values()) if one.covers(first_t, last_t)), None)

    def unannounced(self) -> list[ClockSegment]:
        """Segments, of earlier boots too, that no anchor in the log tells of yet."""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM segments WHERE NOT announced ORDER BY boot, segment")
        return [ClockSegment(*row) for row in rows]

    def mark_announced(self, segment: ClockSegment, *, current: bool) -> None:
        """The log has an anchor of it now; `current`: and that is the last one."""
        key = (segment.boot, segment.number)
        self._db.execute("UPDATE segments SET announced = 1 WHERE boot = ? AND segment = ?", key)
        self._put_meta(UNANNOUNCED, "yes" if self.unannounced() else "")
        if current:
            self._put_meta("clock announced", f"{segment.boot} {segment.number}")

    def reset_announcements(self) -> None:
        """In a new log there is no anchor of any of them."""
        self._db.execute("UPDATE segments SET announced = 0")
        meta.drop(self._db, "clock announced")

    def last_announced_key(self) -> tuple[int, int]:
        """(boot, segment) of the last anchor in the log: what a message without `clocks` speaks of."""
        boot, number = self._get_meta("clock announced", "0 0").split()
        return int(boot), int(number)

    def last_announced(self) -> ClockSegment | None:
        """The segment of the last anchor in the log; None where that was in another boot."""
        boot, number = self.last_announced_key()
        return self._load_all().get(number) if boot == self._boot else None

    def bind_to_log(self, log: str) -> None:
        """Have all of them announced again where the last anchor is in another log than `log`."""
        if self._get_meta(ANCHORED_LOG, "") != log:
            self._db.execute("UPDATE segments SET announced = 0")
            self._put_meta(UNANNOUNCED, "yes")
            self._put_meta("clock announced", "0 0")
            self._put_meta(ANCHORED_LOG, log)

    def previous_boot_end(self) -> tuple[int, int] | None:
        """(boot, boot time µs) of the last that is known of the boot before this one."""
        found = [self._db.execute(sql, (self._boot,)).fetchone() for sql in (_LAST_CHUNK, _LAST_SEEN)]
        return max(((int(row[0]), int(row[1])) for row in found if row is not None), default=None)

    def prune(self) -> None:
        """Drop segments of earlier boots that no row needs any more."""
        kept = "SELECT coalesce(min(boot), :boot) FROM chunks"
        self._db.execute(
            f"DELETE FROM segments WHERE announced AND boot < :boot - 1 AND boot < ({kept})", {"boot": self._boot}
        )

    def _create(self, now: ClockReading) -> ClockSegment:
        number = max(self._load_all(), default=PRODUCER_TIME) + 1
        quality = QUALITIES.index(now.quality)
        made = ClockSegment(self._boot, number, now.offset_us, now.boot_us, now.boot_us, quality, now.error_us)
        self._db.execute(
            _INSERT, (made.boot, number, made.offset_us, made.first_us, made.last_us, made.quality, made.error_us)
        )
        self._put_meta(UNANNOUNCED, "yes")
        return made

    def _extend(self, segment: ClockSegment, now: ClockReading) -> ClockSegment:
        """To `now`; quality and error too, where the clock is still in it."""
        grown = replace(segment, last_us=max(segment.last_us, now.boot_us), first_us=min(segment.first_us, now.boot_us))
        if segment.fits(now):
            grown = replace(grown, quality=QUALITIES.index(now.quality), error_us=now.error_us)
        self._db.execute(
            "UPDATE segments SET first_us = ?, last_us = ?, quality = ?, error_us = ? WHERE boot = ? AND segment = ?",
            (grown.first_us, grown.last_us, grown.quality, grown.error_us, grown.boot, grown.number),
        )
        self._load_all()[grown.number] = grown
        return grown

    def _load_all(self) -> dict[int, ClockSegment]:
        if self._cache is None:
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM segments WHERE boot = ? ORDER BY segment", (self._boot,))
            self._cache = {row[1]: ClockSegment(*row) for row in rows}
        return self._cache

    def _current_number(self) -> int:
        if self._number is None:
            boot, number = self._get_meta("clock segment", "0 0").split()
            self._number = int(number) if int(boot) == self._boot else PRODUCER_TIME
        return self._number

    def _get_meta(self, key: str, default: str) -> str:
        return meta.get(self._db, key, default)

    def _put_meta(self, key: str, value: str) -> None:
        meta.put(self._db, key, value)


def merge_stamps(stamps: Iterable[ClockStamp]) -> tuple[ClockStamp, ...]:
    """In order of `first`, without those that say what the one before says."""
    kept: list[ClockStamp] = []
    for stamp in stamps:
        if not kept or replace(stamp, first=kept[-1].first) != kept[-1]:
            kept.append(stamp)
    return tuple(kept)


def clip_stamps(stamps: Iterable[ClockStamp], first: int, last: int) -> tuple[ClockStamp, ...]:
    """Those of rows `first` to `last`."""
    inside: list[ClockStamp] = []
    for stamp in stamps:
        if stamp.first > last:
            break
        if stamp.first <= first:
            inside = [replace(stamp, first=first)]
        else:
            inside.append(stamp)
    return tuple(inside)
