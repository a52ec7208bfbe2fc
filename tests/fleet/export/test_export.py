"""Export to Parquet: every row with its type, resumable wherever it is killed, and audited by the signed messages."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.maintenance.retention import Retention
from outstation.fleet.database.store import FleetStore
from outstation.fleet.export import export as exporting
from outstation.fleet.export import manifest as manifests
from outstation.fleet.export.check import check_export
from outstation.fleet.export.export import export
from outstation.fleet.export.tables import KINDS, NO_DAY, Filters
from outstation.fleet.retention.prune import prune
from outstation.foundation import clock, durable_files
from outstation.foundation.config.quantities import Duration
from outstation.foundation.errors import UsageError
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage, new_key

NOW = "2025-11-25T12:00:00.000000Z"
MADE: dict[str, Any] = {"agent": "0.1.0", "runtime": "ai-edge-litert 2.3.0", "config": "sha256:01"}
KEY = new_key(99)
T = 1_764_022_680_000_000  # 2025-11-24T22:18:00Z


def ingest(store: FleetStore, sender: MessageSender, *sent: SignedMessage, now: str = NOW) -> None:
    if store.active_key(sender.device) is None:
        store.enrol(sender.device, sender.key.public, replace=False, now=now)
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], now)


def every_kind(sender: MessageSender) -> list[SignedMessage]:
    row = sender.row + 1
    columns = {"row": [row, row + 1], "t": [T, T + 1], "value": [1.5, None], "missing": [0, 0.25]}
    metrics = [{"metric": "accuracy", "value": 0.9, "low": 0.8, "high": 0.95, "n": 20}]
    time: dict[str, Any] = {"time": "2025-11-24T22:18:01.000000Z"}
    window = {"index": 1, "rows": [1, 2000], "from": time["time"], "to": "2025-11-24T23:00:00.000000Z", "n": 2000}
    return [
        sender.results(
            2,
            rows_at=(row, row + 1),
            columns={**columns, "value_hum": [0.5, None]},
            made=MADE,
            incomplete=1,
            faults=["ax"],
            **time,
        ),
        sender.results(3, made=MADE, **time),
        sender.drift("drift", window=window, **time),
        sender.alert(**time),
        sender.append("quality", task=sender.task, metrics=metrics, **time),
        sender.shadow(**time),
        sender.rollout("shadow"),
        sender.health(),
    ]


def read(folder: Path, kind: str) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"kind={kind}/day=*/*.parquet"))
    return [row for file in files for row in parquet.ParquetFile(file).read().to_pylist()]


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_kind_has_its_rows_typed_by_day(store: FleetStore, tmp_path: Path) -> None:
    sender = MessageSender()
    ingest(store, sender, *every_kind(sender))
    summary = export(store, tmp_path / "out", FLEET, Filters(), KEY)
    assert summary.messages == 8
    assert summary.rows == {"results": 5, "result_messages": 2, **dict.fromkeys([*KINDS][2:], 1)}
    first, second, *_ = read(tmp_path / "out", "results")
    moment = datetime.fromtimestamp(T / 1e6, UTC)
    assert first["t"] == moment
    assert {name: first[name] for name in ("device", "row", "value", "missing", "outputs", "faults", "runtime")} == {
        "device": "pi-07", "row": 1, "value": 1.5, "missing": 0.0, "outputs": [("value_hum", 0.5)], "faults": ["ax"],
        "runtime": MADE["runtime"],
    }  # fmt: skip
    assert second["outputs"] == [("value_hum", None)]
    [window] = read(tmp_path / "out", "drift_windows")
    assert window["to"] == datetime(2025, 11, 24, 23, tzinfo=UTC)
    [message, _] = read(tmp_path / "out", "result_messages")
    assert (message["n"], message["incomplete"], message["config"]) == (2, 1, "sha256:01")
    folders = {path.parent.name for path in (tmp_path / "out").glob("kind=*/day=*/*")}
    assert "day=2025-11-24" in folders
    file = next((tmp_path / "out").glob("kind=results/day=*/*"))
    schema = parquet.ParquetFile(file).schema_arrow
    assert schema.field("t").type == pa.timestamp("us", "UTC")
    assert pa.types.is_dictionary(schema.field("label").type)
    assert schema.field("t").metadata[b"unit"] == b"us"
    assert schema.field("missing").metadata[b"unit"] == b"1"
    assert file.stat().st_mode & 0o777 == 0o600
    assert check_export(store, tmp_path / "out", FLEET, [KEY.public]).to_dict() | {"folder": ""} == {
        "passed": True, "folder": "", "files": summary.files, "rows": sum(summary.rows.values()), "messages": 8,
        "pending": 0, "pruned": 0, "leftovers": 0, "problem_count": 0, "problems": [],
    }  # fmt: skip


def test_columns_are_those_of_the_tables(store: FleetStore) -> None:
    with store.snapshot() as db:
        for name, kind in KINDS.items():
            columns = [column[0] for column in db.execute(f"SELECT * FROM {name} LIMIT 0").description]
            columns = [column for column in columns if column not in ("rowid", "provenance")]
            assert kind.names[: len(columns)] == columns, name


def test_a_second_run_adds_what_is_new_also_before_the_newest(store: FleetStore, tmp_path: Path) -> None:
    sender = MessageSender()
    sent = [sender.results(1) for _ in range(5)]
    ingest(store, sender, *sent[:2], sent[4])
    assert export(store, tmp_path / "out", FLEET, Filters(), KEY).messages == 3
    before = digests(tmp_path / "out")
    assert export(store, tmp_path / "out", FLEET, Filters(), KEY).messages == 0
    assert digests(tmp_path / "out") == before
    ingest(store, sender, *sent)
    assert check_export(store, tmp_path / "out", FLEET, [KEY.public]).pending == 2
    assert export(store, tmp_path / "out", FLEET, Filters(), KEY).messages == 2
    after = digests(tmp_path / "out")
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: digest for name, digest in before.items() if name != "manifest.json"
    }
    assert sorted(row["seq"] for row in read(tmp_path / "out", "results")) == [1, 2, 3, 4, 5]
    assert check_export(store, tmp_path / "out", FLEET, [KEY.public]).passed


@pytest.mark.parametrize("steps", range(1, 14))
def test_interrupted_after_any_write_and_run_again_it_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    store, sender = FleetStore(tmp_path / "fleet.db"), MessageSender()
    monkeypatch.setattr(exporting, "_CHUNK_MESSAGES", 3)
    monkeypatch.setattr(exporting, "_CHUNK_ROWS", 4)
    ingest(store, sender, *every_kind(sender))
    export(store, tmp_path / "whole", FLEET, Filters(), KEY)
    written = 0
    original = durable_files.write

    class Killed(BaseException):
        pass

    def write(path: Path, data: bytes, mode: int) -> None:
        nonlocal written
        written += 1
        if written == steps:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name + ".new").write_bytes(data[: len(data) // 2])
            raise Killed
        original(path, data, mode)

    monkeypatch.setattr(durable_files, "write", write)
    with pytest.raises(Killed):
        export(store, tmp_path / "cut", FLEET, Filters(), KEY)
    monkeypatch.undo()
    monkeypatch.setattr(exporting, "_CHUNK_MESSAGES", 3)
    monkeypatch.setattr(exporting, "_CHUNK_ROWS", 4)
    export(store, tmp_path / "cut", FLEET, Filters(), KEY)
    parts = {name: digest for name, digest in digests(tmp_path / "cut").items() if not name.endswith(".new")}
    assert parts == digests(tmp_path / "whole")
    report = check_export(store, tmp_path / "cut", FLEET, [KEY.public])
    assert (report.passed, report.leftovers, report.pending) == (True, 0, 0)
    store.close()


def test_filters_select_rows_and_bind_the_folder(store: FleetStore, tmp_path: Path) -> None:
    first, second = MessageSender("pi-07"), MessageSender("pi-08", task="other")
    ingest(store, first, *every_kind(first))
    ingest(store, second, *every_kind(second))
    since = "2025-11-24T22:18:00.000001Z"
    filters = Filters(kinds=("results", "alerts"), device="pi-07", since=since, until="2025-11-24T22:18:01.000000Z")
    export(store, tmp_path / "out", FLEET, filters, KEY)
    assert {row["device"] for row in read(tmp_path / "out", "results")} == {"pi-07"}
    assert min(row["t"] for row in read(tmp_path / "out", "results")) == datetime.fromisoformat(since)
    assert read(tmp_path / "out", "alerts") == []
    export(store, tmp_path / "tasks", FLEET, Filters(task="other"), KEY)
    assert {row["task"] for row in read(tmp_path / "tasks", "metrics")} == {"other"}
    for folder in ("out", "tasks"):
        assert check_export(store, tmp_path / folder, FLEET, [KEY.public]).passed
    with pytest.raises(UsageError, match="repeat these options"):
        export(store, tmp_path / "out", FLEET, Filters(device="pi-08"), KEY)
    with pytest.raises(UsageError, match="not of 'other'"):
        export(store, tmp_path / "out", "other", filters, KEY)
    # Without options, the first ones hold.
    assert export(store, tmp_path / "out", FLEET, Filters(), KEY).messages == 0


def test_a_folder_with_other_files_is_refused(store: FleetStore, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"has other files, such as 'thesis\.tex'"):
        export(store, tmp_path, FLEET, Filters(), KEY)


@pytest.mark.attack("audit")
@pytest.mark.parametrize(
    "attack", ["row", "file", "chunk", "deleted", "message", "manifest", "dropped", "unsigned", "stranger"]
)
def test_a_changed_export_fails_its_audit(tmp_path: Path, attack: str) -> None:
    store, sender, out = FleetStore(tmp_path / "fleet.db"), MessageSender(), tmp_path / "out"
    ingest(store, sender, *every_kind(sender))
    export(store, out, FLEET, Filters(), KEY)
    file, chunk = next(out.glob("kind=results/day=*/*")), next(out.glob("_chunks/*"))
    if attack == "row":
        # The forger also writes the hashes.
        table = parquet.ParquetFile(file).read()
        values = pa.array([9.5, *table["value"].to_pylist()[1:]], pa.float64())
        at = table.column_names.index("value")
        forged = exporting.to_parquet(table.set_column(at, table.field("value"), values))
        _replace(out, chunk, file, forged)
    elif attack == "file":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif attack == "chunk":
        chunk.write_bytes(chunk.read_bytes() + b" ")
    elif attack == "deleted":
        file.unlink()
    elif attack == "message":
        with store.transaction() as db:
            db.execute("UPDATE messages SET payload = replace(payload, 'ax', 'ay') WHERE kind = 'results'")
    elif attack == "manifest":
        manifest = json.loads((out / "manifest.json").read_bytes())
        (out / "manifest.json").write_text(json.dumps({**manifest, "fleet": "other"}))
    elif attack in ("unsigned", "stranger"):
        forged_manifest = manifests.load(out)
        assert forged_manifest is not None
        forged_manifest.save(out, new_key(98))
        if attack == "unsigned":
            text = (out / "manifest.json").read_text().replace(forged_manifest.jws, "")
            (out / "manifest.json").write_text(text)
        with pytest.raises(UsageError, match="is not signed by a collector of this fleet"):
            export(store, out, FLEET, Filters(), KEY)
        assert check_export(store, out, FLEET, [new_key(98).public]).passed == (attack == "stranger")
    else:
        _replace(out, chunk, file, None)
    assert not check_export(store, out, FLEET, [KEY.public]).passed
    store.close()


@pytest.mark.attack("audit")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_signed_manifest_covers_every_chunk_and_does_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(exporting, "_CHUNK_MESSAGES", 2)
    store, sender, out = FleetStore(tmp_path / "fleet.db"), MessageSender(), tmp_path / "out"
    ingest(store, sender, *(sender.results(1) for _ in range(2)))
    export(store, out, FLEET, Filters(), KEY)
    size = (out / "manifest.json").stat().st_size
    ingest(store, sender, *(sender.results(1) for _ in range(4)))
    export(store, out, FLEET, Filters(), KEY)
    assert (out / "manifest.json").stat().st_size == size
    assert check_export(store, out, FLEET, [KEY.public]).passed
    file = out / f"_chunks/chunk-{number:06}.json"
    file.write_bytes(file.read_bytes() + b" ")
    assert not check_export(store, out, FLEET, [KEY.public]).passed
    with pytest.raises(UsageError, match=r"does not follow the chunk before|is not the file that manifest"):
        export(store, out, FLEET, Filters(), KEY)
    store.close()


def _replace(out: Path, chunk_file: Path, file: Path, data: bytes | None) -> None:
    """Replace a file, or drop it where `data` is None, and write the hashes that say so."""
    chunk = json.loads(chunk_file.read_bytes())
    path = str(file.relative_to(out))
    if data is None:
        file.unlink()
        chunk["files"] = [entry for entry in chunk["files"] if entry["path"] != path]
    else:
        file.write_bytes(data)
        for entry in chunk["files"]:
            if entry["path"] == path:
                entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    chunk_file.write_text(json.dumps(chunk))
    manifest = manifests.load(out)
    assert manifest is not None
    manifest.last = hashlib.sha256(chunk_file.read_bytes()).hexdigest()
    manifest.save(out, KEY)


def test_rows_of_pruned_messages_are_compared_by_their_hash(store: FleetStore, tmp_path: Path) -> None:
    sender, out = MessageSender(), tmp_path / "out"
    ingest(store, sender, *every_kind(sender))
    ingest(store, sender, *every_kind(sender), now="2026-11-25T12:00:00.000000Z")
    export(store, out, FLEET, Filters(), KEY)
    now_us = clock.parse_rfc3339("2026-11-26T12:00:00Z")
    result = prune(store, Retention(messages=Duration(86400.0 * 30)), FLEET, KEY, [KEY.public], now_us)
    assert not result.refused
    [pruned] = result.devices
    report = check_export(store, out, FLEET, [KEY.public])
    assert (report.passed, report.pruned, report.messages) == (True, pruned.messages, 8)
    # Without the statement they are missing; a changed row of a message that stays is found.
    assert check_export(store, out, FLEET, []).problem_count == 1 + pruned.messages
    file = next(out.glob("kind=results/day=*/*"))
    table = parquet.ParquetFile(file).read()
    at, values = table.column_names.index("value"), [9.5] * table.num_rows
    forged = table.set_column(at, table.field("value"), pa.array(values, pa.float64()))
    _replace(out, next(out.glob("_chunks/*")), file, exporting.to_parquet(forged))
    assert not check_export(store, out, FLEET, [KEY.public]).passed
    assert export(store, out, FLEET, Filters(), KEY).messages == 0


def test_rows_of_a_wrong_clock_share_one_partition(store: FleetStore, tmp_path: Path) -> None:
    sender = MessageSender()
    times = [0, 86_400_000_000, -(2**63), 2**63 - 1, T]
    columns = {"row": [1, 2, 3, 4, 5], "t": times, "label": ["a"] * 5}
    ingest(store, sender, sender.results(5, rows_at=(1, 5), columns=columns))
    export(store, tmp_path / "out", FLEET, Filters(kinds=("results",)), KEY)
    days = {path.name: parquet.ParquetFile(next(path.iterdir())).metadata.num_rows
            for path in (tmp_path / "out" / "kind=results").iterdir()}  # fmt: skip
    assert days == {f"day={NO_DAY}": 4, "day=2025-11-24": 1}
    assert check_export(store, tmp_path / "out", FLEET, [KEY.public]).passed


def test_two_exports_to_one_folder_take_turns(store: FleetStore, tmp_path: Path) -> None:
    with durable_files.lock(tmp_path / ".lock"), pytest.raises(UsageError, match="another export writes"):
        export(store, tmp_path, FLEET, Filters(), KEY)


def test_killed_by_a_signal_the_next_run_completes_the_set(tmp_path: Path) -> None:
    store, sender = FleetStore(tmp_path / "fleet.db"), MessageSender()
    ingest(store, sender, *(sender.results(5) for _ in range(300)))
    program = (
        "import sys; from pathlib import Path; from outstation.fleet.export import export as e;"
        "from outstation.fleet.database.store import FleetStore; from outstation.fleet.export.tables import Filters;"
        "e._CHUNK_MESSAGES = 10;"
        "e.export(FleetStore(sys.argv[1], read_only=True), Path(sys.argv[2]), 'acme', Filters(), "
        "lambda n: print(n, flush=True))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "fleet.db"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    export(store, tmp_path / "out", FLEET, Filters(), KEY)
    rows = [(row["seq"], row["row"]) for row in read(tmp_path / "out", "results")]
    assert len(rows) == len(set(rows)) == 1500
    assert check_export(store, tmp_path / "out", FLEET, [KEY.public]).passed
    store.close()
