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
- what `fleet prune` removed is signed by a collector, and what stays follows it (see `audit.pruned`)
- each decision about a rollout is signed by an operator and follows the one before (see `audit.rollouts`)
"""

from __future__ import annotations

import contextlib
import hashlib
import marshal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec

from agent import clock, durable_files
from agent.errors import MessageRefused
from agent.fleet.audit import pruned as pruned_devices
from agent.fleet.audit import rollouts
from agent.fleet.audit.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    LogState,
    copy_database,
    load_states,
    save_states,
)
from agent.fleet.audit.coverage import RowCoverage
from agent.fleet.audit.pruned import LogBase, PrunedDevice
from agent.fleet.audit.replay import Replay, keep_devices
from agent.fleet.audit.stored_rows import MessageKey, StoredTables, is_time, sort_key
from agent.fleet.database.gap_ledger import NEW_LOG, parse_evictions, parse_log_end
from agent.fleet.database.interface import Row
from agent.fleet.database.keyring import Keyring
from agent.fleet.database.projection import TableRows, project_message
from agent.fleet.database.store import DeviceRange, Devices, FleetStore
from agent.fleet.workers.device_ranges import run_over_devices, split_devices
from agent.wire.keys import PublicKey, SigningKey
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
    invalid_devices: set[Any] = msgspec.field(default_factory=set)
    coverage: list[dict[str, Any]] = msgspec.field(default_factory=list)
    evicted: list[dict[str, Any]] = msgspec.field(default_factory=list)
    pruned: list[dict[str, Any]] = msgspec.field(default_factory=list)
    decisions: int = 0
    invalid_decisions: list[dict[str, Any]] = msgspec.field(default_factory=list)

    @property
    def passed(self) -> bool:
        undeclared = any(not gap["declared"] for gap in self.gaps)
        return not (self.duplicates or self.invalid_count or undeclared or self.invalid_decisions)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `fleet audit --json`."""
        document = msgspec.structs.asdict(self)
        del document["invalid_devices"]
        for member in ("gaps", "coverage", "evicted", "pruned"):
            document[member] = [
                {**entry, **{name: rollouts.to_json_value(entry[name]) for name in ("device", "log")}}
                for entry in document[member]
            ]
        return {"passed": self.passed, **document}

    def merge(self, other: AuditReport) -> None:
        """Add the report of other devices."""
        self.devices += other.devices
        self.messages += other.messages
        self.duplicates += other.duplicates
        self.invalid_count += other.invalid_count
        self.invalid_devices |= other.invalid_devices
        self.gaps += other.gaps
        self.coverage += other.coverage
        self.evicted += other.evicted
        self.pruned += other.pruned
        self.invalid = [*self.invalid, *other.invalid][:MAX_INVALID]

    def add_invalid(self, key: MessageKey, reason: str) -> None:
        self.invalid_count += 1
        self.invalid_devices.add(key[0])
        if len(self.invalid) < MAX_INVALID:
            device, log, seq = map(rollouts.to_json_value, key)
            self.invalid.append({"device": device, "log": log, "seq": seq, "reason": reason})


def audit(
    store: FleetStore,
    device: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
    operators: Sequence[PublicKey] = (),
    processes: int = 1,
    collectors: Sequence[PublicKey] = (),
) -> AuditReport:
    """Verify all messages, or those of one device; call `progress` after each hundred. Raises StorageError.

    `operators`: keys with which decisions about rollouts are valid; decisions are not checked for one device.
    `collectors`: keys with which retention statements are valid. With several `processes` each range of devices is
    audited in a snapshot of its own.
    """
    if device is not None:
        return _audit_devices(store, device, progress, collectors)
    jobs = [(devices, (collectors,)) for devices in split_devices(store, processes)]
    return _merge_parts(store, run_over_devices(store, _audit_devices, jobs, processes, progress), operators)


def audit_from_checkpoint(
    store: FleetStore,
    folder: CheckpointFolder,
    key: SigningKey,
    progress: Callable[[int], None] = lambda _: None,
    operators: Sequence[PublicKey] = (),
    processes: int = 1,
    collectors: Sequence[PublicKey] = (),
    *,
    full: bool = False,
) -> tuple[AuditReport, Checkpoint | None]:
    """Verify the messages behind the last checkpoint, and sign a new one; return the one it went on from.

    `full`: verify all messages. Raises StorageError, and UsageError if the checkpoint is not genuine.
    """
    checkpoint = None if full else folder.load()
    durable_files.make_folder(folder.path)
    if checkpoint is None:
        parts: list[tuple[DeviceRange, Path | None]] = [(range_, None) for range_ in split_devices(store, processes)]
    else:
        parts = [(part.devices, folder.path / part.file) for part in checkpoint.parts]
    targets = [folder.new_file() for _ in parts]
    jobs = [(devices, (collectors, file, target)) for (devices, file), target in zip(parts, targets, strict=True)]
    report = _merge_parts(store, run_over_devices(store, _audit_devices, jobs, processes, progress), operators)
    made = [(devices, target) for (devices, _), target in zip(parts, targets, strict=True)]
    folder.save(key, clock.to_rfc3339(clock.read().wall_us), report.messages, made)
    return report, checkpoint


