"""Timestamp reconstruction: clock anchors of devices, from which view `results_dated` estimates when results were made.

A device with a wrong clock cannot know it at the time. An anchor states later what both of its clocks showed at one
moment. The view does not depend on the order of arrival, and nothing signed is rewritten.

Assumptions: the boot-time clock is accurate to 100 ppm; time services slew offsets under 1 s and step larger ones. If
anchors of one boot contradict each other, all its bounds grow by the contradiction. An anchor ahead of the collector's
clock at its arrival is not trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

from outstation.fleet.database.interface import Connection
from outstation.fleet.database.schema.results_dated import PPM
from outstation.foundation.clock import MAX_ERROR_US, parse_rfc3339
from outstation.protocol.wire.messages import AuditPayload, HealthPayload, ResultsPayload

CLOCK_EVENT = "clock"
_MAX_AHEAD_US = 300_000_000
_QUALITIES = ("synced", "restored", "unsynced")
_MAX_JSON_INT = 2**53
_MAX_SUM_US = 4 * 10**18

_EXTEND_BOOT = """
    INSERT INTO boots (device, log, boot, last_us) VALUES (?, ?, ?, ?)
    ON CONFLICT (device, log, boot) DO UPDATE SET last_us = excluded.last_us WHERE excluded.last_us > boots.last_us
    RETURNING boot
"""
_HAS_ANCHORS = "SELECT 1 FROM anchors WHERE device = ? AND log = ? LIMIT 1"
_ADD_SEGMENT = """
    INSERT INTO segments VALUES (:device, :log, :boot, :segment, :seq, :offset, :synced)
    ON CONFLICT (device, log, boot, segment) DO UPDATE SET
        offset_us = CASE WHEN excluded.seq < segments.seq THEN excluded.offset_us ELSE segments.offset_us END,
        seq = LEAST(segments.seq, excluded.seq),
        synced = GREATEST(coalesce(segments.synced, excluded.synced), coalesce(excluded.synced, segments.synced))
"""
# An anchor implies the segment of messages up to the next anchor.
_IMPLY_SEGMENTS = """
    UPDATE stamps SET segment = (
        SELECT CASE WHEN a.boot = stamps.boot THEN a.segment END FROM anchors a
        WHERE a.device = stamps.device AND a.log = stamps.log AND a.seq < stamps.seq ORDER BY a.seq DESC LIMIT 1)
    WHERE implied AND device = :device AND log = :log AND seq BETWEEN :first AND coalesce(:last, (
        SELECT min(seq) FROM anchors WHERE device = :device AND log = :log AND seq > :first), :first + 1000000000)
"""

# Anchors of one boot agree if their offsets do, within their errors and the drift of the boot-time clock.
_UPDATE_BOOT_DISAGREEMENT = f"""
    UPDATE boots SET trusted = TRUE, disagreement_us = (
        SELECT CAST(GREATEST(0, max(wall_us - boot_us - error_us) - min(wall_us - boot_us + error_us)
                    - {PPM} * (max(boot_us) - min(boot_us))) AS BIGINT)
        FROM anchors a
        WHERE trusted AND a.device = boots.device AND a.log = boots.log AND a.boot = boots.boot)
    WHERE device = ? AND log = ? AND boot = ?
"""
_NEIGHBOUR_BOOTS = """
    SELECT (SELECT max(boot) FROM boots WHERE trusted AND device = :device AND log = :log AND boot < :boot),
           (SELECT min(boot) FROM boots WHERE trusted AND device = :device AND log = :log AND boot > :boot),
           (SELECT trusted FROM boots WHERE device = :device AND log = :log AND boot = :boot),
           (SELECT max(boot) FROM boots WHERE device = :device AND log = :log)
"""
# TOTAL, capped: no claim of a device may overflow and stop the transaction of others.
# Known time before the boots between: the end of boot :low. After them: boot time 0 of boot :high.
_INTERPOLATE_BOOTS = f"""
    WITH low AS (
        SELECT a.wall_us + o.last_us - a.boot_us AS at,
               a.error_us + {PPM} * abs(o.last_us - a.boot_us) + o.disagreement_us AS error
        FROM boots o JOIN anchors a ON a.trusted AND a.device = o.device AND a.log = o.log AND a.boot = o.boot
        WHERE o.device = :device AND o.log = :log AND o.boot = :low ORDER BY a.boot_us DESC LIMIT 1
    ), high AS (
        SELECT a.wall_us - a.boot_us AS at, a.error_us + {PPM} * a.boot_us + o.disagreement_us AS error
        FROM boots o JOIN anchors a ON a.trusted AND a.device = o.device AND a.log = o.log AND a.boot = o.boot
        WHERE o.device = :device AND o.log = :log AND o.boot = :high ORDER BY a.boot_us LIMIT 1
    ), between_them AS (
        SELECT boot, CAST(LEAST(TOTAL(last_us) OVER (ORDER BY boot), {_MAX_SUM_US}) AS BIGINT) - last_us AS earlier,
               CAST(LEAST(TOTAL(last_us) OVER (), {_MAX_SUM_US}) AS BIGINT) AS total
        FROM boots WHERE device = :device AND log = :log AND boot > :low AND boot < :high
    ), placed AS (
        SELECT boot, low.at + earlier + (high.at - low.at - total) / 2 AS start_us,
               CAST(abs(high.at - low.at - total) / 2 + low.error + high.error + {PPM} * total AS BIGINT) AS error
        FROM between_them, low, high
    )
    UPDATE boots SET start_us = placed.start_us, start_error_us = placed.error FROM placed
    WHERE boots.device = :device AND boots.log = :log AND boots.boot = placed.boot
