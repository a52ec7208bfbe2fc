"""Prune: remove what a retention no longer covers, one device at a time, and leave a signed statement of what went.

Messages are verified before they go, so that the statement's state is that of an audit. A device with a message that
does not verify keeps everything. Each device is one transaction: killed anywhere, its evidence is there or stated as
pruned.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from outstation.fleet.audit import pruned as statements
from outstation.fleet.audit.audit import audit_prefix
from outstation.fleet.audit.checkpoint import LogState
from outstation.fleet.audit.pruned import PrunedDevice, PrunedLog, PrunedState, PrunedTable, Statement
from outstation.fleet.database.interface import TransactionConflict
from outstation.fleet.database.maintenance import pruning
from outstation.fleet.database.maintenance.pruning import Removal, StatementRow
from outstation.fleet.database.maintenance.retention import Retention
from outstation.fleet.database.schema.message_tables import ALERTS, RESULT_DETAILS, RESULTS
from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from outstation.protocol.wire.keys import PublicKey, SigningKey

_MAX_ATTEMPTS = 3
_DEVICE, _LOG, _SEQ = (ALERTS.names.index(name) for name in ("device", "log", "seq"))


class PrunedCount(msgspec.Struct, frozen=True):
    """Counts of one device: pruned messages, pruned rows of single tables, and all rows that were removed."""

    device: str
    messages: int
    tables: dict[str, int]
    removed: int = 0


class PruneReport(msgspec.Struct):
    """`refused`: device → why everything of it stays."""

    dry_run: bool
    before: dict[str, str]
    devices: list[PrunedCount] = []
    refused: dict[str, str] = {}


class _Plan(msgspec.Struct, frozen=True):
    """Plan for one device: log → last seq to prune, of messages and of single tables; `last`: its newest statement."""

    device: str
    messages: dict[str, int]
    tables: dict[str, dict[str, int]]
    last: PrunedDevice | None


def prune(
    store: FleetStore,
    retention: Retention,
    fleet: str,
    key: SigningKey | None,
    collectors: Sequence[PublicKey],
    now_us: int,
) -> PruneReport:
    """Prune every device; without a key only say what would go. Raises StorageError."""
    before = {
        name: clock.to_rfc3339(now_us - int(seconds * 1e6))
        for name, seconds in msgspec.structs.asdict(retention).items()
        if seconds is not None
    }
    report = PruneReport(key is None, before)
    known, problems = statements.load(store, None, collectors)
    report.refused |= problems
    logs: dict[str, list[tuple[str, int]]] = {}
    for device, log, last_seq in store.logs():
        logs.setdefault(device, []).append((log, last_seq))
    run = _Pruning(store, fleet, key, before, clock.to_rfc3339(now_us), report)
    for device, own in logs.items():
        if device not in problems:
            run.prune_device(device, own, known.get(device))
    return report


class _Pruning(msgspec.Struct):
    """A run; without a `key` a dry one. `before`: table → time before which its rows go."""

    store: FleetStore
    fleet: str
    key: SigningKey | None
    before: Mapping[str, str]
    now: str
    report: PruneReport

    def prune_device(self, device: str, logs: Sequence[tuple[str, int]], last: PrunedDevice | None) -> None:
        for attempt in range(_MAX_ATTEMPTS):
            plan = self._make_plan(device, logs, last)
            counts = _count(self.store, plan)
            if not counts.messages and not any(counts.tables.values()):
                return
            if self.key is None:
                self.report.devices.append(counts)
                return
            try:
                removed = self._remove(plan, self.key)
            except TransactionConflict:
                if attempt == _MAX_ATTEMPTS - 1:
                    raise
                continue
            if isinstance(removed, str):
                self.report.refused[device] = removed
            else:
                self.report.devices.append(msgspec.structs.replace(counts, removed=removed))
            return

    def _make_plan(self, device: str, logs: Sequence[tuple[str, int]], last: PrunedDevice | None) -> _Plan:
        messages = {} if last is None else {log.log: log.through for log in last.statement.logs}
        floors = {} if last is None else last.statement.tables
        tables = {table: {pruned.log: pruned.through for pruned in floor} for table, floor in floors.items()}
        for log, last_seq in logs:
            for name, time in self.before.items():
                target = messages if name == "messages" else tables.setdefault(name, {})
                cut = pruning.find_cut(self.store, device, log, last_seq, target.get(log, 0), time)
                if cut:
                    target[log] = cut
        if RESULTS.name in tables:
            tables[RESULT_DETAILS.name] = dict(tables[RESULTS.name])
        return _Plan(device, messages, tables, last)

    def _remove(self, plan: _Plan, key: SigningKey) -> int | str:
        """Remove what a plan names; return the number of rows, or why everything stays."""
        with self.store.snapshot():
            audited, states, tables = audit_prefix(self.store, plan.device, plan.messages, plan.last)
            if audited.invalid_count or audited.duplicates:
                reason = audited.invalid[0]["reason"] if audited.invalid else "a message is stored twice"
                return f"{audited.invalid_count} messages do not verify ({reason}); see `outstation fleet audit`"
            alerts = pruning.load_open_alerts(self.store, plan.device, plan.messages)
            width = len(ALERTS.names)
            retained = [[*row[:width]] for row in alerts]
            if not _are_former_alerts_intact(plan.last, retained):
                return "an open alert whose message went was changed; see `outstation fleet audit`"
            pruned_logs, stored = _describe_logs(self.store, plan, states)
            pruned_tables = {
                table: [
                    PrunedTable(log, through, _past_rows(plan.last, table, log) + pruning.count_rows(
                        self.store, table, plan.device, log, through))
                    for log, through in sorted(logs.items())
                ]
                for table, logs in plan.tables.items()
            }  # fmt: skip
        state = msgspec.json.encode(PrunedState(states, tables, retained))
        last = None if plan.last is None else (plan.last.statement.n, plan.last.payload)
        n, prev = statements.KIND.find_next_place(last)
        head = (self.fleet, plan.device, n, prev, self.now, dict(self.before))
        statement = Statement(*head, pruned_logs, pruned_tables, statements.digest(state))
        signed = statements.KIND.sign_body(key, statement, self.fleet)
        retained_keys = frozenset((row[_LOG], row[_SEQ]) for row in retained)
        row = StatementRow(plan.device, n, self.now, signed.payload, signed.jws, state)
        return pruning.remove(self.store, row, Removal(plan.messages, plan.tables, stored, retained_keys))


def _count(store: FleetStore, plan: _Plan) -> PrunedCount:
    device = plan.device
    messages = sum(pruning.count_rows(store, "messages", device, *log) for log in plan.messages.items())
    tables = {
        table: sum(pruning.count_rows(store, table, device, log, through) for log, through in logs.items())
        for table, logs in plan.tables.items()
    }
    return PrunedCount(device, messages, tables)


def _describe_logs(
    store: FleetStore, plan: _Plan, states: Mapping[str, LogState]
) -> tuple[list[PrunedLog], dict[str, int]]:
    """Return what the statement says of each log, and the number of its stored messages that go."""
    past = {} if plan.last is None else {log.log: log for log in plan.last.statement.logs}
    described, stored = [], {}
    for log, through in sorted(plan.messages.items()):
        before = past.get(log, PrunedLog(log, 1, 0, "", 0, {}, ""))
        kinds, removed, count = Counter(before.kinds), hashlib.sha256(), 0
        for kind, topic, payload, jws in pruning.stream_removed(store, plan.device, log, through):
            for part in (topic.encode(), payload, jws.encode()):
                removed.update(len(part).to_bytes(8, "big") + part)
            kinds[kind] += 1
            count += 1
        stored[log] = count
        first, content = (before.through + 1, removed.hexdigest()) if count else (before.first, before.removed)
        counts = dict(sorted(kinds.items()))
        described.append(
            PrunedLog(log, first, through, states[log].last_digest, before.messages + count, counts, content)
        )
    return described, stored


def _are_former_alerts_intact(last: PrunedDevice | None, retained: Sequence[Sequence[Any]]) -> bool:
    """Return True if each open alert whose message was pruned before is as the last statement has it."""
    if last is None:
        return True
    former, pruned_through = last.read_alerts(), {log.log: log.through for log in last.statement.logs}
    old = [tuple(row) for row in retained if row[_SEQ] <= pruned_through.get(row[_LOG], 0)]
    return all(former.get((row[_DEVICE], row[_LOG], row[_SEQ])) == row for row in old)


def _past_rows(last: PrunedDevice | None, table: str, log: str) -> int:
    pruned = [] if last is None else last.statement.tables.get(table, [])
    return sum(entry.rows for entry in pruned if entry.log == log)
