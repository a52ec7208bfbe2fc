"""Commands `outstation db` and `fleet db`: databases are read, beside their writers, and never changed."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from outstation.device.bootstrap.device import load_config, open_store
from outstation.device.config.streams import FieldConfig
from outstation.device.store.rows import PackedChunk, Rows, unpack_columns
from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from outstation.foundation.cli import inspection
from outstation.foundation.cli.commands import cli

CONFIG = """
[device]
id = "pi-07"
fleet = "acme"
data_dir = "data"
[streams.room]
fields = [{ name = "temperature" }, { name = "state", type = "category" }]
"""
ROWS = [(f"2026-11-20T10:00:0{second}Z", 20.5 + second, text) for second, text in enumerate(("on", "off", "=1+1"))]


pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    file = folder / "outstation.toml"
    file.write_text(CONFIG, encoding="utf-8")
    table = "t,temperature,state\n" + "".join(f"{t},{value},{text}\n" for t, value, text in ROWS)
    (folder / "rows.csv").write_text(table, encoding="utf-8")
    run(file, "ingest", "room", str(folder / "rows.csv"))
    return file


def run(file: Path, *args: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli, [*args, "-c", str(file)])
    assert result.exit_code == code, result.output
    return result.output


def refuse(file: Path, *args: str) -> str:
    result = CliRunner().invoke(cli, [*args, "-c", str(file)])
    assert result.exception is not None
    return str(result.exception)


def test_readings_come_back_as_csv_with_their_times_and_no_formula(device: Path) -> None:
    rows = [*csv.DictReader(io.StringIO(run(device, "db", "readings", "room", "--csv")))]
    assert [(row["row"], row["temperature"]) for row in rows] == [("1", "20.5"), ("2", "21.5"), ("3", "22.5")]
    assert [row["time"] for row in rows] == [t.replace("Z", ".000000Z") for t, _, _ in ROWS]
    assert [row["state"] for row in rows] == ["on", "off", "'=1+1"]


def test_readings_of_a_range_of_time(device: Path) -> None:
    text = run(device, "db", "readings", "room", "--since", ROWS[1][0], "--until", ROWS[2][0], "--json")
    [row] = json.loads(text)
    assert row.pop("clock") in ("synced", "restored", "unsynced")
    assert row == {"row": 2, "time": "2026-11-20T10:00:01.000000Z", "temperature": 21.5, "state": "off"}


def test_readings_of_a_range_of_time_read_no_chunk_outside_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, hour_us, begin = tmp_path / "outstation.toml", 3_600_000_000, 1_795_000_000_000_000
    file.write_text(CONFIG, encoding="utf-8")
    conf, unpacked = load_config(str(file))[1], list[int]()
    # Chunks of a second; one came late, and one goes two hours back, so that its offsets are long.
    hours, n = [*range(20), 7, *range(20, 40)], 1000
    with contextlib.closing(open_store(conf)) as store:
        for hour in hours:
            t = begin + hour * hour_us + np.arange(n, dtype=np.int64) * 1000
            t[-1] -= 2 * hour_us if hour == 30 else 0
            with store.transaction() as tx:
                tx.append("room", Rows(t, (np.ones(n, "<f4"), np.zeros(n, "<u2"))), "synced")

    def unpack(chunk: PackedChunk, fields: Sequence[FieldConfig]) -> tuple[NDArray[Any], ...]:
        unpacked.append(chunk.first_t)
        return unpack_columns(chunk, fields)

    monkeypatch.setattr("outstation.device.store.row_batch.unpack_columns", unpack)

    def listed(first: int, end: int) -> list[int]:
        since, until = (clock.to_rfc3339(begin + hour * hour_us) for hour in (first, end))
        return [
            row["row"]
            for row in json.loads(run(file, "db", "readings", "room", "--since", since, "--until", until, "--json"))
        ]

    assert listed(7, 8) == [*range(7 * n + 1, 8 * n + 1), *range(20 * n + 1, 21 * n + 1)]
    # These two, the one that could hold any time, and one before each: 71 minutes fit into short offsets.
    assert len(unpacked) <= 5
    assert listed(28, 29) == [*range(29 * n + 1, 30 * n + 1), 32 * n]


def test_tables_schema_and_rows_of_the_store(device: Path) -> None:
    tables = {entry.get("table"): entry for entry in json.loads(run(device, "db", "tables", "--json"))}
    assert tables["streams"]["rows"] == 1
    assert "CREATE TABLE" in run(device, "db", "schema", "chunks")
    [row] = json.loads(run(device, "db", "rows", "categories", "--where", "value = 'off'", "--json"))
    assert (row["stream"], row["field"], row["code"]) == ("room", "state", 2)
    assert "bytes" in run(device, "db", "rows", "chunks")
    assert run(device, "db", "query", "SELECT count(*) AS n FROM checked_categories", "--csv") == "n\n3\n"


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("rows", "stream"), "did you mean 'streams'"),
        (("rows", "streams", "--where", "nonsense"), "no such column: nonsense; `schema TABLE` shows the columns"),
        (("query", "SELEC 1"), "syntax error; write the statement in SQL as SQLite reads it"),
        (("query", " "), "there is no statement; write one"),
        (("query", "SELECT * FROM nope"), "no such table: nope; `tables` lists them"),
        (("query", "DELETE FROM streams"), "readonly database; a query reads this database only"),
        (("query", "ATTACH '/tmp/other.db' AS other"), "not authorized"),
        (("query", "SELECT 1; SELECT 2"), "one statement at a time"),
        (("query", "VACUUM INTO '/tmp/other.db'"), "this database only"),
        (("query", "PRAGMA query_only = 0"), "this database only"),
        (("query", "BEGIN"), "returns no rows"),
        (("query", "PRAGMA journal_mode = delete"), "this database only"),
        (("query", "PRAGMA user_version = 9"), "readonly database"),
        (("readings", "rom"), "did you mean 'room'"),
        (("readings", "room", "--csv", "--json"), "choose one of them"),
    ],
)
def test_what_is_refused_is_named_and_changes_nothing(device: Path, args: tuple[str, ...], reason: str) -> None:
    before = sorted((path.name, path.read_bytes()) for path in (device.parent / "data").glob("outstation.db"))
    assert reason in refuse(device, "db", *args)
    assert sorted((path.name, path.read_bytes()) for path in (device.parent / "data").glob("outstation.db")) == before


def test_columns_of_one_name_are_numbered(device: Path) -> None:
    assert json.loads(run(device, "db", "query", "SELECT 1 AS n, 2 AS n", "--json")) == [{"n": 1, "n_2": 2}]


def test_a_query_that_goes_on_is_ended(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_MAX_QUERY_S", 0.05)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    assert "was ended" in refuse(device, "db", "query", endless)
    monkeypatch.setattr(inspection, "_MAX_QUERY_S", 20.0)
    monkeypatch.setattr(inspection, "_MAX_ROWS", 2)
    assert "more than 2 rows" in refuse(device, "db", "query", "SELECT 1 UNION SELECT 2 UNION SELECT 3")


def test_a_query_needs_no_lock_that_the_writer_holds(device: Path) -> None:
    _, conf = load_config(str(device))
    writer = sqlite3.connect(conf.data_dir / "outstation.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert json.loads(run(device, "db", "query", "SELECT 1 AS one", "--json")) == [{"one": 1}]
    writer.execute("ROLLBACK")
    writer.close()


def test_the_collectors_database_is_read_where_it_is_sqlite(tmp_path: Path) -> None:
    def run_fleet(*args: str) -> Result:
        return CliRunner().invoke(cli, ["fleet", *args, "--dir", str(tmp_path / "acme")])

    assert CliRunner().invoke(cli, ["fleet", "init", str(tmp_path / "acme")]).exit_code == 0
    assert "no database yet" in str(run_fleet("db", "tables").exception)
    FleetStore(tmp_path / "acme" / "fleet.db").close()
    assert "messages" in run_fleet("db", "tables").output
    assert json.loads(run_fleet("db", "query", "SELECT count(*) AS n FROM messages", "--json").output) == [{"n": 0}]
    refusal = run_fleet("db", "tables", "--db", "postgresql://someone:secret@127.0.0.1/fleet")
    assert "is PostgreSQL: open it with psql" in str(refusal.exception)
    assert "secret" not in str(refusal.exception)
