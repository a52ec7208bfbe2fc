"""When each result really was: the tables that anchors fill, and the view that dates results by them.

A device whose clock was wrong cannot know it at the time. Its anchors say later what both of its clocks showed at one
moment; whatever order they come in, the view gives the same. It is all derived: nothing signed is rewritten.

`dated`, from best to worst, with the bound `t_error_us` on |t_best - true time|:
- `synced`: a time service vouched for the clock. t_best = t
- `anchored`: it vouched for the clock earlier or later in the same boot. t_best = that anchor's time, and the boot-time
  clock between
- `interval`: never in this boot, but before it and after it. Boots between two known times are laid end to end in the
  middle of what they leave free, so that order and spacing hold; the bound is half of that
- `given`: the producer gave the time, and not from this machine's clock. t_best = t, without a bound
- `unknown`: nothing vouches for it (yet). t_best = t, without a bound
Assumed: the boot-time clock keeps to 100 ppm; time services slew what is under 1 s and step what is more. Where anchors
of one boot contradict each other, all its bounds grow by as much. An anchor that lies ahead of the collector's clock at
its arrival is not believed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

from agent.clock import MAX_ERROR_US, parse_rfc3339
from agent.fleet.database.interface import Connection
from agent.wire.messages import AuditPayload, HealthPayload, ResultsPayload

CLOCK = "clock"
SLACK_US = 1_000_000
_MAX_AHEAD_US = 300_000_000
_QUALITIES = ("synced", "restored", "unsynced")
_MAX_JSON_INT = 2**53
_MAX_SUM_US = 4 * 10**18
_PPM = "CAST(1e-4 AS DOUBLE PRECISION)"

TABLES = (
    # believed: 1 where a time service vouched for wall_us, and it is not ahead of the collector's clock.
    """CREATE TABLE anchors (
        device TEXT NOT NULL, log TEXT NOT NULL, seq INTEGER NOT NULL, boot INTEGER NOT NULL, segment INTEGER NOT NULL,
        boot_us INTEGER NOT NULL, wall_us INTEGER NOT NULL, quality TEXT NOT NULL, error_us INTEGER,
        step_us INTEGER NOT NULL, believed INTEGER NOT NULL, PRIMARY KEY (device, log, seq)) WITHOUT ROWID""",
    "CREATE INDEX anchors_believed ON anchors (device, log, boot, boot_us) WHERE believed",
    # offset_us: wall less boot time, of its first anchor, `seq`. vouched: 1 where one of its anchors is believed, 0
    # where a time service vouched and is not believed, NULL where none did.
    """CREATE TABLE segments (
        device TEXT NOT NULL, log TEXT NOT NULL, boot INTEGER NOT NULL, segment INTEGER NOT NULL, seq INTEGER NOT NULL,
        offset_us INTEGER NOT NULL, vouched INTEGER, PRIMARY KEY (device, log, boot, segment)) WITHOUT ROWID""",
    # last_us: the latest boot time known of it. disagree_us: by how much its believed anchors contradict each other.
    # start_us, start_error_us: where its boot time 0 lies, for a boot without a believed anchor between two with one.
    """CREATE TABLE boots (
        device TEXT NOT NULL, log TEXT NOT NULL, boot INTEGER NOT NULL, last_us INTEGER NOT NULL,
        believed INTEGER NOT NULL DEFAULT 0, disagree_us INTEGER NOT NULL DEFAULT 0, start_us INTEGER,
        start_error_us INTEGER, PRIMARY KEY (device, log, boot)) WITHOUT ROWID""",
    "CREATE INDEX boots_believed ON boots (device, log, boot) WHERE believed",
    # Of results from row `first` of a message on. segment: 0 the producer's own time; where `implied`, that of the last
    # anchor before the message, NULL before it came. quality: 0 synced, 1 restored, 2 unsynced.
    """CREATE TABLE stamps (
        device TEXT NOT NULL, log TEXT NOT NULL, seq INTEGER NOT NULL, first INTEGER NOT NULL, boot INTEGER NOT NULL,
        segment INTEGER, quality INTEGER NOT NULL, implied INTEGER NOT NULL,
        PRIMARY KEY (device, log, seq, first)) WITHOUT ROWID""",
)

# One flat join, each look-up by an index and once a row: nested, SQLite would do it again for each use of a column.
RESULTS_DATED_VIEW = f"""
CREATE VIEW results_dated AS
SELECT device, task, row, t, label, score, value, log, seq, boot, boot_us,
    CASE dated WHEN 'anchored' THEN anchored_us WHEN 'interval' THEN boot_us + start_us ELSE t END AS t_best,
    CAST(CASE dated
        WHEN 'synced' THEN coalesce(anchor_error + GREATEST(abs(anchored_us - t), disagree_us), {MAX_ERROR_US})
            + {SLACK_US}
        WHEN 'anchored' THEN anchor_error + disagree_us + {SLACK_US}
        WHEN 'interval' THEN start_error_us + {_PPM} * boot_us + {SLACK_US}
        END AS BIGINT) AS t_error_us,
    dated
