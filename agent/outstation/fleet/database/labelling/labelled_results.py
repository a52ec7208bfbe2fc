"""Statements that join labels with results; each inside a transaction of the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from outstation.fleet.database.interface import Connection
from outstation.foundation import decoders

_CHUNK_ROWS = 500
_NEWEST_LOG = """
    SELECT l.log FROM logs l WHERE l.device = :device AND EXISTS (
        SELECT 1 FROM results r WHERE r.device = l.device AND r.task = :task AND r.log = l.log)
    ORDER BY l.live DESC, CASE WHEN l.live THEN l.rowid ELSE -l.rowid END LIMIT 1"""
_UPSERT_LABEL = """
    INSERT INTO labels (device, task, log, row, output, label, source, received, given_by)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, task, log, row, output) DO UPDATE SET
        label = excluded.label, source = excluded.source, received = excluded.received,
        given_by = excluded.given_by"""
_LABELLED_RESULTS = """
    SELECT l.label, l.source, r.label, r.score, r.value, r.seq FROM labels l
    JOIN results r ON r.device = l.device AND r.task = l.task AND r.row = l.row AND r.log = l.log
    WHERE l.device = ? AND l.task = ? AND l.log = ? AND l.output = '' ORDER BY l.row"""
_LABELLED_OUTPUT = """
    SELECT l.label, l.source, d.outputs, r.seq FROM labels l
    JOIN results r ON r.device = l.device AND r.task = l.task AND r.row = l.row AND r.log = l.log
    LEFT JOIN result_details d ON d.device = r.device AND d.log = r.log AND d.seq = r.seq AND d.row = r.row
    WHERE l.device = ? AND l.task = ? AND l.log = ? AND l.output = ? ORDER BY l.row"""
_DETAILS = """
    SELECT d.outputs FROM results r
    JOIN result_details d ON d.device = r.device AND d.log = r.log AND d.seq = r.seq AND d.row = r.row
    WHERE r.device = ? AND r.task = ? AND r.log = ? AND d.outputs IS NOT NULL"""
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
# Row, and the further output or "".
Place = tuple[int, str]


class OutputResult(msgspec.Struct, frozen=True):
    """Result of one output, as in table results."""

    label: str | None
    score: float | None
    value: float | None

    @classmethod
    def of_further(cls, outputs: str | None, name: str) -> OutputResult:
        """Return that of the further output `name`, from column `outputs` of table result_details."""
        columns = {} if outputs is None else decoders.from_json(outputs, dict[str, str | float | None])
        label, score, value = (columns.get(f"{prefix}_{name}") for prefix in ("label", "score", "value"))
        return cls(
            label if isinstance(label, str) else None,
            None if isinstance(score, str) else score,
            None if isinstance(value, str) else value,
        )


class LabelledResult(NamedTuple):
    """A result of one output, with its label and the source of that; `bundle`: its digest, None if unknown."""

    label: str
    source: str
    predicted: str | None
    score: float | None
    value: float | None
    seq: int
    bundle: str | None = None


def find_newest_log(db: Connection, device: str, task: str) -> str | None:
    (log,) = db.execute(_NEWEST_LOG, {"device": device, "task": task}).fetchone() or (None,)
    return None if log is None else str(log)


def load_results(db: Connection, key: TaskLog) -> list[tuple[int, int, int]]:
    """Return (t, row, seq) of each result, in order of time."""
    sql = "SELECT t, row, seq FROM results WHERE device = ? AND task = ? AND log = ? ORDER BY t, row"
    return db.execute(sql, key).fetchall()


def load_result_labels(db: Connection, key: TaskLog) -> list[str]:
    """Return the distinct labels that the model predicted, sorted."""
    sql = "SELECT DISTINCT label FROM results WHERE device = ? AND task = ? AND log = ? AND label IS NOT NULL"
    return sorted(label for (label,) in db.execute(sql, key))


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


def load_label_texts(db: Connection, key: TaskLog, output: str, *, except_source: str) -> list[str]:
    """Return the distinct labels stored for an output of the task, except those of one source."""
    sql = "SELECT DISTINCT label FROM labels WHERE device = ? AND task = ? AND log = ? AND output = ? AND source <> ?"
    return [label for (label,) in db.execute(sql, (*key, output, except_source))]


def load_labels(db: Connection, key: TaskLog) -> dict[Place, tuple[str, str]]:
    """Return (row, output) → (label, source)."""
    sql = "SELECT row, output, label, source FROM labels WHERE device = ? AND task = ? AND log = ?"
    return {(row, output): (text, source) for row, output, text, source in db.execute(sql, key)}


def save_labels(db: Connection, key: TaskLog, labels: Mapping[Place, tuple[str, str]], now: str, by: str) -> None:
    """Insert or replace labels: (row, output) → (label, source)."""
    db.executemany(_UPSERT_LABEL, [(*key, *place, *label, now, by) for place, label in labels.items()])


def list_labelled_outputs(db: Connection, key: TaskLog) -> list[str]:
    """Return the further outputs with labels, sorted."""
    sql = "SELECT DISTINCT output FROM labels WHERE device = ? AND task = ? AND log = ? AND output <> ''"
    return sorted(output for (output,) in db.execute(sql, key))


def load_labelled_results(db: Connection, key: TaskLog, output: str = "") -> list[LabelledResult]:
    """Return the labelled results of an output, in order of rows."""
    if not output:
        return [LabelledResult(*row) for row in db.execute(_LABELLED_RESULTS, key)]
    return [
        LabelledResult(label, source, result.label, result.score, result.value, seq)
        for label, source, outputs, seq in db.execute(_LABELLED_OUTPUT, (*key, output))
        for result in [OutputResult.of_further(outputs, output)]
    ]


def load_further_results(db: Connection, key: TaskLog, output: str) -> Iterator[OutputResult]:
    """Return the results of a further output, in no order."""
    return (OutputResult.of_further(outputs, output) for (outputs,) in db.execute(_DETAILS, key))


def replace_metrics(db: Connection, device: str, task: str, source: str, rows: Sequence[Sequence[Any]]) -> None:
    db.execute("DELETE FROM metrics WHERE device = ? AND task = ? AND source = ?", (device, task, source))
    db.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def load_bundle(db: Connection, key: TaskLog, seq: int) -> tuple[str, str, str] | None:
    """Return (name, version, digest) of the bundle that made the results of a message."""
    device, _, log = key
    return db.execute(_BUNDLE, (device, log, seq)).fetchone()  # type: ignore[no-any-return]
