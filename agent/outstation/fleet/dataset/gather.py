"""Recordings of a retraining set: samples are opened, and joined where they overlap."""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from outstation.fleet.database.datasets import retraining
from outstation.fleet.database.datasets.retraining import Claim, StoredSample
from outstation.fleet.database.datasets.samples import Sample
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.labelling.labelled_results import OutputResult
from outstation.fleet.dataset import joined, sample_labels
from outstation.fleet.dataset.joined import JoinedByInput, JoinedRows
from outstation.fleet.dataset.sample_labels import RowLabel
from outstation.foundation import decoders
from outstation.foundation.arrays import Float64s, Ints
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.foundation.names import is_name
from outstation.ml.datasets.blocks import LABEL_COLUMN, TIME_COLUMN
from outstation.protocol.transport import sample_content
from outstation.protocol.transport.sample_content import SampleContent
from outstation.protocol.transport.sealing import Opener
from outstation.protocol.wire.keys import b64url_decode
from outstation.protocol.wire.messages import JoinedSample
from outstation.protocol.wire.topics import Topic

MAX_VALUES = 40_000_000
# Columns of the data beside the fields.
TEXT_COLUMNS = ("device", "recording", "source")
RESERVED_COLUMNS = frozenset({TIME_COLUMN, LABEL_COLUMN, *TEXT_COLUMNS})


def name_label_column(output: str) -> str:
    """Return the column of labels of an output, as `model evaluate --output` reads it."""
    return f"{LABEL_COLUMN}_{output}" if output else LABEL_COLUMN


class Selection(msgspec.Struct, frozen=True):
    """Choice of what goes into a set. `at`: nothing that arrived later counts; `since`, `until`: time of samples."""

    fleet: str
    task: str
    at: str
    since: str
    until: str
    bundle: str | None = None


class LabelledOutput(msgspec.Struct, frozen=True):
    """Labels of the results of one output, by ascending row, and those results by row."""

    labels: list[RowLabel] = []
    predictions: dict[int, OutputResult] = {}


class Recording(msgspec.Struct):
    """Consecutive rows of one device from number `first` on: `t` (n,) epoch µs, `values` (n, F), and their samples.

    `outputs`: labels by output, "" for the first one. `joined`: rows that its windows were joined with, by input.
    """

    device: str
    log: str
    first: int
    t: Ints
    values: Float64s
    samples: list[dict[str, Any]]
    outputs: dict[str, LabelledOutput] = {}
    joined: JoinedByInput = {}

    def get_output(self, output: str) -> LabelledOutput:
        return self.outputs.get(output) or LabelledOutput()

    @property
    def is_labelled(self) -> bool:
        """True if a result has a label of any output."""
        return any(label.label is not None for output in self.outputs.values() for label in output.labels)

    @property
    def last(self) -> int:
        return self.first + len(self.t) - 1


class Gathered(msgspec.Struct):
    """Recordings with the columns `fields`, and those of `inputs`: the fields of further inputs.

    `left_out` counts samples by reason, `ignored` labels and verdicts.
    """

    fields: list[str]
    recordings: list[Recording] = []
    left_out: Counter[str] = msgspec.field(default_factory=Counter)
    ignored: Counter[str] = msgspec.field(default_factory=Counter)
    joined_rows: int = 0
    inputs: dict[str, list[str]] = {}

    @property
    def outputs(self) -> list[str]:
        """The further outputs that labels are about, sorted."""
        return sorted({name for recording in self.recordings for name in recording.outputs if name})


class _Opened(msgspec.Struct, frozen=True):
    """Readings of a sample; `joined`: stream and rows of each further input."""

    sample: Sample
    received: str
    content: SampleContent
    joined: dict[str, tuple[str, SampleContent]]


class _JoinedMember(msgspec.Struct, frozen=True):
    joined: dict[str, JoinedSample] = {}


