"""Repair of lost commits: a database behind its watermark continues where it was, and lost meta values are rebuilt.

No row number and no seq is ever assigned twice: if nothing says how far the log had come, a new log begins.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import uuid
from collections.abc import Collection
from typing import Any

import msgspec

from outstation.device.recovery import findings
from outstation.device.recovery.findings import NEW_LOG, NewLogPlan, RecoveryFinding
from outstation.device.store import retention, watermark
from outstation.device.store.tables import meta
from outstation.device.store.watermark import WatermarkState
from outstation.foundation import clock, decoders, ranges
from outstation.protocol.wire.log_chain import digest

log = logging.getLogger("outstation")

# Names in table meta: the log before this one; the seq behind which no acknowledgement has confirmed our messages; the
# last seq when the store was opened, above which no message can be in a copy of the store.
PREVIOUS_LOG, UNPROVEN_FROM, OPENED_SEQ = "previous log", "unproven from", "opened seq"
_LOG_HEAD_LOST = "The store was damaged where it records its log and the last message of it."


class _ResultsMessage(msgspec.Struct):
    """Members of a `results` message that name its rows."""

    kind: str
    task: str
    rows: tuple[int, int]


class SkippedNumbers(msgspec.Struct, frozen=True):
    """Skipped numbers: rows by stream, consumed rows by task, and whether seqs."""

    rows: dict[str, list[tuple[int, int]]]
    cursors: dict[str, list[tuple[int, int]]]
    seqs: bool

    def __bool__(self) -> bool:
        return bool(self.rows or self.cursors or self.seqs)


# --- behind the watermark ---


def catch_up(db: sqlite3.Connection, saved: WatermarkState | None) -> bool:
    """Compare with the watermark and continue from whichever is ahead. Return True if the watermark was.

    Runs inside the first transaction of an opening. Losses become a finding, which the log reports.
    """
    was_clean, is_new = meta.get(db, findings.CLEAN_STOP, ""), meta.get(db, findings.LAST_STOP, "new") == "new"
    meta.put(db, findings.LAST_STOP, "clean" if was_clean else "" if is_new else "unclean")
    meta.delete(db, findings.CLEAN_STOP)
    current = watermark.from_database(db)
    changed = False
    if saved is not None and saved.log and saved != current:
        changed = _compare(db, current, saved)
    seq = str(watermark.from_database(db).seq)
    if not meta.get(db, UNPROVEN_FROM, ""):
        meta.put(db, UNPROVEN_FROM, seq)
    meta.put(db, OPENED_SEQ, seq)
    return changed


def _compare(db: sqlite3.Connection, current: WatermarkState, saved: WatermarkState) -> bool:
    if not current.log:
        adopt_watermark(db, saved)
        plan_new_log(db, saved.log, f"The store was deleted or lost; its log {saved.log} had {saved.seq} messages.")
        return True
    if current.log != saved.log:
        if meta.get(db, PREVIOUS_LOG, "") == saved.log:
            return False
        reason = (
            f"The store was replaced: the last log of this folder was {saved.log}, the database belongs to log "
            f"{current.log}."
        )
    elif current.seq == saved.seq and current.digest != saved.digest:
        reason = (
            "The store was replaced by another one that continued from the same beginning and also has message "
            f"{saved.seq}."
        )
    else:
        return _recover_rollback(db, current, saved)
    _advance_numbers(db, current, saved)
    # Nothing more will be written to the last log of this folder either.
    plan_new_log(db, current.log, reason)
    return True


def _recover_rollback(db: sqlite3.Connection, current: WatermarkState, saved: WatermarkState) -> bool:
    skipped = adopt_watermark(db, saved)
    labels = lost_labels(current, saved)
    if not (skipped or labels):
        return False
    stored = ranges.from_numbers(seq for (seq,) in db.execute("SELECT seq FROM outbox WHERE seq > ?", (current.seq,)))
    summary = (
        "The store went back in time: it has lost commits (a truncated write-ahead log, an old copy of the database, "
        "or a disk that reports writes it has not done)."
    )
    summary += describe_lost_labels(labels)
    log.critical("%s", summary)
    finding = RecoveryFinding(
        summary=summary,
        time=clock.now_rfc3339(),
        log=saved.log,
        seqs=findings.missing_ranges(stored, current.seq + 1, saved.seq),
        rows=skipped.rows,
        tasks=skipped.cursors,
    )
    findings.add(db, finding)
    return True


def lost_labels(current: WatermarkState, saved: WatermarkState) -> dict[str, int]:
    """Return how many of the newest labels of each task are missing."""
    lost = {task: newest - current.labels.get(task, 0) for task, newest in saved.labels.items()}
    return {task: count for task, count in lost.items() if count > 0}


def describe_lost_labels(lost: dict[str, int]) -> str:
    """Return a sentence for the end of a summary, or an empty text."""
    counts = ", ".join(f"{count} of {task}" for task, count in sorted(lost.items()))
    return f" Labels are lost, the newest {counts}: send them again." if lost else ""


def adopt_watermark(db: sqlite3.Connection, saved: WatermarkState) -> SkippedNumbers:
    """Adopt every number that is ahead in the watermark, and return what was skipped."""
    current = watermark.from_database(db)
    rows, cursors = _advance_numbers(db, current, saved)
    seqs = saved.seq > current.seq or not current.log
    if seqs:
        for key, value in (("log", saved.log), ("seq", str(saved.seq)), ("digest", saved.digest)):
            meta.put(db, key, value)
    if not current.device and saved.device:
        meta.put(db, "device", saved.device)
    if rows or cursors or seqs or saved.boot > current.boot:
        # A boot of its own for what follows: the lost commits may have had the number of this one.
        meta.put(db, "boot", str(max(current.boot, saved.boot)))
        meta.put(db, "boot_id", "")
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
        before = current.cursors.get(task, 0)
        if row > before:
            # These rows were consumed: never consuming a row twice is worth more than results that may have arrived.
            sql = (
                "INSERT INTO cursors (task, row, first_row) VALUES (?, ?, ?) "
                "ON CONFLICT (task) DO UPDATE SET row = excluded.row"
            )
            db.execute(sql, (task, row, row))
            cursors[task] = [(before + 1, row)]
    for kid, counter in saved.commands.items():
        # A command that ran must not run again when its message is repeated.
        if counter > current.commands.get(kid, 0):
            db.execute("INSERT OR REPLACE INTO command_counters (kid, counter) VALUES (?, ?)", (kid, counter))
    return rows, cursors


def raise_cursors(db: sqlite3.Connection) -> None:
    """Raise cursors that are behind the stored results: the rows of these were consumed."""
    consumed: dict[str, tuple[int, int]] = {}
    for (payload,) in db.execute("SELECT payload FROM outbox WHERE topic LIKE '%/results/%'"):
        with contextlib.suppress(msgspec.MsgspecError, ValueError, TypeError):
            message = decoders.from_json(payload, _ResultsMessage)
            if message.kind == "results":
                first, last = consumed.get(message.task, message.rows)
                consumed[message.task] = min(first, message.rows[0]), max(last, message.rows[1])
    sql = (
        "INSERT INTO cursors (task, row, first_row) VALUES (?, ?, ?) "
        "ON CONFLICT (task) DO UPDATE SET row = excluded.row WHERE excluded.row > row"
    )
    db.executemany(sql, ((task, last, first) for task, (first, last) in consumed.items()))


def plan_new_log(db: sqlite3.Connection, old_log: str, reason: str) -> None:
    """Plan a new log after `old_log`, inside the caller's transaction."""
    log.critical("%s A new log begins.", reason)
    plan = NewLogPlan(
        reason=reason,
        old=old_log,
        common_through=int(meta.get(db, UNPROVEN_FROM, "") or 0),
        acknowledged=meta.get(db, retention.ACKNOWLEDGED, ""),
    )
    meta.put(db, NEW_LOG, msgspec.json.encode(plan).decode())


