"""A database that is behind its watermark goes on where it had got: no row number and no seq is ever given twice."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import uuid
from collections.abc import Collection
from typing import Any

import msgspec

from agent import clock
from agent.device.recovery import findings
from agent.device.recovery.findings import NEW_LOG, NewLogPlan, RecoveryFinding
from agent.device.store import meta, ranges, retention, watermark
from agent.device.store.watermark import WatermarkState
from agent.wire.messages import digest

log = logging.getLogger("outstation")


class _ResultsMessage(msgspec.Struct):
    """What a `results` message says of the rows it is about."""

    kind: str
    task: str
    rows: tuple[int, int]


# In table meta: the log before this one; the seq behind which nobody has confirmed that messages are ours; the last seq
# when the store was opened: what is above was written since, in no copy of the store.
PREVIOUS_LOG, UNPROVEN_FROM, OPENED_SEQ = "previous log", "unproven from", "opened at"


def catch_up(db: sqlite3.Connection, saved: WatermarkState | None) -> bool:
    """Compare with the watermark and go on from whichever is ahead; whether the watermark was.

    Inside the transaction that begins the opening. What is missing becomes a finding, to be said in the log.
    """
    findings.put(db, findings.LAST_STOP, "clean" if meta.get(db, findings.CLEAN_STOP, "") else "unclean")
    meta.drop(db, findings.CLEAN_STOP)
    here = watermark.from_database(db)
    changed = False
    if saved is not None and saved.log and saved != here:
        changed = _compare(db, here, saved)
    seq = str(watermark.from_database(db).seq)
    if not meta.get(db, UNPROVEN_FROM, ""):
        findings.put(db, UNPROVEN_FROM, seq)
    findings.put(db, OPENED_SEQ, seq)
    return changed


def _compare(db: sqlite3.Connection, current: WatermarkState, saved: WatermarkState) -> bool:
    if not current.log:
        adopt_watermark(db, saved)
        plan_new_log(db, saved.log, f"The store was deleted or lost; its log {saved.log} had {saved.seq} messages.")
        return True
    if current.log != saved.log:
        if meta.get(db, PREVIOUS_LOG, "") == saved.log:
            return False
        why = f"The store was replaced: log {saved.log} was written in this folder last, the database is of {current.log}."
    elif current.seq == saved.seq and current.digest != saved.digest:
        why = f"The store was replaced by another one that went on from the same beginning, to message {saved.seq} too."
    else:
        return _recover_rollback(db, current, saved)
    _advance_numbers(db, current, saved)
    # In the log that was written last nothing more will come either.
    plan_new_log(db, current.log, why)
    return True


def _recover_rollback(db: sqlite3.Connection, current: WatermarkState, saved: WatermarkState) -> bool:
    moved = adopt_watermark(db, saved)
    if not moved:
        return False
    kept = ranges.from_numbers(row[0] for row in db.execute("SELECT seq FROM outbox WHERE seq > ?", (current.seq,)))
    seqs = findings.missing_ranges(kept, current.seq + 1, saved.seq)
    what = (
        "The store went back in time: commits that were made are gone (a log that was cut, an old copy of the "
        "database, or a disk that says it has written what it has not)."
    )
    log.critical("%s", what)
    time = clock.to_rfc3339(clock.read().wall_us)
    findings.add(
        db, RecoveryFinding(summary=what, time=time, log=saved.log, seqs=seqs, rows=moved.rows, tasks=moved.cursors)
    )
    return True


class SkippedNumbers(msgspec.Struct, frozen=True):
    """Numbers that were skipped: rows by stream, rows judged by task, whether seqs."""

    rows: dict[str, list[tuple[int, int]]]
    cursors: dict[str, list[tuple[int, int]]]
    seqs: bool

    def __bool__(self) -> bool:
        return bool(self.rows or self.cursors or self.seqs)


def adopt_watermark(db: sqlite3.Connection, saved: WatermarkState) -> SkippedNumbers:
    """Take over every number that is ahead in the watermark; what was skipped."""
    here = watermark.from_database(db)
    rows, cursors = _advance_numbers(db, here, saved)
    seqs = saved.seq > here.seq or not here.log
    if seqs:
        for key, value in (("log", saved.log), ("seq", str(saved.seq)), ("digest", saved.digest)):
            findings.put(db, key, value)
    if not here.device and saved.device:
        findings.put(db, "device", saved.device)
    if rows or cursors or seqs or saved.boot > here.boot:
        # A boot of its own for what comes: the lost commits may have had the number of this one.
        findings.put(db, "boot", str(max(here.boot, saved.boot)))
        findings.put(db, "boot_id", "")
    return SkippedNumbers(rows, cursors, seqs)


_SkippedRanges = dict[str, list[tuple[int, int]]]


def _advance_numbers(
    db: sqlite3.Connection, current: WatermarkState, saved: WatermarkState
) -> tuple[_SkippedRanges, _SkippedRanges]:
    rows: _SkippedRanges = {}
    cursors: _SkippedRanges = {}
    for name, (_, crc, next_row) in saved.streams.items():
        first = current.streams.get(name, (0, 0, 1))[2]
        if name not in current.streams:
            values = (name, watermark.fields_placeholder(crc), next_row)
            db.execute("INSERT INTO streams (name, fields, next_row) VALUES (?, ?, ?)", values)
        elif next_row > first:
            db.execute("UPDATE streams SET next_row = ? WHERE name = ?", (next_row, name))
        if next_row > first:
            rows[name] = [(first, next_row - 1)]
    for task, row in saved.cursors.items():
        had = current.cursors.get(task, 0)
        if row > had:
            # Judged already: that nothing is judged twice is worth more than results that may have arrived.
            sql = "INSERT INTO cursors VALUES (?, ?, ?) ON CONFLICT (task) DO UPDATE SET row = excluded.row"
            db.execute(sql, (task, row, row))
            cursors[task] = [(had + 1, row)]
    for kid, counter in saved.commands.items():
        # A command that was obeyed must not be obeyed again when somebody repeats it.
        if counter > current.commands.get(kid, 0):
            db.execute("INSERT OR REPLACE INTO commands VALUES (?, ?)", (kid, counter))
    return rows, cursors


def raise_cursors(db: sqlite3.Connection) -> None:
    """Where a cursor is behind the results that are kept: what they tell of was judged."""
    used: dict[str, tuple[int, int]] = {}
    for (payload,) in db.execute("SELECT payload FROM outbox WHERE topic LIKE '%/results/%'"):
        with contextlib.suppress(msgspec.MsgspecError, ValueError, TypeError):
            told = msgspec.json.decode(payload, type=_ResultsMessage)
            if told.kind == "results":
                first, last = used.get(told.task, told.rows)
                used[told.task] = min(first, told.rows[0]), max(last, told.rows[1])
    sql = (
        "INSERT INTO cursors VALUES (?, ?, ?) "
        "ON CONFLICT (task) DO UPDATE SET row = excluded.row WHERE excluded.row > row"
    )
    db.executemany(sql, ((task, last, first) for task, (first, last) in used.items()))


def plan_new_log(db: sqlite3.Connection, old_log: str, reason: str) -> None:
    """Plan a new log after `old`, inside the caller's transaction."""
    log.critical("%s A new log begins.", reason)
    common = int(meta.get(db, UNPROVEN_FROM, "") or 0)
    plan = NewLogPlan(reason=reason, old=old_log, common_through=common, acknowledged=meta.get(db, "acknowledged", ""))
    findings.put(db, NEW_LOG, msgspec.json.encode(plan).decode())


