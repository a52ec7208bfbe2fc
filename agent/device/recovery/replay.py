"""Replay of the journal: small commits that the database does not include are applied when it is opened."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec

from agent import clock
from agent.device.recovery import findings
from agent.device.recovery.categories import repair_categories
from agent.device.recovery.findings import RecoveryFinding
from agent.device.store import journal, meta
from agent.device.store.journal import INSERT_CHUNK_CODE, Record
from agent.errors import StorageError

_LAST_STORED = "SELECT first_row + n - 1 FROM chunks WHERE stream = ? ORDER BY first_row DESC LIMIT 1"
_MAX_PAGES = 2**30
_SUMMARY = "The journal of small commits was damaged, or the disk lost writes that it had confirmed."


class Replay(msgspec.Struct):
    """Applied `chunks`, each (stream id, first row, last row), and the rows that are missing before them, by stream."""

    chunks: list[tuple[int, int, int]] = []
    lost: dict[str, list[tuple[int, int]]] = {}
    is_complete: bool = True


def replay(db: sqlite3.Connection, folder: Path) -> Replay:
    """Apply the journal's records inside the caller's transaction. Raises StorageError, sqlite3.Error."""
    try:
        content = journal.read_file(folder)
    except OSError as error:
        raise StorageError(f"{folder / journal.FILE_NAME}: {error.strerror}; it holds acknowledged rows") from error
    done, included = Replay(), journal.included_through(db)
    records = journal.pending(db, content)
    # A quota that was lowered since the rows were acknowledged must not keep them out.
    pages = min(_MAX_PAGES, int(db.execute("PRAGMA max_page_count").fetchone()[0]))
    db.execute(f"PRAGMA max_page_count = {pages + journal.SIZE // 1024}")
    for number, body in records.items():
        done.is_complete &= number == included + 1
        included = number
        try:
            _apply(db, journal.decode(body), done)
        except ValueError:
            done.is_complete = False
    if records:
        journal.include(db, included)
    db.execute(f"PRAGMA max_page_count = {pages}")
    return done


def report(db: sqlite3.Connection, done: Replay) -> None:
    """Add a finding if records were missing or damaged, inside the caller's transaction."""
    if done.is_complete:
        return
    repair_categories(db)
    time = clock.to_rfc3339(clock.read().wall_us)
    findings.add(db, RecoveryFinding(summary=_SUMMARY, time=time, log=meta.get(db, "log", ""), rows=done.lost))


def _apply(db: sqlite3.Connection, record: Record, done: Replay) -> None:
    """Apply a record, unless the database has its rows or lacks their stream: a salvaged one may."""
    chunks = [(p[0], p[1], p[1] + p[2] - 1) for code, p in record if code == INSERT_CHUNK_CODE and isinstance(p, list)]
    for stream, first, _ in chunks:
        row = db.execute("SELECT name, next_row FROM streams WHERE id = ?", (stream,)).fetchone()
        stored = db.execute(_LAST_STORED, (stream,)).fetchone()
        if row is None or (stored is not None and stored[0] >= first):
            return
        if row[1] < first:
            done.lost.setdefault(str(row[0]), []).append((row[1], first - 1))
    journal.apply(db, record)
    done.chunks += chunks
