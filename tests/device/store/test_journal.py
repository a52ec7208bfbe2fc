"""The journal of small commits: what is acknowledged from it is there, whoever reads, and whatever fails."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outstation.device.intake.group_commit import GroupCommit, SourcePosition
from outstation.device.recovery.open import open_store
from outstation.device.store import journal
from outstation.device.store.journal import JournaledConnection
from outstation.device.store.rows import RawColumns, Rows, validate_columns
from outstation.device.store.store import DATABASE, Store
from outstation.device.store.tables import meta
from outstation.device.store.tables.sqlite_errors import connect_read_only
from outstation.foundation import clock
from outstation.foundation.errors import StorageError, StorageMoved
from scripts.faults import cuts
from scripts.kit.stores import (
    NUMBERS,
    STREAMS,
    append,
    append_message,
    declared_numbers,
    opened,
    outbox_payloads,
    pulled,
    served,
)

# Of a record: id of the opening, number, length and CRC.
HEADER = 24


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store, _ = opened(tmp_path / "data")
    # Its texts are then known, so that the commits that follow are small.
    append(store, "numbers", 10)
    yield store
    store.close()


def rows_of(folder: Path) -> int:
    """Open a copy of a folder as after a power cut, and return how many rows it serves, all of them right."""
    store, _ = opened(folder)
    try:
        rows = served(store)
        assert rows == {n: n for n in range(1, len(rows) + 1)}
        assert store.last_row("numbers") == len(rows)
        return len(rows)
    finally:
        store.close()


def log_bytes(store: Store) -> bytes:
    return store.path.with_name(f"{DATABASE}-wal").read_bytes()


@pytest.mark.parametrize("seed", [1, 5, 8])
def test_power_cuts_at_each_write_lose_no_acknowledged_row(tmp_path: Path, seed: int) -> None:
    assert cuts.run_round(tmp_path, seed, steps=25, share=0.2) == []


def test_small_commits_leave_the_database_alone_and_are_seen_by_all_who_read(store: Store, tmp_path: Path) -> None:
    before = log_bytes(store)
    with Store.open_read_only(tmp_path / "data") as reader:
        assert reader.last_row("numbers") == 10
        for total in range(11, 60):
            append(store, "numbers", 1, small=True)
            assert store.last_row("numbers") == reader.last_row("numbers") == total
        assert log_bytes(store) == before
        assert served(store) == served(reader) == {n: n for n in range(1, 60)}
        assert reader.first_row("numbers") == 1
        store.fold()
        assert served(reader) == {n: n for n in range(1, 60)}


def test_what_the_intake_commits_goes_to_the_journal(store: Store) -> None:
    group = GroupCommit(store, STREAMS)
    now = clock.read()
    sizes = []
    for at in range(6):
        # The first commit notes the segment of the clock, and goes to the database.
        raw = RawColumns(2, [now.wall_us / 1e6 + at] * 2, {"n": [at, at + 100], "mode": ["low", f"new {at}"]})
        checked = validate_columns(raw, NUMBERS, now.wall_us, None)
        group.add_rows("producer", "numbers", checked, [at * 3 + 1, at * 3 + 2], now, client="gateway")
        group.reject("producer", at * 3 + 3, "is no row")
        group.advance("producer", at * 3 + 3, SourcePosition("socket", "gateway", at * 3 + 3))
        assert group.commit(now)["producer"].accepted == 2
        sizes.append(log_bytes(store))
    assert sizes[0] == sizes[-1]
    assert store.last_row("numbers") == 22
    assert store.source_position("socket", "gateway") == 18


def test_a_commit_of_a_thousand_rows_goes_past_the_journal(store: Store, tmp_path: Path) -> None:
    append(store, "numbers", 5, small=True)
    content = (tmp_path / "data" / journal.FILE_NAME).read_bytes()
    append(store, "numbers", 1000, small=True)
    assert (tmp_path / "data" / journal.FILE_NAME).read_bytes() == content
    assert rows_of(pulled(tmp_path / "data", tmp_path / "copy")) == 1015


def test_a_transaction_without_a_change_does_not_fold(store: Store) -> None:
    append(store, "numbers", 5, small=True)
    before = log_bytes(store)
    with store.transaction(vital=True) as tx:
        tx.delete_state("judge", "nothing")
    assert log_bytes(store) == before
    with store.transaction(vital=True) as tx:
        tx.save_state("judge", "drift", b"state")
    assert log_bytes(store) != before


def test_a_commit_that_fails_leaves_those_before_it(store: Store, tmp_path: Path) -> None:
    append(store, "numbers", 5, small=True)
    with contextlib.suppress(ZeroDivisionError), store.transaction(small=True) as tx:
        tx.increment_counter("lines rejected", 1)
        raise ZeroDivisionError
    # After some errors SQLite rolls back everything.
    with contextlib.suppress(ZeroDivisionError), store.transaction() as tx:
        tx.connection.execute("ROLLBACK")
        raise ZeroDivisionError
    append(store, "numbers", 5, small=True)
    assert len(served(store)) == 20
    assert store.counters().get("lines rejected", 0) == 0
    assert rows_of(pulled(tmp_path / "data", tmp_path / "copy")) == 20


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_journal_that_cannot_be_written_costs_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    append(store, "numbers", 5, small=True)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the card fails")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        append(store, "numbers", 5, small=True)
    append(store, "numbers", 5, small=True)
    assert rows_of(pulled(tmp_path / "data", tmp_path / "copy")) == 25


def test_a_commit_that_neither_file_takes_is_not_acknowledged(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, "numbers", 5, small=True)
    fdatasync = os.fdatasync

    def fail(file: int) -> None:
        fdatasync(file)
        # The database fails, too: its transaction is gone.
        store._db.execute("ROLLBACK")
        raise OSError(errno.EIO, "the card fails")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StorageError, match="neither the journal nor the database"):
            append(store, "numbers", 5, small=True)
    assert len(served(store)) == 15
    # The failed record is on the disk, and must not be applied behind another commit.
    for _ in range(3):
        append(store, "numbers", 1, small=True)
    assert rows_of(pulled(tmp_path / "data", tmp_path / "copy")) == 18


def test_without_room_for_the_journal_commits_go_to_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def full(file: int, data: bytes, offset: int) -> int:
        if len(data) == journal.SIZE:
            raise OSError(errno.ENOSPC, "no space")
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with open_store(tmp_path) as store:
        store.declare_streams(STREAMS)
        for _ in range(3):
            append(store, "numbers", 5, small=True)
        assert len(served(store)) == 15


@pytest.mark.parametrize("size", [journal.SIZE - 1, journal.SIZE + 4096, 20 << 10])
def test_a_journal_of_another_size_is_replayed(store: Store, tmp_path: Path, size: int) -> None:
    for _ in range(5):
        append(store, "numbers", 5, small=True)
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    os.truncate(copy / journal.FILE_NAME, size)
    assert rows_of(copy) == 35


def test_a_disk_that_takes_the_journal_in_parts_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, sizes = os.pwrite, list[int]()

    def take_a_part(file: int, data: bytes, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(file, data[:8192], offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", take_a_part)
        with open_store(tmp_path / "data"):
            assert len(sizes) > 1
    assert (tmp_path / "data" / journal.FILE_NAME).stat().st_size == journal.SIZE


def test_a_read_error_that_ends_the_open_transaction_loses_no_small_commit(store: Store, tmp_path: Path) -> None:
    for _ in range(5):
        append(store, "numbers", 5, small=True)
    # SQLite does so by itself after an error of the disk, also in a SELECT.
    store._db.execute("ROLLBACK")
    assert len(served(store)) == 35
    store._db.execute("ROLLBACK")
    append(store, "numbers", 5, small=True)
    assert len(served(store)) == 40
    store._db.execute("ROLLBACK")
    store.fold()
    with contextlib.closing(connect_read_only(store.path)) as other:
        assert other.execute("SELECT sum(n) FROM chunks").fetchone() == (40,)
    append(store, "numbers", 5, small=True)
    assert rows_of(pulled(tmp_path / "data", tmp_path / "copy")) == 45


def fail_next(monkeypatch: pytest.MonkeyPatch, statement: str) -> None:
    """Have the next run of a statement fail, as on a disk that fails, and end the open transaction."""
    execute = JournaledConnection.execute

    def fail(db: JournaledConnection, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        if sql != statement:
            return execute(db, sql, parameters)
        monkeypatch.setattr(JournaledConnection, "execute", execute)
        execute(db, "ROLLBACK")
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(JournaledConnection, "execute", fail)


@pytest.mark.parametrize("rows", [1000, 5])
def test_after_a_failed_commit_the_journal_takes_nothing_until_a_commit_succeeded(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    path = tmp_path / "data" / journal.FILE_NAME
    append(store, "numbers", 5, small=True)
    content = path.read_bytes()
    fail_next(monkeypatch, "COMMIT")
    with pytest.raises(StorageError):
        append(store, "numbers", rows)
    # The write-ahead log may hold the commit, which a crash would bring back over a record of the journal.
    append(store, "numbers", 5, small=True)
    assert path.read_bytes() == content
    append(store, "numbers", 5, small=True)
    assert path.read_bytes() != content
    assert rows_of(pulled(tmp_path / "data", tmp_path / "copy")) == 25


def test_small_commits_that_were_restored_in_part_are_restored_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        append(store, "numbers", 5, small=True)
    store._db.execute("ROLLBACK")
    apply, calls = journal.apply, list[int]()

    def fail(*record: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        apply(*record)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "apply", fail)
        with pytest.raises(MemoryError):
            store.last_row("numbers")
    append(store, "numbers", 5, small=True)
    assert store.last_row("numbers") == len(served(store)) == 40
    assert rows_of(pulled(tmp_path / "data", tmp_path / "copy")) == 40


def test_a_commit_that_fails_before_its_record_leaves_no_gap_in_the_numbers(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, "numbers", 5, small=True)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(meta, "put", fail)
        with pytest.raises(StorageError):
            append(store, "numbers", 5, small=True)
    append(store, "numbers", 5, small=True)
    restarted, _ = opened(pulled(tmp_path / "data", tmp_path / "copy"))
    with restarted:
        assert len(served(restarted)) == 20
        assert restarted.get_meta("last finding", "") == ""


@pytest.mark.parametrize("consumed", [0, 5])
def test_rows_lost_with_the_journal_before_the_first_batch_of_a_task_are_declared(
    tmp_path: Path, consumed: int
) -> None:
    store, log = opened(tmp_path / "data")
    if consumed:
        append(store, "numbers", consumed)
        append_message(store, log, "results", (1, consumed))
    append(store, "numbers", 10, small=True)
    append(store, "numbers", 15, small=True)
    folder = pulled(tmp_path / "data", tmp_path / "copy")
    store.close()
    (folder / journal.FILE_NAME).unlink()
    restarted, _ = opened(folder)
    with restarted:
        assert restarted.last_row("numbers") == consumed + 25
        # A task with a cursor meets them as a gap, and reports a run without results.
        expected = set() if consumed else set(range(1, 26))
        assert declared_numbers(outbox_payloads(restarted), "rows", "numbers") == expected


@pytest.mark.parametrize("name", [journal.FILE_NAME, f"{DATABASE}-wal", DATABASE])
def test_after_a_deleted_file_was_saved_reads_and_the_next_start_have_the_small_commits_once(
    store: Store, tmp_path: Path, name: str
) -> None:
    append(store, "numbers", 5, small=True)
    with store.transaction(small=True) as tx:
        tx.increment_counter("lines rejected", 1)
    (tmp_path / "data" / name).unlink()
    with pytest.raises(StorageError, match="deleted while the daemon had it open"):
        append(store, "numbers", 5, small=True)
    assert store.last_row("numbers") == 15
    assert store.counters()["lines rejected"] == 1
    store.close()
    restarted, _ = opened(tmp_path / "data")
    with restarted:
        assert len(served(restarted)) == 15
        assert restarted.counters()["lines rejected"] == 1
        assert restarted.get_meta("last finding", "") == ""


def test_a_journal_that_others_could_read_is_made_private(store: Store, tmp_path: Path) -> None:
    store.close()
    path = tmp_path / "data" / journal.FILE_NAME
    path.chmod(0o644)
    opened(tmp_path / "data")[0].close()
    assert path.stat().st_mode & 0o007 == 0


def test_small_commits_that_were_restored_in_part_are_no_clean_stop(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        with store.transaction(small=True) as tx:
            tx.increment_counter("lines rejected", 1)
    store._db.execute("ROLLBACK")
    apply, calls = journal.apply, list[int]()

    def fail(*record: Any) -> None:
        calls.append(1)
        if len(calls) % 5 == 3:
            raise MemoryError
        apply(*record)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "apply", fail)
        with pytest.raises(MemoryError):
            store.last_row("numbers")
        calls.clear()
        store.close()
    restarted, _ = opened(tmp_path / "data")
    with restarted:
        assert restarted.counters()["lines rejected"] == 5


def append_half(store: Store) -> None:
    with store.transaction(small=True) as tx:
        tx.append("numbers", Rows(np.array([1000]), (np.array([9]), np.array([0], np.uint16))), "synced")
        raise ZeroDivisionError


@pytest.mark.parametrize("is_open", [True, False])
def test_when_memory_runs_out_in_a_rollback_nothing_of_the_failed_commit_stays(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_open: bool
) -> None:
    if is_open:
        append(store, "numbers", 5, small=True)
    before, execute = len(served(store)), JournaledConnection.execute

    def fail(db: JournaledConnection, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        if sql.startswith("ROLLBACK"):
            raise MemoryError
        return execute(db, sql, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(JournaledConnection, "execute", fail)
        with pytest.raises(MemoryError):
            append_half(store)
    assert len(served(store)) == before
    append(store, "numbers", 5, small=True)
    store.close()
    assert rows_of(tmp_path / "data") == before + 5


def test_a_commit_to_the_database_that_is_interrupted_includes_the_small_ones_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, "numbers", 5, small=True)
    execute = JournaledConnection.execute

    def interrupt(db: JournaledConnection, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        cursor = execute(db, sql, parameters)
        if sql == "COMMIT":
            raise KeyboardInterrupt
        return cursor

    with monkeypatch.context() as patch:
        patch.setattr(JournaledConnection, "execute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            append(store, "numbers", 1000)
    append(store, "numbers", 5, small=True)
    assert len(served(store)) == 1020
    assert rows_of(pulled(tmp_path / "data", tmp_path / "copy")) == 1020


def test_a_torn_write_after_a_fold_is_no_damage(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "data" / journal.FILE_NAME
    for _ in range(4):
        append(store, "numbers", 150, small=True)
        store.fold()
    before = path.read_bytes()
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    append(store, "numbers", 150, small=True)
    after = path.read_bytes()
    changed = [at for at in range(0, journal.SIZE, 512) if before[at : at + 512] != after[at : at + 512]]
    assert len(changed) > 1
    # The power fails after the first of the sectors.
    torn = bytearray(before)
    torn[changed[0] : changed[0] + 512] = after[changed[0] : changed[0] + 512]
    (copy / journal.FILE_NAME).write_bytes(torn)
    restarted, _ = opened(copy)
    with restarted:
        assert len(served(restarted)) == 610
        assert restarted.get_meta("last finding", "") == ""


def test_a_journal_that_was_larger_has_its_size_after_the_opening(store: Store, tmp_path: Path) -> None:
    append(store, "numbers", 5, small=True)
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    os.truncate(copy / journal.FILE_NAME, 1 << 30)
    assert rows_of(copy) == 15
    assert (copy / journal.FILE_NAME).stat().st_size == journal.SIZE


def write_record(folder: Path, store: Store, number: int, record: object) -> None:
    """Write a record with a right CRC behind those of the store."""
    file = store._commits._journal
    assert file is not None
    content = bytearray((folder / journal.FILE_NAME).read_bytes())
    framed = journal._frame(file._opening, number, msgspec.msgpack.encode(record))
    content[-4096 : -4096 + len(framed)] = framed
    (folder / journal.FILE_NAME).write_bytes(content)


def test_a_record_of_a_newer_version_is_refused_and_stays(store: Store, tmp_path: Path) -> None:
    append(store, "numbers", 5, small=True)
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    known = (copy / journal.FILE_NAME).read_bytes()
    write_record(copy, store, 2, [[99, ["unknown"]]])
    unknown = (copy / journal.FILE_NAME).read_bytes()
    with pytest.raises(StorageError, match="made by a newer version of outstation"):
        opened(copy)
    (copy / "damaged").write_text('{"cause": "test"}')
    with pytest.raises(StorageError, match="made by a newer version of outstation"):
        opened(copy)
    assert not (copy / "quarantine").exists()
    assert (copy / journal.FILE_NAME).read_bytes() == unknown
    with (
        pytest.raises(StorageError, match="made by a newer version of outstation"),
        Store.open_read_only(copy) as reader,
    ):
        reader.last_row("numbers")
    (copy / journal.FILE_NAME).write_bytes(known)
    assert rows_of(copy) == 15


@pytest.mark.parametrize(
    "record",
    [
        [[0, [1]]],
        [[7, ["a", 2**64 - 1]]],
        [[0, ["x"] * 11]],
        [[0, {"stream": 1}]],
        [[1, [1, 2, 3]]],
        [[7, [["a"], 1]]],
        [[4, {"source": "a"}]],
        [[7, ["half", 1]], [1, [2]]],
        [[-1, []]],
        ["none"],
    ],
)
def test_a_wrong_record_with_a_right_crc_is_left_out_whole_and_reported(
    store: Store, tmp_path: Path, record: object
) -> None:
    append(store, "numbers", 5, small=True)
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    write_record(copy, store, 2, record)
    with Store.open_read_only(copy) as reader:
        assert reader.last_row("numbers") == 15
        assert "half" not in reader.counters()
    restarted, _ = opened(copy)
    with restarted:
        assert len(served(restarted)) == 15
        assert "half" not in restarted.counters()
        assert "The journal of small commits was damaged" in restarted.get_meta("last finding", "")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("is_stream_damaged", [False, True])
def test_a_damaged_row_of_progress_loses_no_small_commit(
    store: Store, tmp_path: Path, late: bool, is_stream_damaged: bool
) -> None:
    early = (tmp_path / "data" / "watermark").read_bytes()
    for n in range(5):
        append(store, "numbers", 5, small=True)
        with store.transaction(small=True) as tx:
            tx.increment_counter("lines rejected", 1)
        if late and n == 2:
            store.fold()
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    with contextlib.closing(sqlite3.connect(copy / DATABASE)) as db:
        db.execute("UPDATE meta SET value = 'x' || substr(value, 2) WHERE key = 'journal'")
        if is_stream_damaged:
            db.execute("UPDATE streams SET next_row = 3 WHERE name = 'numbers'")
        db.commit()
    if not is_stream_damaged:
        # As after a power cut, which takes what was not flushed.
        (copy / "watermark").write_bytes(early)
    salvaged, _ = opened(copy)
    with salvaged:
        assert served(salvaged) == {n: n for n in range(1, 36)}
        assert salvaged.counters()["lines rejected"] == 5
        content = (copy / "quarantine/1/small-commits").read_bytes()
        assert content == (tmp_path / "data" / journal.FILE_NAME).read_bytes()


def put_text(store: Store, text: str, limit: int = 1000) -> None:
    """Append one row with a category's text, as a small commit."""
    first = store.last_row("numbers") + 1
    with store.transaction(small=True) as tx:
        codes = tx.assign_category_codes("numbers", "mode", [text], limit=limit, last_row=first)[0]
        rows = Rows(np.array([first * 1000]), (np.array([first]), np.array(codes, np.uint16)))
        tx.append("numbers", rows, "synced")


