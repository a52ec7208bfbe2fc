"""Statements on verdicts of people on results and alerts; each inside a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from outstation.fleet.database.interface import Connection, Row
from outstation.fleet.database.labelling.labelled_results import LabelledResult, TaskLog
from outstation.protocol.alerts.incident import IncidentKey

_SAVE = """
    INSERT INTO verdicts (device, task, log, row, given_by, verdict, label, predicted, alert, via, note, given)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, task, log, row, given_by) DO UPDATE SET
        verdict = excluded.verdict, label = excluded.label, predicted = excluded.predicted, alert = excluded.alert,
        via = excluded.via, note = excluded.note, given = excluded.given"""
_SAVE_OF_ALERT = """
    INSERT INTO alert_verdicts (source, device, log, id, given_by, verdict, via, note, given)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (source, device, log, id, given_by) DO UPDATE SET
        verdict = excluded.verdict, via = excluded.via, note = excluded.note, given = excluded.given"""
# As `load_labelled_results` of labels, with the bundle. CROSS JOIN: SQLite then looks each verdict's result up, instead
# of reading all results.
_AGREED_RESULTS = """
    SELECT v.label, 'verdict', r.label, r.score, r.value, r.seq, p.digest FROM agreed_verdicts v
    CROSS JOIN results r
    LEFT JOIN result_messages m ON m.device = r.device AND m.log = r.log AND m.seq = r.seq
    LEFT JOIN result_provenance p ON p.device = m.device AND p.provenance = m.provenance
    WHERE r.device = v.device AND r.task = v.task AND r.row = v.row AND r.log = v.log
      AND v.device = ? AND v.task = ? AND v.log = ? ORDER BY v.row"""
_RESULT = """
    SELECT r.log, r.seq, r.label, r.score, r.value FROM results r
    JOIN logs l ON l.device = r.device AND l.log = r.log
    WHERE r.device = :device AND r.task = :task AND r.row = :row
      AND (CAST(:log AS TEXT) IS NULL OR r.log = :log)
    ORDER BY l.live DESC, CASE WHEN l.live THEN l.rowid ELSE -l.rowid END LIMIT 1"""
_COUNTS = """
    SELECT device, task, given_by, verdict, count(*) AS n, max(given) AS newest FROM verdicts
    WHERE (CAST(:device AS TEXT) IS NULL OR device = :device) AND (CAST(:task AS TEXT) IS NULL OR task = :task)
    GROUP BY device, task, given_by, verdict ORDER BY 1, 2, 3, 4"""
_ALERT_COUNTS = """
    SELECT a.alert, v.verdict, count(*) FROM alert_verdicts v
    JOIN (SELECT DISTINCT source, device, log, id, alert FROM alerts) a
        ON a.source = v.source AND a.device = v.device AND a.log = v.log AND a.id = v.id
    GROUP BY a.alert, v.verdict ORDER BY 1, 2"""

_DISPUTED = """
    SELECT count(*) FROM (
        SELECT 1 FROM verdicts
        WHERE (CAST(:device AS TEXT) IS NULL OR device = :device) AND (CAST(:task AS TEXT) IS NULL OR task = :task)
        GROUP BY device, task, log, row HAVING min(label) <> max(label)) disputed"""

# Labels and verdicts of people and programs on first outputs, by author: their number, how many differ from the answer,
# and how many errors the scores predict.
_COMPARED = """
    SELECT g.device, g.task, g.given_by, g.origin, count(*), sum(CASE WHEN g.label <> r.label THEN 1 ELSE 0 END),
           sum(1.0 - r.score)
    FROM (SELECT device, task, log, row, given_by, label, 'verdicts' AS origin FROM verdicts
          UNION ALL SELECT device, task, log, row, given_by, label, 'labels' FROM labels
          WHERE source <> 'model' AND output = '') g
    CROSS JOIN results r
    WHERE r.device = g.device AND r.task = g.task AND r.row = g.row AND r.log = g.log
      AND r.label IS NOT NULL AND r.score BETWEEN 0 AND 1
      AND (CAST(:device AS TEXT) IS NULL OR g.device = :device) AND (CAST(:task AS TEXT) IS NULL OR g.task = :task)
    GROUP BY g.device, g.task, g.given_by, g.origin ORDER BY 1, 2, 3, 4"""
_OWN_ANSWERS = """
    SELECT device, task, output, sum(CASE WHEN source = 'model' THEN 1 ELSE 0 END), count(*) FROM labels
    WHERE (CAST(:device AS TEXT) IS NULL OR device = :device) AND (CAST(:task AS TEXT) IS NULL OR task = :task)
    GROUP BY device, task, output ORDER BY 1, 2, 3"""


class Verdict(msgspec.Struct, frozen=True):
    """Opinion of `given_by` on a result; columns as in table verdicts."""

    row: int
    given_by: str
    verdict: str
    label: str
    predicted: str
    alert: str | None
    via: str
    note: str
    given: str


class AlertVerdict(msgspec.Struct, frozen=True):
    given_by: str
    verdict: str
    via: str
    note: str
    given: str


class VerdictCount(msgspec.Struct, frozen=True):
    """Verdicts of one person on a task of a device."""

    device: str
    task: str
    given_by: str
    verdict: str
    n: int
    newest: str


def find_result(db: Connection, device: str, task: str, row: int, log: str | None = None) -> Row | None:
    """Return (log, seq, label, score, value) of a result of a log; None for the newest that has one at this row."""
    return db.execute(_RESULT, {"device": device, "task": task, "row": row, "log": log}).fetchone()  # type: ignore[no-any-return]


def save(db: Connection, key: TaskLog, verdict: Verdict) -> None:
    """Insert or replace the verdict of a person on a result."""
    v = verdict
    values = (v.row, v.given_by, v.verdict, v.label, v.predicted, v.alert, v.via, v.note, v.given)
    db.execute(_SAVE, (*key, *values))


def withdraw(db: Connection, key: TaskLog, row: int, by: str) -> bool:
    """Delete the verdict of a person on a result; return False if there is none."""
    sql = "DELETE FROM verdicts WHERE device = ? AND task = ? AND log = ? AND row = ? AND given_by = ?"
    return db.execute(sql, (*key, row, by)).rowcount > 0


def save_of_alert(db: Connection, key: IncidentKey, verdict: AlertVerdict) -> None:
    v = verdict
    db.execute(_SAVE_OF_ALERT, (*key, v.given_by, v.verdict, v.via, v.note, v.given))


def load_of_alert(db: Connection, key: IncidentKey) -> list[AlertVerdict]:
    sql = """
        SELECT given_by, verdict, via, note, given FROM alert_verdicts
        WHERE source = ? AND device = ? AND log = ? AND id = ? ORDER BY given, given_by"""
    return [AlertVerdict(*row) for row in db.execute(sql, key)]


def load_for_rows(db: Connection, key: TaskLog, rows: Sequence[int]) -> dict[int, list[Verdict]]:
    """Return the verdicts on these results, by row."""
    if not rows:
        return {}
    sql = f"""
        SELECT row, given_by, verdict, label, predicted, alert, via, note, given FROM verdicts
        WHERE device = ? AND task = ? AND log = ? AND row IN ({", ".join("?" * len(rows))}) ORDER BY row, given"""
    verdicts: dict[int, list[Verdict]] = {}
    for values in db.execute(sql, (*key, *rows)):
        verdicts.setdefault(values[0], []).append(Verdict(*values))
    return verdicts


def load_agreed_results(db: Connection, key: TaskLog) -> list[LabelledResult]:
    """Return the results whose verdicts agree, in order of rows; without a bundle if the message was pruned."""
    return [LabelledResult(*row) for row in db.execute(_AGREED_RESULTS, key)]


def count_by_person(db: Connection, device: str | None = None, task: str | None = None) -> list[VerdictCount]:
    values: dict[str, Any] = {"device": device, "task": task}
    return [VerdictCount(*row) for row in db.execute(_COUNTS, values)]


def count_of_alerts(db: Connection) -> list[tuple[str, str, int]]:
    """Return (alert, verdict, count) of verdicts on alerts."""
    return db.execute(_ALERT_COUNTS).fetchall()


def count_disputed(db: Connection, device: str | None = None, task: str | None = None) -> int:
    """Return the number of results about which people disagree."""
    return int(db.execute(_DISPUTED, {"device": device, "task": task}).fetchone()[0])


def compare_with_scores(
    db: Connection, device: str | None = None, task: str | None = None
) -> list[tuple[str, str, str, str, int, int, float]]:
    """Return (device, task, author, labels or verdicts, number, different from the answer, expected wrong)."""
    rows = db.execute(_COMPARED, {"device": device, "task": task})
    return [(*key, int(n), int(different), float(expected)) for *key, n, different, expected in rows]


def count_own_answers(
    db: Connection, device: str | None = None, task: str | None = None
) -> list[tuple[str, str, str, int, int]]:
    """Return (device, task, output, labels that are the model's own answers, labels)."""
    rows = db.execute(_OWN_ANSWERS, {"device": device, "task": task})
    return [(*key, int(own), int(n)) for *key, own, n in rows]