def _merge_parts(store: FleetStore, parts: Sequence[AuditReport], operators: Sequence[PublicKey]) -> AuditReport:
    report = AuditReport()
    for part in parts:
        report.merge(part)
    with store.snapshot() as db:
        decisions = rollouts.audit_rollouts(db, operators)
    report.decisions, report.invalid_decisions = decisions.decision_count, decisions.invalid
    return report


def _audit_devices(
    store: FleetStore,
    devices: Devices,
    progress: Callable[[int], None],
    collectors: Sequence[PublicKey] = (),
    file: Path | None = None,
    target: Path | None = None,
) -> AuditReport:
    """Audit devices, from the state in `file` on if it is given, and write the new state to `target`."""
    report = AuditReport()
    with store.snapshot(), contextlib.closing(Replay(file)) as replay:
        pruned, problems = pruned_devices.load(store, devices, collectors)
        for name, problem in problems.items():
            report.add_invalid((name, "", None), problem)
        auditor = _DeviceAuditor(store, replay, report, progress, pruned, makes_states=target is not None)
        auditor.audit(devices, {} if file is None else load_states(replay.db))
        replay.flush()
        if target is not None:
            save_states(replay.db, auditor.states)
            copy_database(replay.db, target)
        bad = {gap["device"] for gap in report.gaps if not gap["declared"]} | auditor.broken
        for key, reason in replay.compare(store, devices, bad):
            report.add_invalid(key, reason)
        report.devices = len(auditor.names)
    if target is not None:
        bad |= report.invalid_devices
        keep_devices(target, {device for device, _ in auditor.states if device not in bad})
    return report


def audit_prefix(
    store: FleetStore, device: str, through: Mapping[str, int], pruned: PrunedDevice | None
) -> tuple[AuditReport, dict[str, LogState], dict[str, list[list[Any]]]]:
    """Verify the messages of each log up to a seq; return a report, the state there, and the derived tables.

    `pruned`: what went before.
    """
    with contextlib.closing(Replay()) as replay:
        if pruned is not None:
            replay.load(pruned.read_state().tables, ())
        bases = {} if pruned is None else pruned.read_bases()
        tables = StoredTables(store, device, lambda *_: None)
        report, states = AuditReport(), dict[str, LogState]()
        parts = _AuditParts(Keyring(store), replay, report, set(), None)
        for log in sorted(through):
            base = bases.get((device, log))
            auditor = _LogAuditor((device, log), LogState(), base, tables, parts)
            for row in store.log_messages(device, log, auditor.last_seq + 1, through[log]):
                auditor.check_message(*row)
                report.messages += 1
            states[log] = auditor.to_state()
        # Rows of the messages that stay: their readers end here.
        tables.finish()
        return report, states, replay.dump()