def texts_after(store: Store, after: int) -> dict[int, str]:
    """Return row number → text of the readable rows after a row."""
    texts, rows = store.categories("numbers", "mode"), dict[int, str]()
    while (batch := store.read_rows("numbers", NUMBERS.fields, after, 1)) is not None:
        if not batch.loss_reason:
            rows[batch.first] = texts[int(batch.column(1)[0])]
        after = batch.last
    return rows


def flip_first_record(folder: Path) -> None:
    """Damage the first record in both places."""
    content = bytearray((folder / journal.FILE_NAME).read_bytes())
    for start in (0, 4096):
        content[start + HEADER + 20] ^= 4
    (folder / journal.FILE_NAME).write_bytes(content)


@pytest.mark.parametrize("is_salvaged", [False, True])
def test_a_lost_category_text_moves_no_other(store: Store, tmp_path: Path, is_salvaged: bool) -> None:
    for text in ("red", "green", "blue", "red"):
        put_text(store, text)
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    flip_first_record(copy)
    expected = {12: "green", 13: "blue", 14: "lost category 3"}
    with Store.open_read_only(copy) as reader:
        assert texts_after(reader, 10) == expected
    if is_salvaged:
        (copy / "damaged").write_text('{"cause": "test"}')
    restarted, _ = opened(copy)
    with restarted:
        assert texts_after(restarted, 10) == expected
        assert "The journal of small commits was damaged" in restarted.get_meta("last finding", "")


