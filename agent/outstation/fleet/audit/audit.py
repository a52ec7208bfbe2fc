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
- what `fleet db prune` removed is signed by a collector, and what stays follows it (see `audit.pruned`)
- each decision about a rollout is signed by an operator and follows the one before (see `audit.rollouts`)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from outstation.fleet.audit import pruned as pruned_devices
from outstation.fleet.audit import rollouts
from outstation.fleet.audit.audit_report import AuditReport
from outstation.fleet.audit.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    LogState,
    copy_database,
    load_states,
    save_states,
)
from outstation.fleet.audit.log_auditor import AuditParts, LogAuditor, to_bytes
from outstation.fleet.audit.pruned import PrunedDevice
from outstation.fleet.audit.replay import Replay, keep_devices
from outstation.fleet.audit.stored_rows import StoredTables, sort_key
from outstation.fleet.database.gap_ledger import NEW_LOG, parse_log_end
from outstation.fleet.database.interface import Row
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.store import DeviceRange, Devices, FleetStore
from outstation.fleet.workers.device_ranges import run_over_devices, split_devices
from outstation.foundation import clock, durable_files
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire.keys import PublicKey, SigningKey
from outstation.protocol.wire.verification import verify_message


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
    folder.save(key, clock.now_rfc3339(), report.messages, made)
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
        auditor = DeviceAuditor(store, replay, report, progress, pruned, makes_states=target is not None)
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
        parts = AuditParts(Keyring(store), replay, report, set(), None)
        for log in sorted(through):
            base = bases.get((device, log))
            auditor = LogAuditor((device, log), LogState(), base, tables, parts)
            for row in store.log_messages(device, log, auditor.last_seq + 1, through[log]):
                auditor.check_message(*row)
                report.messages += 1
            states[log] = auditor.to_state()
        # Rows of the messages that stay: their readers end here.
        tables.finish()
        return report, states, replay.dump()


class DeviceAuditor:
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
        makes_states: bool = False,
        tables: Callable[..., StoredTables] = StoredTables,
        keyring: Keyring | None = None,
    ) -> None:
        """`tables`: reads the rows of each message and reports, or corrects, those that differ.

        `keyring`: of the store, if it was read before.
        """
        self._pruned, self._new_tables = pruned, tables
        self._store, self._replay, self._report, self._progress = store, replay, report, progress
        self._makes_states = makes_states
        self._keyring = keyring or Keyring(store)
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
                device: to_bytes(tuple(rows)) for device, rows in groupby(self._store.key_rows(devices), itemgetter(0))
            }
        report_orphan = self._report.add_invalid if reports_orphans else lambda *_: None
        retained = {key: row for device in pruned for key, row in device.read_alerts().items()}
        tables = self._new_tables(self._store, devices, report_orphan, retained)
        changed: list[Any] = []
        own_logs = {
            name: [*logs] for name, logs in groupby(sorted({*last_seqs, *states, *bases}, key=sort_key), itemgetter(0))
        }

        def audit_device(device: Any, rows: Iterable[Row]) -> None:
            parts = self._new_parts(key_rows.get(device, b""))
            logs = dict.fromkeys(own_logs.pop(device, ()))
            is_same = True
            for name, log_rows in groupby(rows, lambda row: row[:2]):
                logs.pop(name, None)
                auditor = LogAuditor(name, states.get(name, LogState()), bases.get(name), tables, parts)
                self._check_messages(auditor, log_rows)
                is_same &= auditor.is_unchanged
                self._finish(auditor, last_seqs.get(name, 0), ends.get(name, 0))
            # Logs without a message must not have had one.
            for name in logs:
                is_same &= name not in states or not states[name].last_seq
                auditor = LogAuditor(name, LogState(), bases.get(name), tables, parts)
                self._finish(auditor, last_seqs.get(name, 0), ends.get(name, 0))
            if is_same:
                self._report.merge(parts.report)
            else:
                changed.append(device)

        for device, rows in groupby(self._store.evidence(devices), itemgetter(0)):
            audit_device(device, rows)
        for device in [*own_logs]:
            audit_device(device, ())
        tables.finish()
        for device in changed:
            self._replay.forget(device)
            self.broken.discard(device)
            self.audit(device, {}, reports_orphans=False)

    def _new_parts(self, key_rows: bytes) -> AuditParts:
        return AuditParts(
            self._keyring, self._replay, AuditReport(), self.broken, key_rows if self._makes_states else None
        )

    def _find_ends(self, devices: Devices) -> dict[tuple[Any, Any], int]:
        """Return the last seq of each log that a signed message of a later log declares ended."""
        ends = self._replay.log_ends()
        for name, topic, payload, jws in self._store.audit_messages(devices, f'"{NEW_LOG}"'.encode()):
            with contextlib.suppress(MessageRefused, TypeError, AttributeError):
                body = verify_message(topic, payload, (jws,), self._keyring.find_stored).body
                if body.device == name and (end := parse_log_end(body)):
                    ends[name, end[0]] = max(end[1], ends.get((name, end[0]), 0))
        return ends

    def _check_messages(self, auditor: LogAuditor, rows: Iterable[Row]) -> None:
        count = 0
        for row in rows:
            auditor.check_message(*row[2:])
            count += 1
            if count % 100 == 0:
                self._progress(100)
        self._progress(count % 100)
        auditor.report.messages += count

    def _finish(self, auditor: LogAuditor, last_seq: int, end: int) -> None:
        device, log = auditor.name
        self.names.add(device)
        if self._makes_states and isinstance(device, str) and isinstance(log, str) and (device + log).isascii():
            self.states[device, log] = auditor.to_state()
        auditor.finish(last_seq, end)