def abandon_unknown_log(db: sqlite3.Connection) -> None:
    """Where nobody knows any more how far the log had got, its messages that are left go into a new one."""
    row = db.execute("SELECT payload FROM outbox ORDER BY seq DESC LIMIT 1").fetchone()
    if row is None:
        return
    try:
        old = str(json.loads(row[0])["log"])
    except (ValueError, KeyError, TypeError):
        old = ""
    findings.put(db, "log", old or str(uuid.uuid4()))
    plan_new_log(db, old, "The store was damaged where it says which log it writes and how far that had got.")


_REASON = "The store was damaged where it says which log it writes and how far that had got."


def rebuild_meta(db: sqlite3.Connection, watermark_state: WatermarkState | None, damaged: Collection[str]) -> None:
    """Inside the caller's transaction; `damaged`: names of values that were there, but not as written."""
    if not meta.get(db, "boot", ""):
        boots = [
            _max_value(db, "chunks", "boot"),
            _max_value(db, "segments", "boot"),
            watermark_state.boot if watermark_state else 0,
        ]
        meta.put(db, "boot", str(max(boots)))
        meta.drop(db, "boot_id")
    if not meta.get(db, retention.UPTIME, ""):
        # Both count in uptime, which begins anew.
        meta.drop(db, retention.ACKNOWLEDGED_HISTORY)
        meta.drop(db, retention.GROWTH)
    if db.execute("SELECT 1 FROM meta WHERE key = ?", (UNPROVEN_FROM,)).fetchone() is None:
        # As far as is known nobody has confirmed any message.
        meta.put(db, UNPROVEN_FROM, "0")
    _rebuild_log_head(db, watermark_state, is_plan_lost=NEW_LOG in damaged)


def _rebuild_log_head(db: sqlite3.Connection, watermark_state: WatermarkState | None, *, is_plan_lost: bool) -> None:
    newest = _newest_message(db)
    known = meta.get(db, "log", "")
    log = known or (watermark_state.log if watermark_state else "") or newest.get("log", "")
    if not log:
        # As in a new store: nothing is left that a number could be given again to.
        for key in ("seq", "digest"):
            meta.drop(db, key)
        return
    meta.put(db, "log", log)
    seq, last = meta.get(db, "seq", ""), meta.get(db, "digest", "")
    told = {int(seq): last} if seq.isdecimal() else {0: ""}
    if watermark_state is not None and watermark_state.log == log:
        told[watermark_state.seq] = watermark_state.digest
    if newest.get("log") == log:
        told[newest["seq"]] = newest["digest"]
    most = max(told)
    acknowledged = retention.AcknowledgedSeqs.from_json(meta.get(db, retention.ACKNOWLEDGED, "")).through
    # The newest message that is left need not be the last one that was written.
    is_told = bool(known and seq.isdecimal()) or (watermark_state is not None and watermark_state.log == log)
    is_known = is_told and most >= acknowledged and bool(told[most] or most == 0)
    meta.put(db, "seq", str(max(most, acknowledged)))
    meta.put(db, "digest", told[most])
    if not is_known or is_plan_lost:
        plan_new_log(db, log, _REASON)


def _newest_message(db: sqlite3.Connection) -> dict[str, Any]:
    """seq, log and digest of the newest message that is left; nothing where it says none."""
    row = db.execute("SELECT seq, CAST(payload AS BLOB) FROM outbox ORDER BY seq DESC LIMIT 1").fetchone()
    if row is None:
        return {}
    try:
        return {"seq": int(row[0]), "log": str(json.loads(row[1])["log"]), "digest": digest(row[1])}
    except (ValueError, KeyError, TypeError):
        return {}


def _max_value(db: sqlite3.Connection, table: str, column: str) -> int:
    found = db.execute(f"SELECT max({column}) FROM {table} WHERE typeof({column}) = 'integer'").fetchone()[0]
    return int(found or 0)