def test_a_lost_text_of_a_reused_code_gives_way_to_no_older_one(store: Store, tmp_path: Path) -> None:
    for _ in range(10):
        append(store, "numbers", 1000)
    with store.transaction() as tx:
        tx.trim_rows("numbers", 9500, 2**62, 500)
    # By the last rows of their codes, no stored row has one of the former texts.
    first = store.last_row("numbers")
    for _ in range(3):
        put_text(store, "blue", limit=3)
    assert set(texts_after(store, first).values()) == {"blue"}
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    flip_first_record(copy)
    restarted, _ = opened(copy)
    with restarted:
        assert set(texts_after(restarted, first).values()) == {"lost category 1"}


def test_a_record_keeps_the_rows_that_the_database_can_take(store: Store, tmp_path: Path) -> None:
    append(store, "others", 10)
    with store.transaction(small=True) as tx:
        row = Rows(np.array([1000]), (np.array([11]), np.array([0], np.uint16)))
        tx.append("numbers", row, "synced")
        tx.append("others", row, "synced")
        tx.set_source_position("socket", "gateway", 22)
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    with contextlib.closing(sqlite3.connect(copy / DATABASE)) as db:
        db.execute("UPDATE streams SET next_row = 3 WHERE name = 'numbers'")
        db.commit()
    (copy / "watermark").unlink()
    salvaged, _ = opened(copy)
    with salvaged:
        assert served(salvaged, "others")[11] == 11
        assert salvaged.source_position("socket", "gateway") == 22
        assert "The journal of small commits was damaged, too" in salvaged.get_meta("last finding", "")


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("is_clean", [False, True])
def test_after_an_unclean_stop_a_missing_journal_is_reported_once(
    store: Store, tmp_path: Path, is_old: bool, is_clean: bool
) -> None:
    append(store, "numbers", 3, small=True)
    old = (tmp_path / "data" / journal.FILE_NAME).read_bytes() if is_old else b""
    for _ in range(3):
        append(store, "numbers", 3, small=True)
    store.fold()
    watermark = (tmp_path / "data" / "watermark").read_bytes()
    append(store, "numbers", 3, small=True)
    if is_clean:
        store.close()
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    (copy / journal.FILE_NAME).write_bytes(old)
    if not is_clean:
        (copy / "watermark").write_bytes(watermark)
    messages = set()
    for _ in range(2):
        restarted, _ = opened(copy)
        with restarted:
            finding = restarted.get_meta("last finding", "")
            assert ("The journal of small commits was damaged" in finding) == (not is_clean)
            messages.add(restarted.outbox_size()[1])
    assert len(messages) == 1


