"""SQL over an export: a view for each kind, and no way to other files, the network or changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from outstation.fleet.cli.data.export import _KINDS
from outstation.fleet.cli.group import fleet
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.export.export import export
from outstation.fleet.export.manifest import sha256
from outstation.fleet.export.query import ExportQueries
from outstation.fleet.export.tables import KINDS, Filters
from outstation.foundation.errors import UsageError
from outstation.workbench.testing.messages import FLEET, MessageSender, new_key

NOW = "2026-11-25T12:00:00.000000Z"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported")
    store, sender = FleetStore(path / "fleet.db"), MessageSender()
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    columns = {"row": [1, 2], "t": [1_764_022_680_000_000] * 2, "value": [1, 2], "value_hum": [0.5, None]}
    sent = [sender.results(2, rows_at=(1, 2), columns=columns, faults=["=cmd()"]), sender.alert(summary="=1+1\x1b[31m")]
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW)
    export(store, path / "it's", FLEET, Filters(), new_key(99))
    store.close()
    return path / "it's"


def run(folder: Path, *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(fleet, ["sql", "--export", str(folder), *arguments], input=stdin)


def test_each_kind_is_a_view_also_without_rows(folder: Path) -> None:
    queries = ExportQueries(folder)
    for name, kind in KINDS.items():
        columns, rows = queries.query(f"SELECT * FROM {name}")
        assert columns == [*kind.names, "day"]
        assert len([*rows]) == {"results": 2, "result_messages": 1, "alerts": 1}.get(name, 0)
    queries.close()
    assert tuple(KINDS) == _KINDS


def test_values_as_table_json_and_csv(folder: Path) -> None:
    query = "SELECT row, t, outputs['value_hum'] AS hum, faults, day FROM results ORDER BY row"
    assert json.loads(run(folder, "--json", query).stdout) == [
        {"row": 1, "t": "2025-11-24T22:18:00Z", "hum": 0.5, "faults": ["=cmd()"], "day": "2025-11-24"},
        {"row": 2, "t": "2025-11-24T22:18:00Z", "hum": None, "faults": ["=cmd()"], "day": "2025-11-24"},
    ]
    assert run(folder, "--csv", "-", stdin="SELECT summary, 1.5 AS n, NULL AS x FROM alerts").stdout == (
        "summary,n,x\n'=1+1\\x1b[31m,1.5,\n"
    )
    assert "0.500" in run(folder, query).stdout
    assert "results" in run(folder).stdout
    assert json.loads(run(folder, "--json", "SELECT 1 FROM shadows").stdout) == []


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_parquet('https://example.org/a.parquet')",
        "SELECT * FROM glob('/etc/*')",
        "COPY results TO '/tmp/copied.csv'",
        "COPY (SELECT 1) TO 'manifest.json'",
        "ATTACH '/tmp/other.db'",
        "INSTALL httpfs",
        "LOAD sqlite",
        "SET enable_external_access = true",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW results",
        "EXPORT DATABASE '/tmp/x'",
        "CALL pragma_version()",
        "SELECT 1; DROP VIEW results",
        "SELECT * FROM store",
        "",
        "SELEC 1",
        "SELECT * FROM nowhere",
    ],
)
def test_nothing_but_a_query_of_the_export_runs(folder: Path, query: str) -> None:
    store = 7  # A Python variable that a query must not reach.
    queries = ExportQueries(folder)
    with pytest.raises(UsageError):
        list(queries.query(query)[1])
    queries.close()
    assert store == 7


@pytest.mark.parametrize("attack", ["path", "day", "kind", "link"])
def test_a_forged_chunk_does_not_read_other_files(folder: Path, tmp_path: Path, attack: str) -> None:
    forged, private = tmp_path / "forged", tmp_path / "private"
    shutil.copytree(folder, forged)
    shutil.copytree(folder, private)
    chunk_file, manifest_file = next(forged.glob("_chunks/*")), forged / "manifest.json"
    chunk, manifest = json.loads(chunk_file.read_bytes()), json.loads(manifest_file.read_bytes())
    entry = next(file for file in chunk["files"] if file["kind"] == "results")
    path = entry["path"]
    if attack == "path":
        entry["path"] = str(private / path)
    elif attack == "day":
        entry["day"] = f"../../private/kind=results/day={entry['day']}"
        entry["path"] = f"kind=results/day={entry['day']}/{Path(path).name}"
    elif attack == "kind":
        entry["kind"] = "../../private/kind=results"
        entry["path"] = path.replace("results", entry["kind"], 1)
    else:
        (forged / path).unlink()
        (forged / path).symlink_to(private / path)
    chunk_file.write_text(json.dumps(chunk))
    manifest["last"] = sha256(chunk_file.read_bytes())
    manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"name than its kind|does not know|symbolic link"):
        ExportQueries(forged)


def test_without_an_export_the_shell_of_the_database_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, "SELECT 1")
    assert isinstance(result.exception, UsageError)
    assert "fleet db export --out DIR" in str(result.exception)
