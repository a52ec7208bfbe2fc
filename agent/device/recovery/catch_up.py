"""A database that is behind its watermark goes on where it had got: no row number and no seq is ever given twice."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import uuid

import msgspec

from agent import clock
from agent.device.recovery import findings
from agent.device.recovery.findings import NEW_LOG, Finding, NewLog
from agent.device.store import meta, ranges, watermark
from agent.device.store.watermark import Mark

log = logging.getLogger("outstation")


class _Used(msgspec.Struct):
    """What a `results` message says of the rows it is about."""

    kind: str
    task: str
    rows: tuple[int, int]


# In table meta: the log before this one; the seq behind which nobody has confirmed that messages are ours; the last seq
# when the store was opened: what is above was written since, in no copy of the store.
PREVIOUS_LOG, UNPROVEN, OPENED = "previous log", "unproven from", "opened at"


def catch_up(db: sqlite3.Connection, mark: Mark | None) -> bool:
    """Compare with the watermark and go on from whichever is ahead; whether the watermark was.

    Inside the transaction that begins the opening. What is missing becomes a finding, to be said in the log.
    """
    findings.put(db, findings.STOP, "clean" if meta.get(db, findings.CLEAN, "") else "unclean")
    meta.drop(db, findings.CLEAN)
    here = watermark.of(db)
    changed = False
    if mark is not None and mark.log and mark != here:
        changed = _compare(db, here, mark)
    seq = str(watermark.of(db).seq)
    if not meta.get(db, UNPROVEN, ""):
        findings.put(db, UNPROVEN, seq)
    findings.put(db, OPENED, seq)
    return changed


def _compare(db: sqlite3.Connection, here: Mark, mark: Mark) -> bool:
    if not here.log:
        adopt(db, mark)
        begin_log(db, mark.log, f"The store was deleted or lost; its log {mark.log} had {mark.seq} messages.")
        return True
    if here.log != mark.log:
        if meta.get(db, PREVIOUS_LOG, "") == mark.log:
            return False
        why = f"The store was replaced: log {mark.log} was written in this folder last, the database is of {here.log}."
    elif here.seq == mark.seq and here.digest != mark.digest:
        why = f"The store was replaced by another one that went on from the same beginning, to message {mark.seq} too."
    else:
        return _went_back(db, here, mark)
    _rows_and_cursors(db, here, mark)
    # In the log that was written last nothing more will come either.
    begin_log(db, here.log, why)
    return True


def _went_back(db: sqlite3.Connection, here: Mark, mark: Mark) -> bool:
    moved = adopt(db, mark)
    if not moved:
        return False
    kept = ranges.of(row[0] for row in db.execute("SELECT seq FROM outbox WHERE seq > ?", (here.seq,)))
    seqs = findings.absent(kept, here.seq + 1, mark.seq)
    what = (
        "The store went back in time: commits that were made are gone (a log that was cut, an old copy of the "
        "database, or a disk that says it has written what it has not)."
    )
    log.critical("%s", what)
    time = clock.rfc3339(clock.read().wall_us)
    findings.add(db, Finding(what=what, time=time, log=mark.log, seqs=seqs, rows=moved.rows, tasks=moved.cursors))
    return True


class Moved(msgspec.Struct, frozen=True):
    """Numbers that were skipped: rows by stream, rows judged by task, whether seqs."""

    rows: dict[str, list[tuple[int, int]]]
    cursors: dict[str, list[tuple[int, int]]]
    seqs: bool

    def __bool__(self) -> bool:
        return bool(self.rows or self.cursors or self.seqs)


def adopt(db: sqlite3.Connection, mark: Mark) -> Moved:
    """Take over every number that is ahead in the watermark; what was skipped."""
    here = watermark.of(db)
    rows, cursors = _rows_and_cursors(db, here, mark)
    seqs = mark.seq > here.seq or not here.log
    if seqs:
        for key, value in (("log", mark.log), ("seq", str(mark.seq)), ("digest", mark.digest)):
            findings.put(db, key, value)
    if not here.device and mark.device:
        findings.put(db, "device", mark.device)
    if rows or cursors or seqs or mark.boot > here.boot:
        # A boot of its own for what comes: the lost commits may have had the number of this one.
        findings.put(db, "boot", str(max(here.boot, mark.boot)))
        findings.put(db, "boot_id", "")
    return Moved(rows, cursors, seqs)


_Skipped = dict[str, list[tuple[int, int]]]


def _rows_and_cursors(db: sqlite3.Connection, here: Mark, mark: Mark) -> tuple[_Skipped, _Skipped]:
    rows: _Skipped = {}
    cursors: _Skipped = {}
    for name, (_, crc, next_row) in mark.streams.items():
        first = here.streams.get(name, (0, 0, 1))[2]
        if name not in here.streams:
            values = (name, watermark.unknown_fields(crc), next_row)
            db.execute("INSERT INTO streams (name, fields, next_row) VALUES (?, ?, ?)", values)
        elif next_row > first:
            db.execute("UPDATE streams SET next_row = ? WHERE name = ?", (next_row, name))
        if next_row > first:
            rows[name] = [(first, next_row - 1)]
    for task, row in mark.cursors.items():
        had = here.cursors.get(task, 0)
        if row > had:
            # Judged already: that nothing is judged twice is worth more than results that may have arrived.
            sql = "INSERT INTO cursors VALUES (?, ?, ?) ON CONFLICT (task) DO UPDATE SET row = excluded.row"
            db.execute(sql, (task, row, row))
            cursors[task] = [(had + 1, row)]
    for kid, counter in mark.commands.items():
        # A command that was obeyed must not be obeyed again when somebody repeats it.
        if counter > here.commands.get(kid, 0):
            db.execute("INSERT OR REPLACE INTO commands VALUES (?, ?)", (kid, counter))
    return rows, cursors


def raise_cursors(db: sqlite3.Connection) -> None:
    """Where a cursor is behind the results that are kept: what they tell of was judged."""
    used: dict[str, tuple[int, int]] = {}
    for (payload,) in db.execute("SELECT payload FROM outbox WHERE topic LIKE '%/results/%'"):
        with contextlib.suppress(msgspec.MsgspecError, ValueError, TypeError):
            told = msgspec.json.decode(payload, type=_Used)
            if told.kind == "results":
                first, last = used.get(told.task, told.rows)
                used[told.task] = min(first, told.rows[0]), max(last, told.rows[1])
    sql = (
        "INSERT INTO cursors VALUES (?, ?, ?) "
        "ON CONFLICT (task) DO UPDATE SET row = excluded.row WHERE excluded.row > row"
    )
    db.executemany(sql, ((task, last, first) for task, (first, last) in used.items()))


def begin_log(db: sqlite3.Connection, old: str, why: str) -> None:
    """Plan a new log after `old`, inside the caller's transaction."""
    log.critical("%s A new log begins.", why)
    common = int(meta.get(db, UNPROVEN, "") or 0)
    plan = NewLog(why=why, old=old, common=common, acknowledged=meta.get(db, "acknowledged", ""))
    findings.put(db, NEW_LOG, msgspec.json.encode(plan).decode())


def leave_unknown_log(db: sqlite3.Connection) -> None:
    """Where nobody knows any more how far the log had got, its messages that are left go into a new one."""
    row = db.execute("SELECT payload FROM outbox ORDER BY seq DESC LIMIT 1").fetchone()
    if row is None:
        return
    try:
        old = str(json.loads(row[0])["log"])
    except (ValueError, KeyError, TypeError):
        old = ""
    findings.put(db, "log", old or str(uuid.uuid4()))
    begin_log(db, old, "The store was damaged where it says which log it writes and how far that had got.")