"""


class TimestampReconstruction:
    """Clock anchors and clocks of results in one transaction: `add` each new message, then `finish`."""

    def __init__(self, db: Connection) -> None:
        self._db = db
        self._anchors: list[tuple[Any, ...]] = []
        self._stamps: list[tuple[Any, ...]] = []
        self._boot_extents: list[tuple[str, str, int, int]] = []

    def add(self, body: object, received: str) -> None:
        """Record a message that is new to its log, by when it arrived; malformed evidence is ignored."""
        if isinstance(body, ResultsPayload):
            key = (body.device, body.log, body.seq)
            if not body.columns.row:
                return
            if body.clocks is not None:
                self._stamps.extend((*key, *clock, False) for clock in body.clocks)
            else:
                self._stamps.append((*key, body.rows[0], body.boot, None, 0, True))
        elif isinstance(body, HealthPayload) and _is_time(last_us := body.wall_clock.get("boot_us")):
            self._boot_extents.append((body.device, body.log, body.boot, last_us))
        elif isinstance(body, AuditPayload) and body.event == CLOCK_EVENT:
            self._add_anchor(body, received)

    def finish(self) -> None:
        for table, rows in (("stamps", self._stamps), ("anchors", self._anchors)):
            if rows:
                self._db.bulk_insert(table, rows)
        segments = []
        for device, log, seq, boot, segment, boot_us, wall_us, quality, *_, is_trusted in self._anchors:
            key = {"device": device, "log": log, "boot": boot, "segment": segment, "seq": seq}
            synced = int(is_trusted) if quality == "synced" else None
            segments.append({**key, "offset": wall_us - boot_us, "synced": synced})
        self._db.executemany(self._db.to_dialect(_ADD_SEGMENT), segments)
        self._db.executemany(_IMPLY_SEGMENTS, [*self._implied_stamp_updates()])
        extended = zip(self._boot_extents, self._db.execute_each(_EXTEND_BOOT, self._boot_extents), strict=True)
        grown = [extent for extent, row in extended if row is not None]
        trusted = {(device, log, boot) for device, log, _, boot, *_, is_trusted in self._anchors if is_trusted}
        self._db.executemany(self._db.to_dialect(_UPDATE_BOOT_DISAGREEMENT), sorted(trusted))
        for device, log, low, high in self._spans_to_interpolate(sorted({row[:3] for row in grown} | trusted)):
            names = {"device": device, "log": log, "low": low, "high": high}
            self._db.execute(self._db.to_dialect(_INTERPOLATE_BOOTS), names)

    def _implied_stamp_updates(self) -> Iterator[dict[str, Any]]:
        logs = sorted({stamp[:2] for stamp in self._stamps if stamp[-1]})
        rows = self._db.execute_each(_HAS_ANCHORS, logs)
        anchored = {log for log, row in zip(logs, rows, strict=True) if row is not None}
        for device, log, seq, *_, implied in self._stamps:
            if implied and (device, log) in anchored:
                yield {"device": device, "log": log, "first": seq, "last": seq}
        for device, log, seq, *_ in self._anchors:
            yield {"device": device, "log": log, "first": seq, "last": None}

    def _spans_to_interpolate(self, changed: Sequence[tuple[str, str, int]]) -> set[tuple[str, str, int, int]]:
        """Return (device, log, low, high) where the boots between two trusted ones must be placed again."""
        spans = set()
        keys = [{"device": device, "log": log, "boot": boot} for device, log, boot in changed]
        for (device, log, boot), row in zip(changed, self._db.execute_each(_NEIGHBOUR_BOOTS, keys), strict=True):
            low, high, is_trusted, newest = row
            if boot == newest and not is_trusted:
                continue
            ends = [low, boot, high] if is_trusted else [low, high]
            spans |= {(device, log, a, b) for a, b in pairwise(ends) if a is not None and b is not None and b > a + 1}
        return spans

    def _add_anchor(self, body: AuditPayload, received: str) -> None:
        evidence = body.evidence
        boot, segment, boot_us, wall_us = (evidence.get(name) for name in ("boot", "segment", "boot_us", "wall_us"))
        quality, error_us, step_us = (evidence.get(name) for name in ("quality", "error_us", "step_us"))
        before = evidence.get("before")
        if not (_is_time(boot) and _is_time(segment) and _is_time(boot_us) and _is_time(wall_us, -_MAX_JSON_INT)):
            return
        if quality not in _QUALITIES or not (error_us is None or _is_time(error_us)):
            return
        trusted = quality == "synced" and wall_us <= parse_rfc3339(received) + _MAX_AHEAD_US
        if trusted and error_us is None:
            error_us = MAX_ERROR_US
        step = step_us if _is_time(step_us, -_MAX_JSON_INT) else 0
        key = (body.device, body.log)
        self._anchors.append((*key, body.seq, boot, segment, boot_us, wall_us, quality, error_us, step, trusted))
        self._boot_extents.append((*key, boot, boot_us))
        if isinstance(before, dict) and _is_time(before.get("boot")) and _is_time(before.get("boot_us")):
            self._boot_extents.append((*key, before["boot"], before["boot_us"]))


def _is_time(value: object, minimum: int = 0) -> TypeGuard[int]:
    return type(value) is int and minimum <= value <= _MAX_JSON_INT
