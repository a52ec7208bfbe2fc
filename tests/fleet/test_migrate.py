"""Migration to PostgreSQL: every row arrives once, wherever copying is interrupted, and the copy passes its audit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outstation.fleet.audit.audit import audit
from outstation.fleet.cli.group import fleet
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.maintenance import copying
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.foundation.errors import StorageBusy, StorageError, UsageError
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.workbench.testing.messages import FLEET, MessageSender
from scripts.kit.postgres import PostgresServer

NOW = "2026-11-24T22:20:00.000000Z"


def fill(store: FleetStore, *senders: MessageSender) -> None:
    for sender in senders:
        if store.active_key(sender.device) is None:
            store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
        metrics = [{"metric": "accuracy", "value": 0.9, "low": 0.8, "high": 0.95, "n": 20}]
        sent = [sender.results(3, made={"agent": "0.1.0"}, faults=["ax"]), sender.drift(), sender.alert(sender.log)]
        sent += [sender.append("quality", task=sender.task, metrics=metrics), sender.shadow(), sender.health()]
        lost = sender.health()
        sent += [sender.evicted((lost.seq, lost.seq)), sender.results(2)]
        store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[FleetStore]:
    store = FleetStore(tmp_path / "fleet.db")
    fill(store, MessageSender("pi-07"), MessageSender("pi-08"))
    yield store
    store.close()


@pytest.fixture
def target(postgres_server: PostgresServer) -> Iterator[FleetStore]:
    with FleetStore(postgres_server.create_database()) as store:
        yield store


def contents(source: FleetStore, store: FleetStore) -> dict[str, list[str]]:
    """Return the rows of every table of `source` in `store`."""
    with source.snapshot() as db:
        tables = [*copying._describe_tables(db)]
    rows_by_table: dict[str, list[str]] = {}
    with store.snapshot() as db:
        for table in tables:
            columns = ", ".join(f'"{name}"' for name in table.columns)
            rows = [[*row] for row in db.execute(f"SELECT {columns} FROM {table.name}")]
            rows_by_table[table.name] = sorted(
                repr([int(v) if isinstance(v, bool) else v for v in row]) for row in rows
            )
    return rows_by_table


def test_every_row_arrives_and_the_copy_passes_its_audit(source: FleetStore, target: FleetStore) -> None:
    copied = copying.copy(source, target)
    copying.finish(target)
    assert contents(source, target) == contents(source, source)
    assert copied["messages"] == 16
    assert audit(target).passed
    assert [log["log"] for log in target.device_logs("pi-07")] == [log["log"] for log in source.device_logs("pi-07")]
    # Collectors go on in it.
    fill(target, MessageSender("pi-09"))
    assert audit(target).passed


@pytest.mark.parametrize("parts", range(1, 26, 4))
def test_interrupted_after_any_part_it_goes_on(
    source: FleetStore, target: FleetStore, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    monkeypatch.setattr(copying, "_ROWS", 2)
    monkeypatch.setattr(copying, "_MESSAGES", 3)
    done: list[int] = []

    class Killed(Exception):
        pass

    def advance(rows: int) -> None:
        done.append(rows)
        if len(done) == parts:
            raise Killed

    with pytest.raises(Killed):
        copying.copy(source, target, advance)
    again: list[int] = []
    copying.copy(source, target, again.append)
    assert sum(done) + sum(again) == sum(len(rows) for rows in contents(source, source).values())
    assert contents(source, target) == contents(source, source)


def test_a_source_that_changed_in_between_is_copied_anew(source: FleetStore, target: FleetStore) -> None:
    def stop(_: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        copying.copy(source, target, stop)
    fill(source, MessageSender("pi-09"))
    copying.copy(source, target)
    assert contents(source, target) == contents(source, source)


@pytest.mark.parametrize("place", ["source", "target"])
def test_the_database_of_a_running_collector_is_not_copied(
    tmp_path: Path, source: FleetStore, postgres_server: PostgresServer, place: str
) -> None:
    init_fleet(tmp_path / "acme", FLEET, BrokerConfig())
    url = postgres_server.create_database()
    arguments = [
        "migrate",
        "--from",
        f"sqlite:///{tmp_path / 'fleet.db'}",
        "--to",
        url,
        "--dir",
        str(tmp_path / "acme"),
    ]
    with FleetStore(tmp_path / "fleet.db" if place == "source" else url) as collecting:
        assert collecting.join_collectors() == 1
        with pytest.raises(UsageError, match="a collector runs on it"):
            CliRunner().invoke(fleet, arguments, catch_exceptions=False)
    with FleetStore(url) as target:
        assert contents(source, target) != contents(source, source)
    assert CliRunner().invoke(fleet, arguments).exit_code == 0


def test_no_collector_starts_on_a_database_that_is_copied(source: FleetStore, tmp_path: Path) -> None:
    with FleetStore(tmp_path / "fleet.db") as copying_store:
        assert copying_store.exclude_collectors()
        with pytest.raises(StorageBusy, match="fleet db migrate` copies it"):
            source.join_collectors()
    assert source.join_collectors() == 1


def test_a_second_collector_on_one_sqlite_file_is_refused(source: FleetStore, tmp_path: Path) -> None:
    init_fleet(tmp_path / "acme", FLEET, BrokerConfig())
    assert source.join_collectors() == 1
    arguments = ["collect", "--db", f"sqlite:///{tmp_path / 'fleet.db'}", "--dir", str(tmp_path / "acme")]
    with pytest.raises(StorageBusy, match="another collector runs on it"):
        CliRunner().invoke(fleet, arguments, catch_exceptions=False)
    assert source.join_collectors() == 1, "the one that runs keeps its place"


def test_a_target_with_rows_is_refused(source: FleetStore, target: FleetStore) -> None:
    fill(target, MessageSender("pi-01"))
    before = contents(source, target)
    with pytest.raises(UsageError, match="has rows already"):
        copying.copy(source, target)
    assert contents(source, target) == before


def test_text_that_postgresql_cannot_store_is_named(source: FleetStore, target: FleetStore) -> None:
    with source.transaction() as db:
        db.execute("UPDATE alerts SET summary = ? WHERE device = 'pi-07'", ("a\0b",))
    with pytest.raises(StorageError, match="column summary of table alerts"):
        copying.copy(source, target)


def test_the_command_copies_and_audits(tmp_path: Path, postgres_server: PostgresServer) -> None:
    home = tmp_path / FLEET
    config = init_fleet(home, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    with FleetStore(config.fleet.db) as store:
        fill(store, MessageSender())
    url = postgres_server.create_database()
    arguments = ["migrate", "--dir", str(home), "--from", f"sqlite:///{config.fleet.db}", "--to", url, "--json"]
    result = CliRunner().invoke(fleet, arguments)
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    assert (document["passed"], document["rows"]["messages"], document["audit"]["messages"]) == (True, 8, 8)
    result = CliRunner().invoke(fleet, [*arguments[:-3], "--to", str(tmp_path / "other.db")])
    assert isinstance(result.exception, UsageError)