def make_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def make_second_name(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def make_pipe(path: Path, _victim: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("trap", [make_link, make_second_name, make_pipe])
def test_what_somebody_put_in_its_place_is_neither_read_nor_written(
    tmp_path: Path, trap: Callable[[Path, Path], None]
) -> None:
    folder, victim = tmp_path / "data", tmp_path / "victim"
    victim.write_bytes(b"precious")
    store, _ = opened(folder)
    store.close()
    (folder / journal.FILE_NAME).unlink()
    trap(folder / journal.FILE_NAME, victim)
    with pytest.raises(StorageError, match="not a file of the store's own"):
        opened(folder)
    with pytest.raises(StorageError, match="not a file of the store's own"), Store.open_read_only(folder) as reader:
        reader.last_row("numbers")
    assert victim.read_bytes() == b"precious"
    (folder / journal.FILE_NAME).unlink()
    opened(folder)[0].close()
    assert (folder / journal.FILE_NAME).stat().st_mode & 0o137 == 0


def test_a_flipped_bit_costs_its_commit_alone_and_is_reported(store: Store, tmp_path: Path) -> None:
    for _ in range(3):
        append(store, "numbers", 5, small=True)
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    content = bytearray((copy / journal.FILE_NAME).read_bytes())
    # The second record of the newest block, in each place that has it.
    for start in range(0, journal.SIZE, 4096):
        length = struct.unpack_from("<8sQI", content, start)[2]
        content[start + HEADER + length + HEADER + 4] ^= 4
    (copy / journal.FILE_NAME).write_bytes(content)
    damaged, _ = opened(copy)
    try:
        assert set(served(damaged)) == set(range(1, 16)) | set(range(21, 26))
        assert damaged.recent_alerts(1) or "The journal of small commits was damaged" in damaged.get_meta(
            "last finding", ""
        )
    finally:
        damaged.close()


def test_records_of_another_opening_are_not_applied(store: Store, tmp_path: Path) -> None:
    append(store, "numbers", 5, small=True)
    old = (tmp_path / "data" / journal.FILE_NAME).read_bytes()
    store.close()
    (tmp_path / "data" / journal.FILE_NAME).write_bytes(old)
    assert rows_of(tmp_path / "data") == 15


def test_a_folder_that_is_moved_away_takes_the_small_commits_along(store: Store, tmp_path: Path) -> None:
    append(store, "numbers", 5, small=True)
    (tmp_path / "data").rename(tmp_path / "former")
    (tmp_path / "data").mkdir()
    with pytest.raises(StorageMoved):
        append(store, "numbers", 5, small=True)
    store.close()
    assert rows_of(tmp_path / "former") == 15


def test_a_quota_that_was_lowered_keeps_no_acknowledged_row_out(tmp_path: Path) -> None:
    store, _ = opened(tmp_path / "data", max_size=8 << 20)
    append(store, "numbers", 60_000)
    for _ in range(20):
        append(store, "numbers", 200, small=True)
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    store.close()
    lowered, _ = opened(copy, max_size=1 << 20)
    try:
        assert lowered.last_row("numbers") == len(served(lowered)) == 64_000
    finally:
        lowered.close()


def test_a_salvage_keeps_the_small_commits(store: Store, tmp_path: Path) -> None:
    for _ in range(20):
        append(store, "numbers", 10)
    for _ in range(5):
        append(store, "numbers", 5, small=True)
    copy = pulled(tmp_path / "data", tmp_path / "copy", None)
    (copy / "damaged").write_text('{"cause": "test"}')
    assert rows_of(copy) == 235


def test_a_message_is_committed_with_the_small_commits_before_it(tmp_path: Path) -> None:
    store, log = opened(tmp_path / "data")
    append(store, "numbers", 10)
    append(store, "numbers", 5, small=True)
    append_message(store, log, "message", (1, 15))
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    (copy / journal.FILE_NAME).unlink()
    assert rows_of(copy) == 15
    store.close()
    shutil.rmtree(copy)


def test_a_journal_that_is_switched_off_is_replayed_first(store: Store, tmp_path: Path) -> None:
    append(store, "numbers", 5, small=True)
    copy = pulled(tmp_path / "data", tmp_path / "copy")
    for total in (20, 25):
        plain, _ = opened(copy, with_journal=False)
        append(plain, "numbers", 5, small=True)
        assert len(served(plain)) == total
        plain.close()
    assert rows_of(copy) == 25
