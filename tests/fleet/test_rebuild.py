"""Rebuild: tables that were damaged, altered or lost return from the signed messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from outstation.fleet.audit.audit import audit
from outstation.fleet.audit.rebuild import RebuildReport, rebuild
from outstation.fleet.cli.group import fleet
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.schema.message_tables import PROJECTED
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.foundation.errors import UsageError
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.workbench.testing.messages import FLEET, MessageSender
from tests.fleet.retention import test_prune
from tests.fleet.test_audit_tables import DERIVED, alter, fill, ingest, read_rows

Tables = dict[str, list[tuple[Any, ...]]]
ALL_TABLES = (*PROJECTED, *DERIVED)
LATER = "2026-11-25T22:20:00.000000Z"


def read_tables(store: FleetStore) -> Tables:
    """Return the rows of every table that follows from messages, without the numbers of their arrival."""
    return {table: read_table(store, table) for table in ALL_TABLES}


def read_table(store: FleetStore, table: str) -> list[tuple[Any, ...]]:
    names, rows = read_rows(store, table)
    places = [i for i, name in enumerate(names) if name != "rowid"]
    return sorted((tuple(row[i] for i in places) for row in rows), key=repr)


def execute(store: FleetStore, sql: str, *values: Any) -> None:
    with store.transaction() as db:
        assert db.execute(sql, values).rowcount >= 1


def lose_every_table(store: FleetStore) -> None:
    with store.transaction() as db:
        for table in ALL_TABLES:
            db.execute(f"DELETE FROM {table}")


def test_tables_that_follow_from_the_messages_are_not_touched(store: FleetStore) -> None:
    fill(store)
    before = read_tables(store)
    report = rebuild(store)
    assert (report.passed, report.devices, report.messages, report.rows) == (True, 2, 36, {})
    assert read_tables(store) == before


def test_a_rebuild_that_corrects_nothing_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "fleet.db"
    with FleetStore(file) as store:
        fill(store)
    content = file.read_bytes()
    with FleetStore(file) as store:
        assert rebuild(store).rows == {}
    assert file.read_bytes() == content


def test_lost_tables_return(store: FleetStore) -> None:
    fill(store)
    before = read_tables(store)
    lose_every_table(store)
    report = rebuild(store)
    assert report.passed
    assert {*report.rows} == {*ALL_TABLES}
    assert read_tables(store) == before
    assert audit(store).passed
    assert rebuild(store).rows == {}


@pytest.mark.parametrize("table", ALL_TABLES)
def test_an_altered_column_is_corrected(store: FleetStore, table: str) -> None:
    fill(store)
    before = read_tables(store)
    names, rows = read_rows(store, table)
    columns = [name for name in names if name not in ("rowid", "since", "source")]
    for name in columns:
        i = names.index(name)
        row = max(rows, key=lambda row: (row[i] is not None, repr(row)))
        if row[i] is None:
            continue
        keys = [(n, v) for n, v in zip(names, row, strict=True) if v is not None and n != "rowid"]
        where = " AND ".join(f'"{n}" = ?' for n, _ in keys)
        execute(store, f'UPDATE {table} SET "{name}" = ? WHERE {where}', alter(row[i], name), *(v for _, v in keys))
        assert table in rebuild(store).rows, name
        assert read_tables(store) == before, name


@pytest.mark.parametrize("table", ALL_TABLES)
def test_an_invented_row_goes(store: FleetStore, table: str) -> None:
    fill(store)
    before = read_tables(store)
    columns = [name for name in read_rows(store, table)[0] if name != "rowid"]
    copied = ", ".join("'pi-09'" if name == "device" else f'"{name}"' for name in columns)
    into = ", ".join(f'"{name}"' for name in columns)
    execute(store, f"INSERT INTO {table} ({into}) SELECT {copied} FROM {table} WHERE device = 'pi-07'")
    assert [*rebuild(store).rows] == [table]
    assert read_tables(store) == before


def test_a_corrected_alert_is_not_new_to_its_readers(store: FleetStore) -> None:
    fill(store)
    numbers = "SELECT rowid FROM alerts ORDER BY device, log, seq"
    before = store.fetch_all(numbers)
    execute(store, "UPDATE alerts SET task = 'other'")
    assert rebuild(store).rows == {"alerts": len(before)}
    assert store.fetch_all(numbers) == before


def test_only_the_rows_that_differ_are_counted(store: FleetStore) -> None:
    sender = MessageSender()
    ingest(store, sender, sender.results(3))
    [(row,)] = store.fetch_all("SELECT max(row) FROM results")
    execute(store, "UPDATE results SET label = 'x' WHERE row = ?", row)
    assert rebuild(store).rows == {"results": 1}


def test_a_message_with_an_altered_device_excludes_the_device_next_to_it(store: FleetStore) -> None:
    fill(store)
    execute(store, "UPDATE messages SET device = 'pi-07x' WHERE device = 'pi-07' AND seq = 3")
    report = rebuild(store)
    assert (report.excluded, {entry["device"] for entry in report.invalid}) == (["pi-07"], {"pi-07x"})


def test_one_device_is_rebuilt_and_the_others_are_not(store: FleetStore) -> None:
    fill(store)
    before = read_tables(store)
    execute(store, "DELETE FROM results")
    assert rebuild(store, "pi-07").devices == 1
    assert {device for device, *_ in read_table(store, "results")} == {"pi-07"}
    rebuild(store)
    assert read_tables(store) == before


def test_an_unverified_message_excludes_its_device(store: FleetStore) -> None:
    fill(store)
    before = read_tables(store)
    execute(store, "UPDATE messages SET payload = ? WHERE device = 'pi-08' AND seq = 3", b"{}")
    execute(store, "DELETE FROM results")
    report = rebuild(store)
    assert not report.passed
    assert report.excluded == ["pi-08"]
    assert {(entry["device"], entry["seq"]) for entry in report.invalid} == {("pi-08", 3)}
    assert read_table(store, "results") == [row for row in before["results"] if row[0] == "pi-07"]


def test_what_was_pruned_does_not_return_and_its_open_alerts_do(store: FleetStore) -> None:
    sender = MessageSender()
    test_prune.ingest(store, sender, test_prune.OLD, *test_prune.everything(sender, "a"))
    test_prune.ingest(store, sender, test_prune.NEW, *test_prune.everything(sender, "b"))
    test_prune.run(store)
    before = read_tables(store)
    lose_every_table(store)
    assert rebuild(store, collectors=[test_prune.KEY.public]).passed
    after = read_tables(store)
    # When its first message arrived is known from the message alone, which went.
    assert [row[:3] + row[4:] for row in after.pop("logs")] == [row[:3] + row[4:] for row in before.pop("logs")]
    assert after == before
    assert test_prune.check(store).passed


def test_a_forged_retention_statement_excludes_its_device(store: FleetStore) -> None:
    sender = MessageSender()
    test_prune.ingest(store, sender, test_prune.OLD, *test_prune.everything(sender, "a"))
    test_prune.ingest(store, sender, test_prune.NEW, sender.results())
    test_prune.run(store)
    execute(store, "DELETE FROM results")
    assert not rebuild(store, collectors=[]).passed
    assert read_table(store, "results") == []


def test_logs_return_in_the_order_of_their_arrival(store: FleetStore) -> None:
    first = MessageSender(log=str(uuid.UUID(int=2)))
    second = MessageSender(log=str(uuid.UUID(int=1)), key=first.key)
    ingest(store, first, first.results(), first.alert())
    store.ingest([Arrival(second.verify(second.alert()))], [], LATER)
    store.accept_log(first.device, second.log, LATER)
    before, logs = read_tables(store), store.device_logs(first.device)
    assert [log["log"] for log in logs] == [first.log, second.log]
    for log in (first.log, second.log):
        execute(store, "DELETE FROM logs WHERE log = ?", log)
        assert rebuild(store).rows == {"logs": 1}
        assert read_tables(store) == before
        assert store.device_logs(first.device) == logs


def test_killed_in_the_middle_each_device_is_as_it_was_or_corrected(tmp_path: Path) -> None:
    file = tmp_path / "fleet.db"
    with FleetStore(file) as store:
        for device in range(6):
            sender = MessageSender(f"pi-{device}")
            ingest(store, sender, *(sender.results() for _ in range(3)), sender.alert())
        before = read_tables(store)
        lose_every_table(store)
    program = (
        "import sys; from outstation.fleet.audit import rebuild; from outstation.fleet.database.store import *;"
        "finish = rebuild._Corrections.finish\n"
        "def announce(self):\n finish(self); print('.', flush=True); sys.stdin.readline()\n"
        "rebuild._Corrections.finish = announce; rebuild.rebuild(FleetStore(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == ".\n"
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readline() == ".\n"
        os.kill(process.pid, signal.SIGKILL)
    with FleetStore(file) as store:
        assert [row for row in before["results"] if row[0] < "pi-3"] == read_table(store, "results")
        assert rebuild(store).passed
        assert read_tables(store) == before


def run_command(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(fleet, ["db", "rebuild", *arguments, "--dir", str(home)])


def test_the_command_says_what_it_corrected(tmp_path: Path) -> None:
    config = init_fleet(tmp_path / FLEET, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    home = tmp_path / FLEET
    with FleetStore(config.fleet.db) as store:
        fill(store)
        execute(store, "DELETE FROM alerts WHERE device = 'pi-07'")
    answer = run_command(home)
    assert answer.stdout == "36 messages of 2 devices: corrected rows: 2 of alerts\n", answer.output
    answer = run_command(home, "pi-07")
    assert answer.stdout == "18 messages of 1 device: no table differs from its messages\n"
    assert RebuildReport(**_without_passed(run_command(home, "--json").stdout)).rows == {}
    unknown = run_command(home, "pi-7")
    assert isinstance(unknown.exception, UsageError)
    assert "did you mean 'pi-07'?" in str(unknown.exception)


def _without_passed(text: str) -> dict[str, Any]:
    document = json.loads(text)
    assert document.pop("passed", True)
    return dict(document)


def test_the_command_fails_where_a_message_does_not_verify(tmp_path: Path) -> None:
    config = init_fleet(tmp_path / FLEET, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    with FleetStore(config.fleet.db) as store:
        fill(store)
        execute(store, "UPDATE messages SET topic = 'x' WHERE device = 'pi-08' AND seq = 3")
    answer = run_command(tmp_path / FLEET)
    assert answer.exit_code == 1
    assert "Not rebuilt, as the evidence does not verify: pi-08. " in answer.stdout


def test_a_running_collector_is_not_disturbed(tmp_path: Path) -> None:
    config = init_fleet(tmp_path / FLEET, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    with FleetStore(config.fleet.db) as store:
        fill(store)
        store.join_collectors()
        answer = run_command(tmp_path / FLEET)
    assert isinstance(answer.exception, UsageError)
    assert "stop it first" in str(answer.exception)
