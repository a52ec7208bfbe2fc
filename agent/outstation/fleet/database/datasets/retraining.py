"""Queries of a retraining set: samples known at a time, with labels, verdicts, drift windows and alerts."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from outstation.fleet.database.datasets.samples import COLUMNS, Sample
from outstation.fleet.database.interface import Connection, Row
from outstation.fleet.database.labelling.labelled_results import OutputResult, TaskLog

_SAMPLES = f"""
    SELECT {COLUMNS}, m.received, s.sealed, m.payload FROM samples s
    JOIN messages m ON m.device = s.device AND m.log = s.log AND m.seq = s.seq
    WHERE s.task = ? AND m.received <= ? AND s.time >= ? AND s.time <= ?
    ORDER BY s.device, s.log, s.rows_first, s.seq"""
_LABELS = """
    SELECT row, label, source, given_by, received, output FROM labels
    WHERE device = ? AND task = ? AND log = ? AND row BETWEEN ? AND ? ORDER BY row"""
_VERDICTS = """
    SELECT row, label, verdict, given_by, given FROM verdicts
    WHERE device = ? AND task = ? AND log = ? AND row BETWEEN ? AND ? ORDER BY row, given_by"""
_PREDICTIONS = """
    SELECT row, label, score, value FROM results
    WHERE device = ? AND task = ? AND log = ? AND row BETWEEN ? AND ? ORDER BY row"""
_FURTHER_PREDICTIONS = """
    SELECT r.row, d.outputs FROM results r
    JOIN result_details d ON d.device = r.device AND d.log = r.log AND d.seq = r.seq AND d.row = r.row
    WHERE r.device = ? AND r.task = ? AND r.log = ? AND r.row BETWEEN ? AND ? ORDER BY r.row"""
_DRIFT = """
    SELECT seq, "window" + window_count - 1, state, "to" FROM drift_windows
    WHERE device = ? AND log = ? AND task = ? ORDER BY seq"""
_ALERTS = """
    SELECT seq, id, alert, subject, state FROM alerts
    WHERE device = ? AND log = ? AND (task = ? OR task IS NULL) AND source = 'device' ORDER BY seq, revision"""
_ALERT_VERDICTS = """
    SELECT id, verdict, given_by, given FROM alert_verdicts
    WHERE source = 'device' AND device = ? AND log = ? ORDER BY id, given_by"""


class StoredSample(msgspec.Struct, frozen=True):
    """A sample with its sealed readings, the time of its arrival, and the payload of its message."""

    sample: Sample
    received: str
    sealed: bytes
    payload: bytes


class Claim(msgspec.Struct, frozen=True):
    """Label or verdict. `source`: human, model or system of a label; confirmed or corrected of a verdict.

    `output`: the further output that a label is about, "" for the first one.
    """

    row: int
    text: str
    source: str
    by: str
    at: str
    output: str = ""


class DriftContext(msgspec.Struct, frozen=True):
    """The last drift window before message `seq` closed it."""

    seq: int
    window: int
    state: str
    to: str


def load_samples(db: Connection, task: str, at: str, since: str, until: str) -> Iterator[StoredSample]:
    """Return the task's samples that had arrived `at` a time, by device, log and rows."""
    for row in db.execute(_SAMPLES, (task, at, since, until)):
        yield StoredSample(Sample(*row[:-3]), row[-3], bytes(row[-2]), bytes(row[-1]))


def load_claims(db: Connection, key: TaskLog, first: int, last: int) -> tuple[list[Claim], list[Claim]]:
    """Return labels and verdicts of the results at rows `first` to `last`."""
    labels, verdicts = (db.execute(sql, (*key, first, last)).fetchall() for sql in (_LABELS, _VERDICTS))
    return [Claim(*row) for row in labels], [Claim(*row) for row in verdicts]


def load_predictions(db: Connection, key: TaskLog, first: int, last: int, output: str = "") -> dict[int, OutputResult]:
    """Return row → result of an output at rows `first` to `last`."""
    if not output:
        return {row: OutputResult(*result) for row, *result in db.execute(_PREDICTIONS, (*key, first, last))}
    rows = db.execute(_FURTHER_PREDICTIONS, (*key, first, last))
    return {row: OutputResult.of_further(outputs, output) for row, outputs in rows}


def load_drift(db: Connection, device: str, log: str, task: str) -> list[DriftContext]:
    return [DriftContext(*row) for row in db.execute(_DRIFT, (device, log, task))]


def load_alerts(db: Connection, device: str, log: str, task: str) -> list[Row]:
    """Return (seq, id, alert, subject, state) of each alert message about the task or the device, in order."""
    return db.execute(_ALERTS, (device, log, task)).fetchall()


def load_alert_verdicts(db: Connection, device: str, log: str) -> list[Row]:
    """Return (id, verdict, by, at) of each verdict on an alert of a log."""
    return db.execute(_ALERT_VERDICTS, (device, log)).fetchall()
