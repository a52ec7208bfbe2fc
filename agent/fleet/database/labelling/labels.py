"""Statements that join labels with results; each inside a transaction of the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent.fleet.database.interface import Connection, Row

_CHUNK_ROWS = 500
_NEWEST_LOG = """
    SELECT l.log FROM logs l WHERE l.device = :device AND EXISTS (
        SELECT 1 FROM results r WHERE r.device = l.device AND r.task = :task AND r.log = l.log)
    ORDER BY l.live DESC, CASE WHEN l.live THEN l.rowid ELSE -l.rowid END LIMIT 1"""
_UPSERT_LABEL = """
    INSERT INTO labels VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, task, log, row) DO UPDATE SET
        label = excluded.label, source = excluded.source, received = excluded.received,
        given_by = excluded.given_by"""
_LABELLED_RESULTS = """
    SELECT l.label, l.source, r.label, r.score, r.value, r.seq FROM labels l
    JOIN results r ON r.device = l.device AND r.task = l.task AND r.row = l.row AND r.log = l.log
    WHERE l.device = ? AND l.task = ? AND l.log = ? ORDER BY l.row"""
_RESULTS_MESSAGES = """
    SELECT seq, payload FROM messages WHERE device = ? AND log = ? AND seq > ? AND kind = 'results'
    ORDER BY seq LIMIT ?"""
_AUDIT_MESSAGES = """
    SELECT payload FROM messages WHERE device = ? AND kind = 'audit' AND instr(payload, ?) > 0
    ORDER BY received DESC, seq DESC"""

_BUNDLE = """
    SELECT p.model, p.version, p.digest FROM result_messages m
    JOIN result_provenance p ON p.device = m.device AND p.provenance = m.provenance
    WHERE m.device = ? AND m.log = ? AND m.seq = ?"""

# (device, task, log)
TaskLog = tuple[str, str, str]


def find_newest_log(db: Connection, device: str, task: str) -> str | None:
    row = db.execute(_NEWEST_LOG, {"device": device, "task": task}).fetchone()
    return None if row is None else str(row[0])


def load_results(db: Connection, key: TaskLog) -> list[tuple[int, int, int]]:
    """Return (t, row, seq) of each result, in order of time."""
    sql = "SELECT t, row, seq FROM results WHERE device = ? AND task = ? AND log = ? ORDER BY t, row"
    return db.execute(sql, key).fetchall()


def load_result_labels(db: Connection, key: TaskLog) -> list[str]:
    """Return the distinct labels that the model predicted, sorted."""
    sql = "SELECT DISTINCT label FROM results WHERE device = ? AND task = ? AND log = ? AND label IS NOT NULL"
    return sorted(row[0] for row in db.execute(sql, key))


def stream_results_messages(db: Connection, device: str, log: str) -> Iterator[tuple[int, bytes]]:
    """Return (seq, payload) of each results message, in chunks: PostgreSQL would buffer the whole result."""
    after = 0
    while rows := db.execute(_RESULTS_MESSAGES, (device, log, after, _CHUNK_ROWS)).fetchall():
        yield from rows
        after = rows[-1][0]


def load_audit_payloads(db: Connection, device: str, substring: str) -> Iterator[bytes]:
    """Return the payloads of audit messages that contain `substring`, newest first."""
    for (payload,) in db.execute(_AUDIT_MESSAGES, (device, substring.encode())):
        yield payload


def load_label_texts(db: Connection, key: TaskLog, *, except_source: str) -> list[str]:
    """Return the distinct labels stored for the task, except those of one source."""
    sql = "SELECT DISTINCT label FROM labels WHERE device = ? AND task = ? AND log = ? AND source <> ?"
    return [row[0] for row in db.execute(sql, (*key, except_source))]


def load_labels(db: Connection, key: TaskLog) -> dict[int, tuple[str, str]]:
    """Return row → (label, source)."""
    sql = "SELECT row, label, source FROM labels WHERE device = ? AND task = ? AND log = ?"
    return {row: (text, source) for row, text, source in db.execute(sql, key)}


def save_labels(db: Connection, key: TaskLog, labels: Mapping[int, tuple[str, str]], now: str, by: str) -> None:
    """Insert or replace the labels of rows: row → (label, source)."""
    db.executemany(_UPSERT_LABEL, [(*key, row, *label, now, by) for row, label in labels.items()])


def load_labelled_results(db: Connection, key: TaskLog) -> list[Row]:
    """Return (label, source, predicted label, score, value, seq) of each labelled result, in order of rows."""
    return db.execute(_LABELLED_RESULTS, key).fetchall()


def replace_metrics(db: Connection, device: str, task: str, source: str, rows: Sequence[Sequence[Any]]) -> None:
    db.execute("DELETE FROM metrics WHERE device = ? AND task = ? AND source = ?", (device, task, source))
    db.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def load_bundle(db: Connection, key: TaskLog, seq: int) -> tuple[str, str, str] | None:
    """Return (name, version, digest) of the bundle that made the results of a message."""
    device, _, log = key
    return db.execute(_BUNDLE, (device, log, seq)).fetchone()  # type: ignore[no-any-return]
