"""Row checksums: a changed cell of any table is found when the store is opened, and the row is counted as lost."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from outstation.device.recovery import findings
from outstation.device.recovery.open import open_store
from outstation.device.store.store import Store
from outstation.device.store.tables import row_crc, schema
from outstation.foundation.errors import StorageDamaged
from scripts.kit.stores import alarms, filled, opened, outbox_payloads

_BLOBS = {"data", "correlation"}
_TEXTS = {
    "name",
    "fields",
    "stream",
    "field",
    "value",
    "task",
    "source",
    "item",
    "body",
    "kid",
    "id",
    "args",
    "reply_key",
}
LOADED = [(table, column) for table in row_crc.TABLES for column in schema.columns(schema.STEPS)[table]]


def cell(table: str, column: str) -> Any:
    if column in _BLOBS or (table, column) == ("task_state", "value"):
        return b"bytes"
    is_number = (table, column) in (("streams", "id"), ("quarantined_rows", "stream"))
    return "text" if column in _TEXTS and not is_number else 7


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store with a row in every table."""
    folder = tmp_path_factory.mktemp("whole")
    store, _ = filled(folder, chunks=3, messages=5, acknowledged=2)
    for table in row_crc.TABLES:
        names = [name for name in schema.columns(schema.STEPS)[table] if name != "crc"]
        sql = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        store._db.execute(sql, [cell(table, name) for name in names])
    assert row_crc.find_damage(store._db, large=True) is None
    store.close()
    return folder


@pytest.mark.parametrize(("table", "column"), LOADED)
def test_a_changed_cell_of_any_table_is_detected(whole: Path, tmp_path: Path, table: str, column: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "d")
    with contextlib.closing(sqlite3.connect(folder / "outstation.db", isolation_level=None)) as db:
        # Without a clean stop the large tables are looked through, too.
        db.execute("DELETE FROM meta WHERE key = ?", (findings.CLEAN_STOP,))
        values = [row[0] for row in db.execute(f"SELECT {column} FROM {table}")]
        changed = values[-1] + (b"x" if isinstance(values[-1], bytes) else "x" if isinstance(values[-1], str) else 8)
        where = f"{column} IS ?" if len(values) == 1 else f"rowid = (SELECT max(rowid) FROM {table})"
        if "WITHOUT ROWID" in db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0]:
            where = f"{column} IS ?"
        db.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", [changed, values[-1]][: 1 + ("IS ?" in where)])
    if table not in ("predictions", "quarantined_rows"):
        with pytest.raises(StorageDamaged, match=f"a row of table {table} is not what was written"):
            Store.open_read_only(folder)
    store, _ = opened(folder)
    try:
        assert row_crc.find_damage(store._db, large=True) is None
        [alarm] = alarms(outbox_payloads(store))
        assert f"a row of table {table} is not what was written" in alarm["summary"]
        assert f"by table: {table} 1." in alarm["summary"]
    finally:
        store.close()


@pytest.mark.parametrize("name", ["cursors", "outbox", "streams", "chunk_rows", "predictions", "_sqlite_migrations"])
@pytest.mark.parametrize("byte", [5, 13, 20])
def test_a_changed_description_of_a_table_costs_nothing(tmp_path: Path, name: str, byte: int) -> None:
    store, _ = filled(tmp_path, chunks=3, messages=5, acknowledged=2)
    store.close()
    data = bytearray((tmp_path / "outstation.db").read_bytes())
    at = data.index(b"CREATE " + (b"UNIQUE INDEX " if name == "chunk_rows" else b"TABLE "), 100)
    at = data.index(name.encode(), 100) if name == "_sqlite_migrations" else data.index(b" " + name.encode() + b" ", at)
    data[at + byte] ^= 1
    (tmp_path / "outstation.db").write_bytes(data)
    with open_store(tmp_path) as store:
        assert [m.seq for m in store.unacknowledged_messages(0, 10)] == [3, 4, 5]
        assert (store.last_row("numbers"), store.cursor("judge")) == (30, 25)
        assert store.load_state("judge", "drift") == b"state"
