"""Verdicts of people on results and alerts that they saw.

A verdict is a label whose author saw the prediction first, and who chose which results to look at. So it never counts
as ground truth: its metrics have a source of their own, and no roll-out, alert or device acts on it. People who
disagree about a result leave its label open. A verdict is on the model's first output, which pages and alerts show.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Literal

import msgspec

from outstation.fleet.bundle_history import BundleLabelSchema, BundleRef, resolve_label_schema
from outstation.fleet.database.dashboard import messages
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.labelling import labelled_results as label_tables
from outstation.fleet.database.labelling import verdicts as table
from outstation.fleet.database.labelling.labelled_results import TaskLog
from outstation.fleet.database.labelling.verdicts import AlertVerdict, Verdict
from outstation.fleet.incidents.incidents import check_note
from outstation.fleet.labelling.given_labels import compute_label_metrics, metric_rows
from outstation.foundation import decoders
from outstation.foundation.errors import UsageError
from outstation.ml.performance.estimates import MetricEstimate
from outstation.ml.performance.labels import MAX_LABEL
from outstation.protocol.alerts.incident import Incident

SOURCE = "verdicts"
CONFIRMED, CORRECTED, FALSE_ALARM = "confirmed", "corrected", "false_alarm"


class Judge(msgspec.Struct, frozen=True):
    """Author of a verdict, the way it came by, and its time (RFC 3339)."""

    by: str
    via: Literal["dashboard", "cli", "homeassistant"]
    now: str
    note: str = ""


class Judgement(msgspec.Struct, frozen=True):
    """A stored verdict on a result."""

    device: str
    task: str
    log: str
    row: int
    verdict: str
    label: str
    predicted: str


class _AlertEvidence(msgspec.Struct):
    row: int


class _AlertBody(msgspec.Struct):
    evidence: _AlertEvidence


def judge_result(
    db: Connection,
    device: str,
    task: str,
    row: int,
    text: str | None,
    judge: Judge,
    alert: str | None = None,
    log: str | None = None,
) -> Judgement:
    """Store the true label of a result, None to confirm the predicted one; recompute the metrics of verdicts.

    Without a log, the result is of the newest one that has this row. Raises UsageError.
    """
    check_note(judge.by, judge.note)
    db.lock_devices([device])
    result = table.find_result(db, device, task, row, log)
    if result is None:
        raise UsageError(f"the collector has no result of task {task!r} of {device} at row {row}")
    log, seq, predicted, _, value = result
    key = (device, task, log)
    if text is None and predicted is None:
        raise UsageError(f"row {row} is a number; a verdict needs the true one, as nobody can confirm all its digits")
    label = predicted if text is None else text
    _check_label(db, key, seq, label)
    shown = str(value) if predicted is None else predicted
    verdict = CONFIRMED if label == predicted else CORRECTED
    table.save(db, key, Verdict(row, judge.by, verdict, label, shown, alert, judge.via, judge.note, judge.now))
    _replace_metrics(db, key, judge.now)
    return Judgement(device, task, log, row, verdict, label, shown)


def withdraw(db: Connection, device: str, task: str, row: int, judge: Judge, log: str | None = None) -> None:
    """Delete the verdict of `judge` on a result. Raises UsageError if there is none."""
    db.lock_devices([device])
    result = table.find_result(db, device, task, row, log)
    if result is None or not table.withdraw(db, (device, task, result[0]), row, judge.by):
        raise UsageError(f"{judge.by} gave no verdict on row {row} of task {task!r} of {device}")
    _replace_metrics(db, (device, task, result[0]), judge.now)


def judge_alert(db: Connection, incident: Incident, *, is_right: bool, text: str | None, judge: Judge) -> str:
    """Store whether an alert was right; return a sentence.

    An alert about a result also gives that result its label: what it says if the alert is right, else `text`. Raises
    UsageError.
    """
    check_note(judge.by, judge.note)
    row = alert_row(db, incident)
    if text is not None and row is None:
        raise UsageError(f"alert {incident.ref} is about no single result; a label needs one")
    opinion = CONFIRMED if is_right else FALSE_ALARM
    table.save_of_alert(db, incident.key, AlertVerdict(judge.by, opinion, judge.via, judge.note, judge.now))
    sentence = f"alert {incident.ref} is {'confirmed' if is_right else 'a false alarm'}"
    if row is None or incident.task is None or (text is None and not is_right):
        return sentence
    result = table.find_result(db, incident.device, incident.task, row, incident.log)
    if result is None or (text is None and result[2] is None):
        return sentence
    judged = judge_result(db, incident.device, incident.task, row, text, judge, incident.id, incident.log)
    return f"{sentence}; row {row} is {judged.label}"


def alert_row(db: Connection, incident: Incident) -> int | None:
    """Return the row of the result that an alert is about; None for an alert about no single one."""
    if incident.source != "device" or incident.task is None:
        return None
    payload = messages.load_payload(db, incident.device, incident.log, incident.raised_seq)
    try:
        return decoders.from_json(payload or b"", _AlertBody).evidence.row
    except msgspec.MsgspecError:
        return None


def load_schema(db: Connection, key: TaskLog, seq: int) -> tuple[BundleRef, BundleLabelSchema] | None:
    """Return the bundle of a results message and the labels that it knows; None if the message is gone."""
    bundle = label_tables.load_bundle(db, key, seq)
    if bundle is None:
        return None
    ref = BundleRef(*bundle)
    schema = resolve_label_schema(db, key, ref.digest, [])
    return None if schema is None else (ref, schema)


def _check_label(db: Connection, key: TaskLog, seq: int, text: str) -> None:
    if not 0 < len(text) <= MAX_LABEL or not text.isprintable():
        raise UsageError(f"a label has 1 to {MAX_LABEL} characters that can be printed")
    known = load_schema(db, key, seq)
    if known is None:
        raise UsageError("the message of this result was pruned, so nobody can tell which labels its bundle knows")
    try:
        known[1].label_schema.parse(text)
    except ValueError as problem:
        raise UsageError(f"{text[:40]!r}: {problem}") from None


def _replace_metrics(db: Connection, key: TaskLog, now: str) -> None:
    """Compute the metrics of the newest bundle with results that verdicts agree on."""
    device, task, log = key
    rows, metrics = table.load_agreed_results(db, key), list[MetricEstimate]()
    digest = max(rows, key=attrgetter("seq")).bundle if rows else None
    if digest is not None:
        schema = resolve_label_schema(db, key, digest, [])
        of_bundle = [result for result in rows if result.bundle == digest]
        metrics = [] if schema is None else compute_label_metrics(schema, of_bundle)
    label_tables.replace_metrics(db, device, task, SOURCE, metric_rows(metrics, device, task, log, now, SOURCE))


def summarize(db: Connection, device: str | None = None, task: str | None = None) -> dict[str, Any]:
    """Return numbers of verdicts by person and task, of results that people disagree about, and of alerts."""
    counts = table.count_by_person(db, device, task)
    return {
        "people": [msgspec.to_builtins(count) for count in counts],
        "disputed": table.count_disputed(db, device, task),
        "alerts": [{"alert": alert, "verdict": opinion, "n": n} for alert, opinion, n in table.count_of_alerts(db)],
    }