FROM (
    SELECT *, boot_us + CASE WHEN before_error <= coalesce(after_error, before_error) THEN before_offset
                        ELSE after_offset END AS anchored_us,
           LEAST(coalesce(before_error, after_error), coalesce(after_error, before_error)) AS anchor_error,
           CASE WHEN segment = 0 THEN 'given'
                WHEN quality = 0 AND coalesce(vouched, 1) = 1 THEN 'synced'
                WHEN before_error IS NOT NULL OR after_error IS NOT NULL THEN 'anchored'
                WHEN boot_us IS NOT NULL AND start_us IS NOT NULL THEN 'interval'
                ELSE 'unknown' END AS dated
    FROM (
        SELECT r.*, s.boot, s.segment, s.quality, r.t - g.offset_us AS boot_us, g.vouched,
               b.wall_us - b.boot_us AS before_offset, a.wall_us - a.boot_us AS after_offset,
               b.error_us + {_PPM} * (r.t - g.offset_us - b.boot_us) AS before_error,
               a.error_us + {_PPM} * (a.boot_us - r.t + g.offset_us) AS after_error,
               o.disagree_us, o.start_us, o.start_error_us
        FROM results r
        LEFT JOIN stamps s ON s.device = r.device AND s.log = r.log AND s.seq = r.seq AND s.first = (
            SELECT max(first) FROM stamps x
            WHERE x.device = r.device AND x.log = r.log AND x.seq = r.seq AND x.first <= r.row)
        LEFT JOIN segments g ON g.device = r.device AND g.log = r.log AND g.boot = s.boot AND g.segment = s.segment
        LEFT JOIN boots o ON o.device = r.device AND o.log = r.log AND o.boot = s.boot
        LEFT JOIN anchors b ON b.device = r.device AND b.log = r.log AND b.seq = (
            SELECT seq FROM anchors x WHERE x.believed AND x.device = r.device AND x.log = r.log AND x.boot = s.boot
            AND x.boot_us <= r.t - g.offset_us ORDER BY x.boot_us DESC LIMIT 1)
        LEFT JOIN anchors a ON a.device = r.device AND a.log = r.log AND a.seq = (
            SELECT seq FROM anchors x WHERE x.believed AND x.device = r.device AND x.log = r.log AND x.boot = s.boot
            AND x.boot_us >= r.t - g.offset_us ORDER BY x.boot_us LIMIT 1)
    ) looked_up
) placed
"""

_EXTEND_BOOT = """
    INSERT INTO boots (device, log, boot, last_us) VALUES (?, ?, ?, ?)
    ON CONFLICT (device, log, boot) DO UPDATE SET last_us = excluded.last_us WHERE excluded.last_us > boots.last_us
    RETURNING boot
"""
_HAS_ANCHORS = "SELECT 1 FROM anchors WHERE device = ? AND log = ? LIMIT 1"
_ADD_SEGMENT = """
    INSERT INTO segments VALUES (:device, :log, :boot, :segment, :seq, :offset, :vouched)
    ON CONFLICT (device, log, boot, segment) DO UPDATE SET
        offset_us = CASE WHEN excluded.seq < segments.seq THEN excluded.offset_us ELSE segments.offset_us END,
        seq = LEAST(segments.seq, excluded.seq),
        vouched = GREATEST(coalesce(segments.vouched, excluded.vouched), coalesce(excluded.vouched, segments.vouched))
"""
# What an anchor implies goes as far as the next one.
_IMPLY_SEGMENTS = """
    UPDATE stamps SET segment = (
        SELECT CASE WHEN a.boot = stamps.boot THEN a.segment END FROM anchors a
        WHERE a.device = stamps.device AND a.log = stamps.log AND a.seq < stamps.seq ORDER BY a.seq DESC LIMIT 1)
    WHERE implied AND device = :device AND log = :log AND seq BETWEEN :first AND coalesce(:last, (
        SELECT min(seq) FROM anchors WHERE device = :device AND log = :log AND seq > :first), :first + 1000000000)
