"""Audit: verify every stored message again, from the evidence alone.

For each device and log, in one pass and in constant memory:
- each payload and token verify with a key of that device, also a revoked one; a replaced key up to its last seq
- columns device, log, seq and kind match the signed payload; the topic is part of the signature
- seqs from 1 to the last are complete, except ranges that a signed audit message declares as evicted, or as the end of
  the log
- each `prev` is the digest of the message before it, unless that one is missing
- results cover each row once, for each task and stream up to the cursors in `health`, except rows that a signed audit
  message declares as evicted
- every table that follows from the messages is as they give it (see `audit.stored_rows` and `audit.replay`)
- each decision about a rollout is signed by an operator and follows the one before (see `audit.rollouts`)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec

from agent import clock
from agent.errors import MessageRefused
from agent.fleet.audit import rollouts
from agent.fleet.audit.coverage import RowCoverage
from agent.fleet.audit.replay import Replay
from agent.fleet.audit.stored_rows import MessageKey, StoredTables
from agent.fleet.database.gap_ledger import NEW_LOG, parse_evictions, parse_log_end
from agent.fleet.database.keyring import Keyring
from agent.fleet.database.projection import TableRows, project_message
from agent.fleet.database.store import Devices, FleetStore
from agent.fleet.workers import run_over_devices
from agent.wire.keys import PublicKey
from agent.wire.log_chain import digest
from agent.wire.messages import (
    AuditPayload,
    HealthPayload,
    LoggedPayload,
    Payload,
    ResultsPayload,
    VerifiedMessage,
    verify_message,
)

# Listed problems; all are counted. A database that was rewritten entirely must not fill the memory.
MAX_INVALID = 10_000


class AuditReport(msgspec.Struct):
    devices: int = 0
    messages: int = 0
    gaps: list[dict[str, Any]] = msgspec.field(default_factory=list)
    duplicates: int = 0
    invalid: list[dict[str, Any]] = msgspec.field(default_factory=list)
    invalid_count: int = 0
    coverage: list[dict[str, Any]] = msgspec.field(default_factory=list)
    evicted: list[dict[str, Any]] = msgspec.field(default_factory=list)
    decisions: int = 0
    invalid_decisions: list[dict[str, Any]] = msgspec.field(default_factory=list)

    @property
    def passed(self) -> bool:
        undeclared = any(not gap["declared"] for gap in self.gaps)
        return not (self.duplicates or self.invalid_count or undeclared or self.invalid_decisions)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `fleet audit --json`."""
        return {"passed": self.passed, **msgspec.structs.asdict(self)}

    def merge(self, other: AuditReport) -> None:
        """Add the report of other devices."""
        self.devices += other.devices
        self.messages += other.messages
        self.duplicates += other.duplicates
        self.invalid_count += other.invalid_count
        self.gaps += other.gaps
        self.coverage += other.coverage
        self.evicted += other.evicted
        self.invalid = [*self.invalid, *other.invalid][:MAX_INVALID]

    def add_invalid(self, key: MessageKey, reason: str) -> None:
        self.invalid_count += 1
        if len(self.invalid) < MAX_INVALID:
            device, log, seq = map(rollouts.to_json_value, key)
            self.invalid.append({"device": device, "log": log, "seq": seq, "reason": reason})


def audit(
    store: FleetStore,
    device: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
    operators: Sequence[PublicKey] = (),
    processes: int = 1,
) -> AuditReport:
    """Verify all messages, or those of one device; call `progress` after each hundred. Raises StorageError.

    `operators`: keys with which decisions about rollouts are valid; decisions are not checked for one device. With
    several `processes` each range of devices is audited in a snapshot of its own.
    """
    if device is not None:
        return _audit_devices(store, device, progress)
    report = AuditReport()
    for part in run_over_devices(store, _audit_devices, processes, progress):
        report.merge(part)
    with store.snapshot() as db:
        decisions = rollouts.audit_rollouts(db, operators)
    report.decisions, report.invalid_decisions = decisions.decision_count, decisions.invalid
    return report