def gather(db: Connection, selection: Selection, opener: Opener) -> Gathered:
    """Return what can be read of the selected samples. Raises UsageError if there are too many."""
    result, opened = Gathered([]), list[_Opened]()
    seen: set[bytes] = set()
    values = 0
    for stored in retraining.load_samples(db, selection.task, selection.at, selection.since, selection.until):
        digest = hashlib.sha256(stored.sealed).digest()
        readings = None if digest in seen else _open(selection.fleet, stored, opener, result.left_out)
        if digest in seen:
            # A new log repeats the messages of an old one.
            result.left_out["duplicate"] += 1
        elif selection.bundle is not None and not stored.sample.digest.startswith(selection.bundle):
            result.left_out["other bundle"] += 1
        elif readings is not None:
            opened.append(readings)
            contents = (readings.content, *(content for _, content in readings.joined.values()))
            values += sum(len(content.t) * len(content.fields) for content in contents)
        seen.add(digest)
        if values > MAX_VALUES:
            raise UsageError(f"more than {MAX_VALUES:,} values; narrow the set with --since, --until or --bundle")
    result.fields = _choose_fields(opened)
    result.inputs = joined.choose_fields((each.sample.device, each.joined) for each in opened)
    contexts: dict[tuple[str, str], LogContext] = {}
    known: set[bytes] = set()
    for each in opened:
        sample = each.sample
        if problem := _find_problem(each.content, result.fields, known):
            result.left_out[problem] += 1
            continue
        place = (sample.device, sample.log)
        if place not in contexts:
            # Samples come by log: one at a time is in memory.
            contexts = {place: LogContext(db, *place, selection.task)}
        _add(result, each, contexts[place].describe(sample.seq, selection.at))
    for recording in result.recordings:
        _add_labels(db, recording, selection, result)
    # Newest first: a step back in time ends a window, so that none spans two recordings.
    result.recordings.sort(key=lambda recording: (-int(recording.t[0]), recording.device, recording.log))
    return result


def _open(fleet: str, stored: StoredSample, opener: Opener, left_out: Counter[str]) -> _Opened | None:
    sample = stored.sample
    if not stored.sealed:
        left_out["withheld by the device"] += 1
        return None
    topic = str(Topic(fleet, sample.device, "samples", sample.task))
    try:
        rows = sample.rows_last - sample.rows_first + 1
        content = sample_content.decode(opener.open_content(topic, stored.sealed), rows)
        inputs = {}
        for name, part in decoders.from_json(stored.payload, _JoinedMember).joined.items():
            if not is_name(name):
                raise ValueError("not the name of an input")
            data = opener.open_content(topic, b64url_decode(part.sealed))
            rows_content = sample_content.decode(data, part.n, part.rows)
            if TIME_COLUMN in rows_content.fields:
                raise ValueError("a field has the name of the times")
            inputs[name] = part.stream, rows_content
        return _Opened(sample, stored.received, content, inputs)
    except MessageRefused as refusal:
        left_out[refusal.reason] += 1
        return None
    except (ValueError, msgspec.MsgspecError):
        left_out["malformed content"] += 1
        return None


def _choose_fields(opened: Sequence[_Opened]) -> list[str]:
    """Return the fields that most devices send: one device alone cannot decide what the others' samples are for."""
    devices: dict[tuple[str, ...], list[str]] = {}
    for each in opened:
        devices.setdefault(tuple(each.content.fields), []).append(each.sample.device)
    usable = (fields for fields in devices if RESERVED_COLUMNS.isdisjoint(fields))
    return [*max(usable, key=lambda fields: (len({*devices[fields]}), len(devices[fields]), fields), default=())]


def _find_problem(content: SampleContent, fields: Sequence[str], readings: set[bytes]) -> str:
    """Return why a sample stays out; "" and note its readings if it does not."""
    if set(content.fields).isdisjoint(fields):
        return "other fields"
    digest = hashlib.sha256(msgspec.json.encode(content.fields))
    for values in (content.t, *content.columns):
        digest.update(values.tobytes())
    if digest.digest() in readings:
        return "same readings again"
    readings.add(digest.digest())
    return ""


def _add(result: Gathered, opened: _Opened, context: dict[str, Any]) -> None:
    """Append a sample to the recordings, or the rows that are new to the last recording of its log."""
    sample, content = opened.sample, opened.content
    sent, unknown = dict(zip(content.fields, content.columns, strict=True)), np.full(len(content.t), np.nan)
    # A device may keep some of the fields.
    values, t = np.stack([sent.get(name, unknown) for name in result.fields], axis=1), content.t
    member = _describe(opened, context)
    inputs = _align_joined(result, opened)
    last = result.recordings[-1] if result.recordings else None
    if last is not None and _continues(last, sample, t) and not joined.contradict(last.joined, inputs):
        overlap = last.last - sample.rows_first + 1
        result.joined_rows += min(overlap, len(t))
        last.t = np.concatenate([last.t, t[overlap:]])
        last.values = np.concatenate([last.values, values[overlap:]])
        last.samples.append(member)
        last.joined = joined.merge(last.joined, inputs)
        return
    if last is not None and (last.device, last.log) == (sample.device, sample.log) and sample.rows_first <= last.last:
        result.left_out["contradicts another sample"] += 1
        return
    recording = Recording(sample.device, sample.log, sample.rows_first, t, values, [member], joined=inputs)
    result.recordings.append(recording)