class _DeviceAuditor:
    """Audits the logs of devices.

    `states`: of each log, for a checkpoint; `names`: of the devices; `broken`: devices with a message that does not
    verify.
    """

    def __init__(
        self,
        store: FleetStore,
        replay: Replay,
        report: AuditReport,
        progress: Callable[[int], None],
        pruned: Mapping[str, PrunedDevice],
        *,
        makes_states: bool,
    ) -> None:
        self._pruned = pruned
        self._store, self._replay, self._report, self._progress = store, replay, report, progress
        self._makes_states = makes_states
        self._keyring = Keyring(store)
        self.states: dict[tuple[Any, Any], LogState] = {}
        self.names: set[Any] = set()
        self.broken: set[Any] = set()

    def audit(
        self, devices: Devices, states: Mapping[tuple[Any, Any], LogState], *, reports_orphans: bool = True
    ) -> None:
        """Audit messages behind `states`; of a device where an earlier one changed, all.

        `reports_orphans`: rows of tables without a message are reported.
        """
        pruned = [self._pruned[name] for name in self._pruned if not isinstance(devices, str) or name == devices]
        bases = {log: base for device in pruned for log, base in device.read_bases().items()}
        continued = {device for device, _ in states}
        for device in pruned:
            self._report.pruned += device.to_report() if reports_orphans else []
            if device.statement.device not in continued:
                self._replay.load(device.read_state().tables, device.read_alerts().values())
        ends = self._find_ends(devices)
        # A damaged number differs from the derived table, which names it.
        last_seqs = {(name, log): last if type(last) is int else 0 for name, log, last in self._store.logs(devices)}
        key_rows: dict[str, bytes] = {}
        if self._makes_states:
            key_rows = {
                device: _to_bytes(tuple(rows)) for device, rows in groupby(self._store.key_rows(devices), itemgetter(0))
            }
        report_orphan = self._report.add_invalid if reports_orphans else lambda *_: None
        retained = {key: row for device in pruned for key, row in device.read_alerts().items()}
        tables = StoredTables(self._store, devices, report_orphan, retained)
        changed: list[Any] = []
        own_logs = {
            name: [*logs] for name, logs in groupby(sorted({*last_seqs, *states, *bases}, key=sort_key), itemgetter(0))
        }
        for device, rows in groupby(self._store.evidence(devices), itemgetter(0)):
            parts = self._new_parts(key_rows.get(device, b""))
            logs = dict.fromkeys(own_logs.pop(device, ()))
            is_same = True
            for name, log_rows in groupby(rows, lambda row: row[:2]):
                logs.pop(name, None)
                auditor = _LogAuditor(name, states.get(name, LogState()), bases.get(name), tables, parts)
                self._check_messages(auditor, log_rows)
                is_same &= auditor.is_unchanged
                self._finish(auditor, last_seqs.get(name, 0), ends.get(name, 0))
            is_same &= self._finish_empty_logs(logs, last_seqs, ends, states, bases, tables, parts)
            if is_same:
                self._report.merge(parts.report)
            else:
                changed.append(device)
        for device, names in own_logs.items():
            parts = self._new_parts(key_rows.get(device, b""))
            if self._finish_empty_logs(dict.fromkeys(names), last_seqs, ends, states, bases, tables, parts):
                self._report.merge(parts.report)
            else:
                changed.append(device)
        tables.finish()
        for device in changed:
            self._replay.forget(device)
            self.broken.discard(device)
            self.audit(device, {}, reports_orphans=False)

    def _new_parts(self, key_rows: bytes) -> _AuditParts:
        return _AuditParts(
            self._keyring, self._replay, AuditReport(), self.broken, key_rows if self._makes_states else None
        )

    def _finish_empty_logs(
        self,
        names: Iterable[Row],
        last_seqs: Mapping[Any, int],
        ends: Mapping[Any, int],
        states: Mapping[Any, LogState],
        bases: Mapping[Any, LogBase],
        tables: StoredTables,
        parts: _AuditParts,
    ) -> bool:
        """Finish logs without a message; return False if one had some."""
        is_same = True
        for name in names:
            is_same &= name not in states or not states[name].last_seq
            auditor = _LogAuditor(name, LogState(), bases.get(name), tables, parts)
            self._finish(auditor, last_seqs.get(name, 0), ends.get(name, 0))
        return is_same

    def _find_ends(self, devices: Devices) -> dict[tuple[Any, Any], int]:
        """Return the last seq of each log that a signed message of a later log declares ended."""
        ends = self._replay.log_ends()
        for name, topic, payload, jws in self._store.audit_messages(devices, f'"{NEW_LOG}"'.encode()):
            with contextlib.suppress(MessageRefused, TypeError, AttributeError):
                body = verify_message(topic, payload, (jws,), self._keyring.find_stored).body
                if body.device == name and (end := parse_log_end(body)):
                    ends[name, end[0]] = max(end[1], ends.get((name, end[0]), 0))
        return ends

    def _check_messages(self, auditor: _LogAuditor, rows: Iterable[Row]) -> None:
        count = 0
        for row in rows:
            auditor.check_message(*row[2:])
            count += 1
            if count % 100 == 0:
                self._progress(100)
        self._progress(count % 100)
        auditor.report.messages += count

    def _finish(self, auditor: _LogAuditor, last_seq: int, end: int) -> None:
        device, log = auditor.name
        self.names.add(device)
        if self._makes_states and isinstance(device, str) and isinstance(log, str) and (device + log).isascii():
            self.states[device, log] = auditor.to_state()
        auditor.finish(last_seq, end)


class _AuditParts(msgspec.Struct):
    """Parts that the audits of one device's logs share.

    `broken`: devices with a message that does not verify; `key_rows`: of the device, where states are made.
    """

    keyring: Keyring
    replay: Replay
    report: AuditReport
    broken: set[Any]
    key_rows: bytes | None


class _LogAuditor:
    """Audits one log, message by message in order of seq, from a state on, or behind what was pruned.

    `is_unchanged`: the device's keys and the rows of the messages up to the state are those of the audit that made it.
    """

    def __init__(
        self, name: Row, state: LogState, base: LogBase | None, tables: StoredTables, parts: _AuditParts
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
            self._stored.update(_to_bytes((seq, kind, topic, payload, jws, received, stored)))
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
        for (task, stream), track in self._coverage.tracks.items():
            rows = {"first": track.first, "last": track.last, "messages": track.messages, "results": track.results}
            place = {"device": self._device, "log": self._log, "task": task, "stream": stream}
            self.report.coverage.append({**place, **rows})

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


def _to_bytes(rows: Row) -> bytes:
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