def abandon_unknown_log(db: sqlite3.Connection) -> None:
    """Plan a new log for the messages that are left of a log whose id and last seq are lost."""
    (payload,) = db.execute("SELECT payload FROM outbox ORDER BY seq DESC LIMIT 1").fetchone() or (None,)
    if payload is None:
        return
    try:
        old = str(json.loads(payload)["log"])
    except (ValueError, KeyError, TypeError):
        old = ""
    meta.put(db, "log", old or str(uuid.uuid4()))
    plan_new_log(db, old, _LOG_HEAD_LOST)


# --- damaged table meta ---


def rebuild_meta(db: sqlite3.Connection, saved: WatermarkState | None, damaged: Collection[str]) -> None:
    """Rebuild lost values of table meta from the watermark, the outbox, the readings and the clock segments.

    Runs inside the caller's transaction; `damaged`: names of values that were there, but not as written.
    """
    if not meta.get(db, "boot", ""):
        boots = [
            _max_value(db, "chunks", "boot"),
            _max_value(db, "clock_segments", "boot"),
            saved.boot if saved else 0,
        ]
        meta.put(db, "boot", str(max(boots)))
        meta.delete(db, "boot_id")
    if not meta.get(db, retention.UPTIME, ""):
        # Both are in uptime, which begins anew.
        meta.delete(db, retention.ACKNOWLEDGED_HISTORY)
        meta.delete(db, retention.GROWTH)
    if db.execute("SELECT 1 FROM meta WHERE key = ?", (UNPROVEN_FROM,)).fetchone() is None:
        # Nobody is known to have confirmed any message.
        meta.put(db, UNPROVEN_FROM, "0")
    _rebuild_log_head(db, saved, is_plan_lost=NEW_LOG in damaged)