def _audit_devices(store: FleetStore, devices: Devices, progress: Callable[[int], None]) -> AuditReport:
    report = AuditReport()
    with store.snapshot(), contextlib.closing(Replay()) as replay:
        keyring = Keyring(store)
        # (device, log) → last seq of each log that a signed message of a later log declares ended.
        ends: dict[tuple[Any, str], int] = {}
        for name, topic, payload, jws in store.audit_messages(devices, f'"{NEW_LOG}"'.encode()):
            with contextlib.suppress(MessageRefused, TypeError, AttributeError):
                body = verify_message(topic, payload, (jws,), keyring.find_stored).body
                if body.device == name and (end := parse_log_end(body)):
                    ends[name, end[0]] = max(end[1], ends.get((name, end[0]), 0))
        last_seqs = {(name, log): last for name, log, last in store.logs(devices)}
        tables = StoredTables(store, devices, report.add_invalid)
        parts = _AuditParts(keyring, tables, replay, report)
        names = {name for name, _ in last_seqs}
        for (name, log), rows in groupby(store.evidence(devices), key=lambda row: row[:2]):
            auditor = _LogAuditor(name, log, parts)
            for row in rows:
                auditor.check_message(*row[2:])
                report.messages += 1
                if report.messages % 100 == 0:
                    progress(100)
            auditor.finish(last_seqs.pop((name, log), 0), ends.get((name, log), 0))
            names.add(name)
        for (name, log), last in last_seqs.items():
            _LogAuditor(name, log, parts).finish(last, ends.get((name, log), 0))
        tables.finish()
        broken = {gap["device"] for gap in report.gaps if not gap["declared"]} | parts.broken
        for key, reason in replay.compare(store, devices, broken):
            report.add_invalid(key, reason)
        report.devices = len(names)
    return report


class _AuditParts(msgspec.Struct):
    """State that the audits of all logs share. `broken`: devices with a message that does not verify."""

    keyring: Keyring
    tables: StoredTables
    replay: Replay
    report: AuditReport
    broken: set[Any] = msgspec.field(default_factory=set)


