"""Damaged values of table meta: never used, and rebuilt without an operator."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import msgspec
import numpy as np
import pytest

from outstation.device.recovery.findings import NEW_LOG, NewLogPlan
from outstation.device.store import retention
from outstation.device.store.predictions import StoredPredictions
from outstation.foundation import clock
from outstation.foundation.errors import StorageDamaged
from outstation.ml.performance.labels import Label
from scripts.kit.stores import alarms, append, append_message, filled, opened, outbox_payloads, pulled, served

ROWS, MESSAGES = 100, 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store after a power cut; `early` beside it is the watermark as it was two messages before."""
    folder = tmp_path_factory.mktemp("meta")
    store, author = filled(folder / "live", chunks=10, messages=MESSAGES - 2, acknowledged=4)
    with store.transaction() as tx:
        tx.set_meta(retention.UPTIME, retention.uptime_json(store.boot, clock.read(), 100.0))
        tx.set_meta(retention.ACKNOWLEDGED_HISTORY, "[[10,4]]")
        tx.set_meta(retention.GROWTH, "[[600,1000],[1200,2000]]")
        tx.raise_time_floor(1_764_022_680_000_000)
    shutil.copyfile(folder / "live" / "watermark", folder / "early")
    for number in range(2):
        append_message(store, author, f"late {number}")
    pulled(folder / "live", folder / "copy", store, emptied=True)
    store.close()
    return folder / "copy"


def keys(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "outstation.db")) as db:
        return [str(row[0]) for row in db.execute("SELECT key FROM meta WHERE value != '' ORDER BY key")]


def damage(folder: Path, sql: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(folder / "outstation.db", isolation_level=None)) as db:
        assert db.execute(sql, values).rowcount == 1


def flip(folder: Path, key: str, bit: int) -> None:
    """Change one bit of the first byte of a value."""
    with contextlib.closing(sqlite3.connect(folder / "outstation.db")) as db:
        value = db.execute("SELECT CAST(value AS BLOB) FROM meta WHERE key = ?", (key,)).fetchone()[0]
    changed = bytes([value[0] ^ bit, *value[1:]])
    damage(folder, "UPDATE meta SET value = CAST(? AS TEXT) WHERE key = ?", changed, key)


@pytest.mark.parametrize("mark", ["as it was", "older", "gone"])
def test_any_value_may_be_damaged_and_nothing_is_lost_or_numbered_twice(whole: Path, tmp_path: Path, mark: str) -> None:
    with contextlib.closing(sqlite3.connect(whole / "outstation.db")) as db:
        old = db.execute("SELECT value FROM meta WHERE key = 'log'").fetchone()[0]
    stored = keys(whole)
    assert {"log", "seq", "boot"} <= set(stored)
    for number, key in enumerate(stored):
        folder = shutil.copytree(whole, tmp_path / str(number))
        if mark == "gone":
            (folder / "watermark").unlink()
        elif mark == "older":
            shutil.copyfile(whole.parent / "early", folder / "watermark")
        flip(folder, key, 0x80 if number % 2 else 0x04)
        store, author = opened(folder)
        assert set(served(store)) == set(range(1, ROWS + 1)), key
        texts = {" ".join(body["summary"].split()[:2]) for body in outbox_payloads(store).values()}
        assert {"message 9", "late 0", "late 1"} <= texts, key
        assert store.log_id != old or append_message(store, author, "next") > MESSAGES, key
        assert any("table meta" in body["summary"] for body in alarms(outbox_payloads(store))), key
        if mark != "gone":
            assert store.log_id == old, key
        store.close()
        again, _ = opened(folder)
        again.close()
        assert len(list((folder / "quarantine").iterdir())) == 1, key


@pytest.mark.parametrize("change", ["key = 'sep' WHERE key = 'seq'", "crc = crc + 1 WHERE key = 'boot'"])
def test_a_name_or_a_crc_may_be_damaged_too(whole: Path, tmp_path: Path, change: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "d")
    damage(folder, f"UPDATE meta SET {change}")
    store, author = opened(folder)
    assert append_message(store, author, "next") > MESSAGES
    assert set(served(store)) == set(range(1, ROWS + 1))
    store.close()


def test_a_lost_boot_number_is_above_those_of_all_rows(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "d")
    store, _ = opened(folder)
    store.boot = 5
    append(store, "numbers", 10)
    store.close()
    (folder / "watermark").unlink()
    damage(folder, "UPDATE meta SET value = '9' WHERE key = 'boot'")
    store, _ = opened(folder)
    assert store.boot == 6
    store.close()


def test_labels_that_a_commit_took_with_it_are_declared(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "live", chunks=3, messages=5, acknowledged=2)
    rows = np.arange(1, 4, dtype=np.int64)
    with store.transaction() as tx:
        tx.labels.store_predictions("judge", StoredPredictions("sha256:a", rows, rows, rows % 2, None, None, {}), 0.0)
    before = pulled(tmp_path / "live", tmp_path / "before")
    for row in (1, 2):
        with store.transaction() as tx:
            prediction = tx.labels.find_by_row("judge", row)
            assert prediction is not None
            assert tx.labels.store_label("judge", Label(row, None, "high"), prediction, 7) == "new"
    after = pulled(tmp_path / "live", tmp_path / "after")
    store.close()
    shutil.copy(after / "watermark", before / "watermark")
    store, _ = opened(before)
    [alarm] = alarms(outbox_payloads(store))
    assert "Labels are lost, the newest 2 of judge: send them again." in alarm["summary"]
    store.close()


def test_a_lost_new_log_plan_leads_to_another_new_log(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "d")
    store, _author = opened(folder)
    old = store.log_id
    plan = NewLogPlan(reason="The store was restored from a copy.", old=old, through=10**6)
    with store.transaction() as tx:
        tx.set_meta(NEW_LOG, msgspec.json.encode(plan).decode())
    store.close()
    flip(folder, NEW_LOG, 0x01)
    store, _author = opened(folder)
    assert store.log_id != old
    assert all(body["log"] == store.log_id for body in outbox_payloads(store).values())
    assert {"late 0", "late 1"} <= {body["summary"] for body in outbox_payloads(store).values()}
    store.close()


def test_a_value_that_is_damaged_while_the_agent_runs_is_not_believed(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "d")
    store, _ = opened(folder)
    damage(folder, "UPDATE meta SET value = '71' WHERE key = 'seq'")
    with pytest.raises(StorageDamaged, match="row 'seq' of table meta"):
        store.outbox_size()
    store.close()
    store, author = opened(folder)
    assert MESSAGES < append_message(store, author, "next") < 71
    append(store, "numbers", 10)
    store.close()
