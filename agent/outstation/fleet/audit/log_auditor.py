"""Audit of one log, message by message in order of seq."""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Iterator
from typing import Any

import msgspec

from outstation.fleet.audit.audit_report import AuditReport
from outstation.fleet.audit.checkpoint import LogState
from outstation.fleet.audit.coverage import RowCoverage
from outstation.fleet.audit.pruned import LogBase
from outstation.fleet.audit.replay import Replay
from outstation.fleet.audit.stored_rows import MessageKey, StoredTables, is_time
from outstation.fleet.database.gap_ledger import parse_evictions, parse_log_end
from outstation.fleet.database.interface import Row
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.projection import TableRows, project_message
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire.log_chain import digest
from outstation.protocol.wire.messages import AuditPayload, HealthPayload, LoggedPayload, Payload, ResultsPayload
from outstation.protocol.wire.verification import VerifiedMessage, verify_message


class AuditParts(msgspec.Struct):
    """Parts that the audits of one device's logs share.

    `broken`: devices with a message that does not verify; `key_rows`: of the device, where states are made.
    """

    keyring: Keyring
    replay: Replay
    report: AuditReport
    broken: set[Any]
    key_rows: bytes | None


class LogAuditor:
    """Audits one log, message by message in order of seq, from a state on, or behind what was pruned.

    `is_unchanged`: the device's keys and the rows of the messages up to the state are those of the audit that made it.
    """

    def __init__(
        self, name: Row, state: LogState, base: LogBase | None, tables: StoredTables, parts: AuditParts
    ) -> None:
        self.name, self._tables, self._parts = name, tables, parts
        self._device, self._log = name
        self.report = parts.report
        self._base = base or LogBase()
        self._state, self.is_unchanged = state, not state.last_seq
        state = state if state.last_seq else self._base.state
        self._coverage = RowCoverage(state.coverage)
        self._stored = None if parts.key_rows is None else hashlib.blake2b(parts.key_rows, digest_size=32)
        self._last_seq, self._last_digest = state.last_seq, state.last_digest
        self._missing, self._declared = [*state.missing], [*state.declared]

    @property
    def last_seq(self) -> int:
        return self._last_seq

    def to_state(self) -> LogState:
        return LogState(
            *(self._last_seq, self._stored_digest(), self._last_digest, [*self._missing], [*self._declared]),
            self._coverage.to_state(),
        )

    def _stored_digest(self) -> str:
        return "" if self._stored is None else self._stored.hexdigest()

    def check_message(self, seq: Any, kind: Any, topic: Any, payload: Any, jws: Any, received: Any) -> None:
        key = (self._device, self._log, seq)
        stored = self._tables.read(key)
        if type(seq) is int and seq <= self._base.state.last_seq:
            self.report.add_invalid(key, f"is stored, but messages up to seq {self._base.state.last_seq} were pruned")
            return
        if self._stored is not None:
            self._stored.update(to_bytes((seq, kind, topic, payload, jws, received, stored)))
        if type(seq) is int and seq <= self._state.last_seq and not self.is_unchanged:
            # Verified by an earlier audit, if the digest of all of them is the same.
            self.is_unchanged = seq == self._state.last_seq and self._stored_digest() == self._state.stored_digest
            return
        message = self._check_evidence(key, kind, topic, payload, jws)
        if message is not None and not is_time(received):
            self.report.add_invalid(key, f"received {received!r} is not a time")
            message = None
        body = None if message is None else message.body
        if message is None or not isinstance(body, LoggedPayload):
            self._parts.broken.add(self._device)
            return
        expected: TableRows = {}
        project_message(message, expected)
        for table, through in self._base.floors.items():
            if seq <= through and table not in stored:
                expected.pop(table, None)
        for problem in self._tables.compare(stored, expected):
            self.report.add_invalid(key, problem)
        self._parts.replay.add(body, received)
        for problem in self._check_coverage(body):
            self.report.add_invalid(key, problem)

    def _check_evidence(self, key: MessageKey, kind: Any, topic: Any, payload: Any, jws: Any) -> VerifiedMessage | None:
        """Return the message if it verifies, is stored as signed and follows the one before it."""
        seq = key[2]
        if type(seq) is not int or seq < 1:
            self.report.add_invalid(key, f"seq {seq!r} is not a sequence number")
            return None
        if seq == self._last_seq:
            self.report.duplicates += 1
            self.report.add_invalid(key, "is stored twice")
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
            self.report.add_invalid(key, problem or "has a kind that is never stored")
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
            self.report.gaps.append(gap)
        self.report.duplicates += self._coverage.duplicates
        self.report.evicted += [{"device": self._device, "log": self._log, **rows} for rows in self._coverage.evicted]
        place = {"device": self._device, "log": self._log}
        self.report.replaced_secrets += [{**place, **secret} for secret in self._coverage.secrets]
        for (task, stream), track in self._coverage.tracks.items():
            rows = {"first": track.first, "last": track.last, "messages": track.messages, "results": track.results}
            names = {"task": task, "stream": stream}
            members = ("stream", "first", "last", "messages", "unproven")
            joined = {name: {each: getattr(rows, each) for each in members} for name, rows in track.joined.items()}
            self.report.coverage.append({**place, **names, **rows, "joined": joined})

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
        if isinstance(body, ResultsPayload):
            yield from self._coverage.check_results(body)
        if isinstance(body, AuditPayload):
            self._coverage.add_evictions(body)
            self._coverage.end_secret(body)
        if isinstance(body, HealthPayload):
            yield from self._coverage.check_health(body)


def to_bytes(rows: Row) -> bytes:
    """Encode rows of any values for a digest. No encoding is the beginning of another."""
    try:
        # Version 2 depends on the values alone; any text can be written.
        return marshal.dumps(rows, 2)
    except ValueError:
        return marshal.dumps(repr(rows).encode(errors="backslashreplace"), 2)


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