class _LogAuditor:
    """Audits one log, message by message in order of seq."""

    def __init__(self, device: Any, log: Any, parts: _AuditParts) -> None:
        self._device, self._log, self._parts = device, log, parts
        self._report = parts.report
        self._coverage = RowCoverage()
        self._last_seq = 0
        self._last_digest: str | None = ""
        self._missing: list[tuple[int, int]] = []
        self._declared: list[tuple[int, int]] = []

    def check_message(self, seq: Any, kind: Any, topic: Any, payload: Any, jws: Any, received: Any) -> None:
        key = (self._device, self._log, seq)
        message = self._check_evidence(key, kind, topic, payload, jws)
        if message is not None and not _is_time(received):
            self._report.add_invalid(key, f"received {received!r} is not a time")
            message = None
        body = None if message is None else message.body
        if message is None or not isinstance(body, LoggedPayload):
            self._parts.broken.add(self._device)
            self._parts.tables.check(key, None)
            return
        expected: TableRows = {}
        project_message(message, expected)
        self._parts.tables.check(key, expected)
        self._parts.replay.add(body, received)
        for problem in self._check_coverage(body):
            self._report.add_invalid(key, problem)

    def _check_evidence(self, key: MessageKey, kind: Any, topic: Any, payload: Any, jws: Any) -> VerifiedMessage | None:
        """Return the message if it verifies, is stored as signed and follows the one before it."""
        seq = key[2]
        if type(seq) is not int or seq < 1:
            self._report.add_invalid(key, f"seq {seq!r} is not a sequence number")
            return None
        if seq == self._last_seq:
            self._report.duplicates += 1
            self._report.add_invalid(key, "is stored twice")
        elif seq > self._last_seq + 1:
            self._missing.append((self._last_seq + 1, seq - 1))
            self._coverage.mark_unreadable(seq)
            self._last_digest = None
        self._last_seq = seq
        data = payload.encode(errors="surrogateescape") if isinstance(payload, str) else payload
        problem, message = self._verify_signature(topic, data, jws)
        body = None if message is None else message.body
        problem = problem or self._compare_columns(body, seq, kind)
        if not problem and isinstance(body, LoggedPayload) and self._last_digest not in (None, body.prev):
            problem = "does not follow the message before it: prev is not that message's digest"
        if problem or message is None or not isinstance(body, LoggedPayload):
            self._report.add_invalid(key, problem or "has a kind that is never stored")
            self._coverage.mark_unreadable(seq)
            self._last_digest = None
            return None
        self._last_digest = digest(data)
        self._declared += parse_evictions(body)
        if parse_log_end(body):
            # Results of earlier rows may be in the old log.
            self._coverage.mark_unreadable(seq)
        return message

    def finish(self, last_seq: int, end: int) -> None:
        """Finish the log: `last_seq` is the highest that ever arrived; gaps up to `end` are declared by a later log."""
        if end:
            self._declared.append((1, end))
        if last_seq > self._last_seq:
            self._missing.append((self._last_seq + 1, last_seq))
        for first, last, declared in split_by_declaration(self._missing, self._declared):
            gap = {"device": self._device, "log": self._log, "from": first, "to": last, "declared": declared}
            self._report.gaps.append(gap)
        self._report.duplicates += self._coverage.duplicates
        self._report.evicted += [{"device": self._device, "log": self._log, **rows} for rows in self._coverage.evicted]
        for (task, stream), track in self._coverage.tracks.items():
            rows = {"first": track.first, "last": track.last, "messages": track.messages, "results": track.results}
            place = {"device": self._device, "log": self._log, "task": task, "stream": stream}
            self._report.coverage.append({**place, **rows})

    def _verify_signature(self, topic: Any, payload: Any, jws: Any) -> tuple[str | None, VerifiedMessage | None]:
        if not (isinstance(topic, str) and isinstance(payload, bytes) and isinstance(jws, str)):
            return "topic, payload or jws is not stored as text and bytes", None
        try:
            message = verify_message(topic, payload, (jws,), self._parts.keyring.find_stored)
            self._parts.keyring.require_in_bounds(message, stored=True)
            return None, message
        except MessageRefused as refused:
            return f"does not verify: {refused}", None

    def _compare_columns(self, body: object, seq: int, kind: Any) -> str | None:
        stored = {"device": self._device, "log": self._log, "seq": seq}
        for name, value in stored.items():
            signed = getattr(body, name, None)
            if signed != value:
                return f"is stored with {name} {value!r}, but the signed payload says {signed!r}"
        signed_kind = body.__struct_config__.tag if isinstance(body, Payload) else None
        return None if kind == signed_kind else f"is stored as kind {kind!r}, but the signed payload is {signed_kind!r}"

    def _check_coverage(self, body: LoggedPayload) -> Iterator[str]:
        if isinstance(body, ResultsPayload) and (problem := self._coverage.check_results(body)):
            yield problem
        if isinstance(body, AuditPayload):
            self._coverage.add_evictions(body)
        if isinstance(body, HealthPayload):
            yield from self._coverage.check_health(body)


def _is_time(text: Any) -> bool:
    try:
        clock.parse_rfc3339(text)
    except (TypeError, ValueError):
        return False
    return True


def split_by_declaration(
    missing: list[tuple[int, int]], declared: list[tuple[int, int]]
) -> list[tuple[int, int, bool]]:
    """Split missing ranges (ascending) into declared and undeclared ones."""
    parts: list[tuple[int, int, bool]] = []
    cover = iter(sorted(declared))
    now = next(cover, None)
    for first, last in missing:
        while first <= last:
            while now is not None and now[1] < first:
                now = next(cover, None)
            inside = now is not None and now[0] <= first
            end = last if now is None or now[0] > last else (now[1] if inside else now[0] - 1)
            parts.append((first, min(end, last), inside))
            first = min(end, last) + 1
    return parts