"""

# Anchors of one boot agree where their offsets do, within their errors and the drift of the boot-time clock.
_UPDATE_BOOT_DISAGREEMENT = f"""
    UPDATE boots SET believed = TRUE, disagree_us = (
        SELECT CAST(GREATEST(0, max(wall_us - boot_us - error_us) - min(wall_us - boot_us + error_us)
                    - {_PPM} * (max(boot_us) - min(boot_us))) AS BIGINT)
        FROM anchors a
        WHERE believed AND a.device = boots.device AND a.log = boots.log AND a.boot = boots.boot)
    WHERE device = ? AND log = ? AND boot = ?
"""
_NEIGHBOUR_BOOTS = """
    SELECT (SELECT max(boot) FROM boots WHERE believed AND device = :device AND log = :log AND boot < :boot),
           (SELECT min(boot) FROM boots WHERE believed AND device = :device AND log = :log AND boot > :boot),
           (SELECT believed FROM boots WHERE device = :device AND log = :log AND boot = :boot),
           (SELECT max(boot) FROM boots WHERE device = :device AND log = :log)
"""
# TOTAL, and no more than a number holds: what a device claims must not stop the transaction of others.
# Known time before the boots between: the end of boot :low. After them: boot time 0 of boot :high.
_INTERPOLATE_BOOTS = f"""
    WITH low AS (
        SELECT a.wall_us + o.last_us - a.boot_us AS at, a.error_us + {_PPM} * abs(o.last_us - a.boot_us) + o.disagree_us
               AS error
        FROM boots o JOIN anchors a ON a.believed AND a.device = o.device AND a.log = o.log AND a.boot = o.boot
        WHERE o.device = :device AND o.log = :log AND o.boot = :low ORDER BY a.boot_us DESC LIMIT 1
    ), high AS (
        SELECT a.wall_us - a.boot_us AS at, a.error_us + {_PPM} * a.boot_us + o.disagree_us AS error
        FROM boots o JOIN anchors a ON a.believed AND a.device = o.device AND a.log = o.log AND a.boot = o.boot
        WHERE o.device = :device AND o.log = :log AND o.boot = :high ORDER BY a.boot_us LIMIT 1
    ), between_them AS (
        SELECT boot, CAST(LEAST(TOTAL(last_us) OVER (ORDER BY boot), {_MAX_SUM_US}) AS BIGINT) - last_us AS earlier,
               CAST(LEAST(TOTAL(last_us) OVER (), {_MAX_SUM_US}) AS BIGINT) AS total
        FROM boots WHERE device = :device AND log = :log AND boot > :low AND boot < :high
    ), placed AS (
        SELECT boot, low.at + earlier + (high.at - low.at - total) / 2 AS start_us,
               CAST(abs(high.at - low.at - total) / 2 + low.error + high.error + {_PPM} * total AS BIGINT) AS error
        FROM between_them, low, high
    )
    UPDATE boots SET start_us = placed.start_us, start_error_us = placed.error FROM placed
    WHERE boots.device = :device AND boots.log = :log AND boots.boot = placed.boot
