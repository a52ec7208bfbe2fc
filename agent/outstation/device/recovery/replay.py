"""Replay of the journal: small commits that the database does not include are applied when it is opened."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import msgspec

from outstation.device.recovery import findings
from outstation.device.recovery.categories import repair_categories
from outstation.device.recovery.findings import RecoveryFinding
from outstation.device.store import journal
from outstation.device.store.journal import Record
from outstation.device.store.tables import meta
from outstation.foundation import clock

_LAST_STORED = "SELECT first_row + n - 1 FROM chunks WHERE stream = ? ORDER BY first_row DESC LIMIT 1"
_COUNT_SAME = "SELECT count(*) FROM chunks WHERE stream = ? AND first_row = ? AND crc = ?"
_MAX_PAGES = 2**30
_SUMMARY = "The journal of small commits was damaged or is missing, or the disk lost writes that it had confirmed."


class Replay(msgspec.Struct):
    """Applied `chunks`, each (stream id, first row, last row), and the rows that are missing before them, by stream."""

    chunks: list[tuple[int, int, int]] = []
    lost: dict[str, list[tuple[int, int]]] = {}
    is_complete: bool = True


def replay(db: sqlite3.Connection, folder: Path) -> Replay:
    """Apply the journal's records inside the caller's transaction. Raises StorageError, sqlite3.Error."""
    done, pending = Replay(), journal.pending(db, journal.read_file(folder))
    applied = pending.included
    # A quota that was lowered since the rows were acknowledged must not keep them out.
    pages = min(_MAX_PAGES, int(db.execute("PRAGMA max_page_count").fetchone()[0]))
    db.execute(f"PRAGMA max_page_count = {pages + journal.SIZE // 1024}")
    for body in pending.bodies.values():
        with contextlib.suppress(ValueError):
            applied += _apply(db, journal.decode(body), done)
    # Its last record, or the one before if that could not be written, stays in the file until the next one.
    is_missing = pending.newest < pending.included - 1 and not meta.get(db, findings.CLEAN_STOP, "")
    done.is_complete = applied == max(pending.newest, pending.included) and not is_missing
    if pending.bodies or is_missing:
        journal.include(db, pending.opening, pending.newest)
    db.execute(f"PRAGMA max_page_count = {pages}")
    return done


def report(db: sqlite3.Connection, done: Replay) -> None:
    """Add a finding if records were missing or damaged, inside the caller's transaction."""
    if done.is_complete:
        return
    repair_categories(db)
    time = clock.now_rfc3339()
    findings.add(db, RecoveryFinding(summary=_SUMMARY, time=time, log=meta.get(db, "log", ""), rows=done.lost))


def _apply(db: sqlite3.Connection, record: Record, done: Replay) -> bool:
    """Apply a record. Return False if the database cannot take each chunk of it.

    A salvaged one may lack a stream, or have other rows in the place. Raises ValueError, StorageError, sqlite3.Error.
    """
    chunks, left_out, is_complete = journal.chunks(record), set[int](), True
    next_rows, lost = dict[int, int](), list[tuple[str, tuple[int, int]]]()
    for chunk in chunks:
        row = db.execute("SELECT name, next_row FROM streams WHERE id = ?", (chunk.stream,)).fetchone()
        stored = db.execute(_LAST_STORED, (chunk.stream,)).fetchone()
        if row is None or chunk.stream in left_out or (stored is not None and stored[0] >= chunk.first):
            left_out.add(chunk.stream)
            is_complete &= db.execute(_COUNT_SAME, (chunk.stream, chunk.first, chunk.crc)).fetchone()[0] == 1
            continue
        name, declared = row
        next_row = next_rows.get(chunk.stream, declared)
        if next_row < chunk.first:
            lost.append((str(name), (next_row, chunk.first - 1)))
        next_rows[chunk.stream] = chunk.last + 1
    if not chunks or len(left_out) < len({chunk.stream for chunk in chunks}) or not is_complete:
        journal.apply(db, journal.without_chunks(record, left_out))
    for stream, rows in lost:
        done.lost.setdefault(stream, []).append(rows)
    done.chunks += [(chunk.stream, chunk.first, chunk.last) for chunk in chunks if chunk.stream not in left_out]
    return is_complete