def _align_joined(result: Gathered, opened: _Opened) -> JoinedByInput:
    """Return the sample's rows of further inputs, with the columns of the set."""
    content, sample = opened.content, opened.sample
    result_us = int(content.t[sample.row - sample.rows_first])
    return {
        name: JoinedRows.from_content(stream, rows, result.inputs[name], result_us)
        for name, (stream, rows) in opened.joined.items()
    }


def _continues(last: Recording, sample: Sample, t: Ints) -> bool:
    """Return True if a sample overlaps or follows a recording of its log and bundle, with the same times."""
    same = (last.device, last.log, last.samples[-1]["digest"]) == (sample.device, sample.log, sample.digest)
    if not same or sample.rows_first > last.last + 1:
        return False
    overlap = last.last - sample.rows_first + 1
    known = last.t[sample.rows_first - last.first :][: len(t)]
    return bool(np.array_equal(known, t[:overlap]))


def _describe(opened: _Opened, context: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance of a sample."""
    sample = opened.sample
    return {
        "message": {"device": sample.device, "log": sample.log, "seq": sample.seq},
        "time": sample.time,
        "received": opened.received,
        "stream": sample.stream,
        "rows": [sample.rows_first, sample.rows_last],
        "joined": {name: _describe_joined(*joined_rows) for name, joined_rows in opened.joined.items()},
        "row": sample.row,
        "reason": sample.reason,
        "subject": sample.subject,
        "model": f"{sample.model} {sample.version}",
        "digest": sample.digest,
        "digits": sample.digits,
        "consent": opened.content.consent,
        **context,
    }


def _describe_joined(stream: str, rows: SampleContent) -> dict[str, Any]:
    assert rows.numbers is not None
    return {"stream": stream, "rows": [int(rows.numbers[0]), int(rows.numbers[-1])], "n": len(rows.t)}


def _add_labels(db: Connection, recording: Recording, selection: Selection, result: Gathered) -> None:
    key = (recording.device, selection.task, recording.log)
    given, verdicts = retraining.load_claims(db, key, recording.first, recording.last)
    claims: list[Claim] = []
    for noun, group in (("labels", given), ("verdicts", verdicts)):
        known = [claim for claim in group if claim.at <= selection.at]
        result.ignored[f"{noun} given later"] += len(group) - len(known)
        claims += known
    for output in sorted({"", *(claim.output for claim in claims)}):
        decided = sample_labels.decide([claim for claim in claims if claim.output == output])
        predictions = retraining.load_predictions(db, key, recording.first, recording.last, output)
        recording.outputs[output] = LabelledOutput(decided, predictions)


class LogContext:
    """Drift windows and alerts of a task in one log of a device, as they were before any of its messages."""

    def __init__(self, db: Connection, device: str, log: str, task: str) -> None:
        self._windows = retraining.load_drift(db, device, log, task)
        self._alerts = retraining.load_alerts(db, device, log, task)
        self._verdicts: dict[str, list[dict[str, str]]] = {}
        for identity, verdict, by, at in retraining.load_alert_verdicts(db, device, log):
            self._verdicts.setdefault(identity, []).append({"verdict": verdict, "by": by, "at": at})
        self._read, self._seq = 0, 0
        self._open: dict[str, dict[str, Any]] = {}

    def describe(self, seq: int, at: str) -> dict[str, Any]:
        """Return drift and open alerts before message `seq`, with verdicts on them given by the time `at`."""
        if seq < self._seq:
            self._read, self._open = 0, {}
        self._seq = seq
        while self._read < len(self._alerts) and self._alerts[self._read][0] < seq:
            _, identity, alert, subject, state = self._alerts[self._read]
            self._read += 1
            if state == "raised":
                self._open[identity] = {"id": identity, "alert": alert, "subject": subject}
            else:
                self._open.pop(identity, None)
        last = bisect.bisect_left(self._windows, seq, key=lambda window: window.seq)
        window = self._windows[last - 1] if last else None
        drift = None if window is None else {"state": window.state, "window": window.window, "to": window.to}
        return {"drift": drift, "open_alerts": [self._with_verdicts(alert, at) for alert in self._open.values()]}

    def _with_verdicts(self, alert: dict[str, Any], at: str) -> dict[str, Any]:
        given = [verdict for verdict in self._verdicts.get(alert["id"], ()) if verdict["at"] <= at]
        return {**alert, "verdicts": given} if given else alert