"""


class TimestampReconstruction:
    """What the messages of one transaction say about clocks, gathered and written together at its end."""

    def __init__(self, db: Connection, received: str) -> None:
        self._db, self._latest_us = db, parse_rfc3339(received) + _MAX_AHEAD_US
        self._anchors: list[tuple[Any, ...]] = []
        self._stamps: list[tuple[Any, ...]] = []
        self._boot_extents: list[tuple[str, str, int, int]] = []

    def add(self, body: object) -> None:
        """Take note of a message that was not there before. What is malformed dates nothing."""
        if isinstance(body, ResultsPayload):
            self._stamps.extend(_stamp_rows(body))
        elif isinstance(body, HealthPayload) and _is_time(last_us := body.wall_clock.get("boot_us")):
            self._boot_extents.append((body.device, body.log, body.boot, last_us))
        elif isinstance(body, AuditPayload) and body.event == CLOCK:
            self._add_anchor(body)

    def finish(self) -> None:
        for table, rows in (("stamps", self._stamps), ("anchors", self._anchors)):
            if rows:
                self._db.bulk_insert(table, rows)
        self._db.executemany(self._db.to_dialect(_ADD_SEGMENT), [_segment_row(anchor) for anchor in self._anchors])
        self._db.executemany(_IMPLY_SEGMENTS, [*self._implied_stamp_updates()])
        extended = zip(self._boot_extents, self._db.execute_each(_EXTEND_BOOT, self._boot_extents), strict=True)
        grown = [extent for extent, row in extended if row is not None]
        believed = {(row[0], row[1], row[3]) for row in self._anchors if row[-1]}
        self._db.executemany(self._db.to_dialect(_UPDATE_BOOT_DISAGREEMENT), sorted(believed))
        for device, log, low, high in self._spans_to_interpolate(sorted({row[:3] for row in grown} | believed)):
            names = {"device": device, "log": log, "low": low, "high": high}
            self._db.execute(self._db.to_dialect(_INTERPOLATE_BOOTS), names)

    def _implied_stamp_updates(self) -> Iterator[dict[str, Any]]:
        logs = sorted({stamp[:2] for stamp in self._stamps if stamp[-1]})
        told = self._db.execute_each(_HAS_ANCHORS, logs)
        anchored = {log for log, row in zip(logs, told, strict=True) if row is not None}
        for device, log, seq, *_, implied in self._stamps:
            if implied and (device, log) in anchored:
                yield {"device": device, "log": log, "first": seq, "last": seq}
        for device, log, seq, *_ in self._anchors:
            yield {"device": device, "log": log, "first": seq, "last": None}

    def _spans_to_interpolate(self, changed: Sequence[tuple[str, str, int]]) -> set[tuple[str, str, int, int]]:
        """The stretches of boots between two believed ones that have to be laid out anew."""
        found = set()
        keys = [{"device": device, "log": log, "boot": boot} for device, log, boot in changed]
        for (device, log, boot), row in zip(changed, self._db.execute_each(_NEIGHBOUR_BOOTS, keys), strict=True):
            low, high, is_believed, newest = row
            if boot == newest and not is_believed:
                continue
            ends = [low, boot, high] if is_believed else [low, high]
            found |= {(device, log, a, b) for a, b in pairwise(ends) if a is not None and b is not None and b > a + 1}
        return found

    def _add_anchor(self, body: AuditPayload) -> None:
        evidence = body.evidence
        boot, segment, boot_us, wall_us = (evidence.get(name) for name in ("boot", "segment", "boot_us", "wall_us"))
        quality, error_us, step_us = (evidence.get(name) for name in ("quality", "error_us", "step_us"))
        before = evidence.get("before")
        if not (_is_time(boot) and _is_time(segment) and _is_time(boot_us) and _is_time(wall_us, -_MAX_JSON_INT)):
            return
        if quality not in _QUALITIES or not (error_us is None or _is_time(error_us)):
            return
        believed = quality == "synced" and wall_us <= self._latest_us
        if believed and error_us is None:
            error_us = MAX_ERROR_US
        step = step_us if _is_time(step_us, -_MAX_JSON_INT) else 0
        key = (body.device, body.log)
        self._anchors.append((*key, body.seq, boot, segment, boot_us, wall_us, quality, error_us, step, believed))
        self._boot_extents.append((*key, boot, boot_us))
        if isinstance(before, dict) and _is_time(before.get("boot")) and _is_time(before.get("boot_us")):
            self._boot_extents.append((*key, before["boot"], before["boot_us"]))


def _stamp_rows(body: ResultsPayload) -> Iterator[tuple[Any, ...]]:
    if not len(body.columns):
        return
    key = (body.device, body.log, body.seq)
    if body.clocks is None:
        yield (*key, body.rows[0], body.boot, None, 0, True)
    else:
        yield from ((*key, *clock, False) for clock in body.clocks)


def _segment_row(anchor: tuple[Any, ...]) -> dict[str, Any]:
    device, log, seq, boot, segment, boot_us, wall_us, quality, _, _, believed = anchor
    vouched = int(believed) if quality == "synced" else None
    names = {"device": device, "log": log, "boot": boot, "segment": segment, "seq": seq}
    return {**names, "offset": wall_us - boot_us, "vouched": vouched}


def _is_time(value: object, minimum: int = 0) -> TypeGuard[int]:
    return type(value) is int and minimum <= value <= _MAX_JSON_INT