def _rebuild_log_head(db: sqlite3.Connection, saved: WatermarkState | None, *, is_plan_lost: bool) -> None:
    newest = _newest_message(db)
    stored_log = meta.get(db, "log", "")
    log_id = stored_log or (saved.log if saved else "") or newest.get("log", "")
    if not log_id:
        # As in a new store: nothing is left whose number could be assigned again.
        for key in ("seq", "digest"):
            meta.delete(db, key)
        return
    meta.put(db, "log", log_id)
    seq, last_digest = meta.get(db, "seq", ""), meta.get(db, "digest", "")
    digests = {int(seq): last_digest} if seq.isdecimal() else {0: ""}
    if saved is not None and saved.log == log_id:
        digests[saved.seq] = saved.digest
    if newest.get("log") == log_id:
        digests[newest["seq"]] = newest["digest"]
    last = max(digests)
    acknowledged = retention.AcknowledgedSeqs.from_json(meta.get(db, retention.ACKNOWLEDGED, "")).through
    # The newest stored message need not be the last one that was written.
    is_recorded = bool(stored_log and seq.isdecimal()) or (saved is not None and saved.log == log_id)
    is_known = is_recorded and last >= acknowledged and bool(digests[last] or last == 0)
    meta.put(db, "seq", str(max(last, acknowledged)))
    meta.put(db, "digest", digests[last])
    if not is_known or is_plan_lost:
        plan_new_log(db, log_id, _LOG_HEAD_LOST)


def _newest_message(db: sqlite3.Connection) -> dict[str, Any]:
    """Return seq, log and digest of the newest readable message in the outbox; {} if there is none."""
    row = db.execute("SELECT seq, CAST(payload AS BLOB) FROM outbox ORDER BY seq DESC LIMIT 1").fetchone()
    if row is None:
        return {}
    seq, payload = row
    try:
        return {"seq": int(seq), "log": str(json.loads(payload)["log"]), "digest": digest(payload)}
    except (ValueError, KeyError, TypeError):
        return {}


def _max_value(db: sqlite3.Connection, table: str, column: str) -> int:
    value = db.execute(f"SELECT max({column}) FROM {table} WHERE typeof({column}) = 'integer'").fetchone()[0]
    return int(value or 0)
