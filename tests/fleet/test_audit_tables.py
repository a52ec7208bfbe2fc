"""Attack: the operator alters a table that the evidence is read from, and leaves the signed messages alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from outstation.fleet.audit.audit import audit
from outstation.fleet.audit.audit_report import AuditReport
from outstation.fleet.audit.replay import Replay
from outstation.fleet.audit.stored_rows import StoredTables
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.schema.message_tables import PROJECTED
from outstation.fleet.database.store import FleetStore
from outstation.workbench.testing.messages import NEW_MODEL, MessageSender, SignedMessage

pytestmark = pytest.mark.attack("audit")

NOW = "2026-11-24T22:20:00.000000Z"
BOOT_US, WALL_US = 1_000_000, 1_764_022_680_000_000
DERIVED = (
    "logs",
    "log_ends",
    "log_successors",
    "gaps",
    "anchors",
    "segments",
    "boots",
    "stamps",
    "result_provenance",
    "incidents",
)
# What one moment or the order of arrival decides, and no message states.
UNSIGNED = {("logs", "since"), ("logs", "rowid"), ("shadows", "rowid"), ("alerts", "rowid")}


def anchor(sender: MessageSender, boot: int, at: int) -> SignedMessage:
    evidence = {"boot": boot, "segment": 1, "boot_us": BOOT_US, "wall_us": at, "quality": "synced", "error_us": 50}
    return sender.append("audit", event="clock", summary="", evidence={**evidence, "step_us": 3})


def outputs(sender: MessageSender) -> SignedMessage:
    """Return two results with every column and member that results may have."""
    columns = {"row": [1301, 1401], "t": [1, 2], "value": [1.5, 2], "missing": [0, 0.25], "value_hum": [0.5, None]}
    made = {"agent": "0.1.0", "runtime": "ai-edge-litert 2.3.0", "config": "sha256:01"}
    return sender.results(2, columns=columns, made=made, incomplete=1, faults=["ax", "ay"])


def ingest(store: FleetStore, sender: MessageSender, *sent: SignedMessage) -> None:
    if store.active_key(sender.device) is None:
        store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW)


def fill(store: FleetStore) -> None:
    """Add a row to every table that follows from messages, for two devices."""
    metrics = [
        {"metric": name, "value": 0.9, "low": 0.8, "high": 0.95, "n": 20, "slice": "hand=left", "state": "ok"}
        for name in ("accuracy", "ece")
    ]
    for device in ("pi-07", "pi-08"):
        old = MessageSender(device)
        log = [anchor(old, 1, WALL_US), old.results(), old.drift(), old.quiet_run(), old.alert(), old.shadow()]
        quality = old.append("quality", task=old.task, metrics=metrics)
        log += [quality, old.rollout("shadow", numbers={"n": 3}), old.quality(), old.evicted((9, 9))]
        log += [
            old.health_with_cursor(),
            anchor(old, 3, WALL_US + 10_000_000),
            old.results(model=NEW_MODEL),
            outputs(old),
        ]
        learned = {"task": old.task, "site": "sha256:" + "ab" * 32, "fields": {}}
        log += [old.append("audit", event="learned", summary="", evidence=learned), old.samples()]
        extent: dict[str, Any] = {"boot": 2, "wall_clock": {"boot_us": 2_000_000}}
        log.append(old.append("health", streams={}, tasks={}, **extent))
        ingest(store, old, *(item for item in log if item.seq != 9))
        new = MessageSender(device, key=old.key)
        evidence = {"old": old.log, "through": old.seq, "reissued": 0}
        ingest(store, new, new.append("audit", event="new log", summary="", evidence=evidence), new.alert())


@pytest.fixture(scope="module")
def store(fresh: Callable[[], FleetStore]) -> Iterator[FleetStore]:
    store = fresh()
    fill(store)
    yield store
    store.close()


def audit_altered(store: FleetStore, sql: str, *values: Any, device: str | None = None) -> AuditReport:
    """Audit the database, or one device, with an alteration, which is then rolled back."""
    with contextlib.suppress(_RolledBack), store.transaction() as db:
        assert db.execute(sql, values).rowcount >= 1
        report = audit(store, device)
        raise _RolledBack
    return report


class _RolledBack(Exception):
    """Ends a transaction without a commit."""


def read_rows(store: FleetStore, table: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    with store.snapshot() as db:
        cursor = db.execute(f"SELECT * FROM {table}")
        names = [column[0] for column in cursor.description]
        return names, cursor.fetchall()


def alter(value: Any, name: str) -> Any:
    if isinstance(value, bool) or name in ("declared", "trusted", "implied", "live"):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, bytes | memoryview):
        return bytes(value) + b"x"
    return 7 if value is None else value + 5


def test_untouched_tables_pass(store: FleetStore) -> None:
    report = audit(store)
    assert report.passed, report.to_dict()
    assert audit(store, "pi-08").passed


@pytest.mark.parametrize("table", [*PROJECTED, *DERIVED])
def test_an_altered_column_of_any_derived_table_fails_the_audit(store: FleetStore, table: str) -> None:
    names, rows = read_rows(store, table)
    assert rows
    for i, name in enumerate(names):
        # The last row with a value, as the first may have none.
        row = max(rows, key=lambda row: (row[i] is not None, repr(row)))
        if (table, name) in UNSIGNED or row[i] is None:
            continue
        value = "collector" if name == "source" else alter(row[i], name)
        keys = [(n, v) for n, v in zip(names, row, strict=True) if v is not None and n != "rowid"]
        where = " AND ".join(f'"{n}" = ?' for n, _ in keys)
        device = dict(zip(names, row, strict=True)).get("device")
        sql = f'UPDATE {table} SET "{name}" = ? WHERE {where}'
        report = audit_altered(store, sql, value, *(v for _, v in keys), device=device)
        assert not report.passed, (table, name)
        # A log of another name has no message at all, which is a gap.
        named = any(table in entry["reason"] for entry in report.invalid)
        assert named or (table == "logs" and report.gaps), (table, name, report.invalid)


@pytest.mark.attack("audit", control=True)
@pytest.mark.parametrize("table", ["drift_windows", "alerts", "metrics"])
def test_an_audit_of_messages_alone_passes_an_altered_table(
    store: FleetStore, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    monkeypatch.setattr(StoredTables, "compare", lambda *_: [])
    monkeypatch.setattr(StoredTables, "finish", lambda _: None)
    monkeypatch.setattr(Replay, "compare", lambda *_: [])
    assert audit_altered(store, f"DELETE FROM {table} WHERE device = 'pi-07'").invalid == []


@pytest.mark.parametrize("table", [*PROJECTED, *DERIVED])
def test_a_deleted_row_of_any_derived_table_fails_the_audit(store: FleetStore, table: str) -> None:
    report = audit_altered(store, f"DELETE FROM {table} WHERE device = 'pi-07'")
    assert {entry["device"] for entry in report.invalid if table in entry["reason"]} == {"pi-07"}


@pytest.mark.parametrize("table", [*PROJECTED, *DERIVED])
def test_an_invented_row_of_any_derived_table_fails_the_audit(store: FleetStore, table: str) -> None:
    names, _ = read_rows(store, table)
    columns = [name for name in names if name != "rowid"]
    copied = ", ".join("'pi-09'" if name == "device" else f'"{name}"' for name in columns)
    into = ", ".join(f'"{name}"' for name in columns)
    sql = f"INSERT INTO {table} ({into}) SELECT {copied} FROM {table} WHERE device = 'pi-07'"
    report = audit_altered(store, sql)
    named = {entry["device"] for entry in report.invalid if table in entry["reason"]}
    assert named == (set() if table == "logs" else {"pi-09"})
    assert not report.passed
