"""The ground moved: the data folder, or a file in it, is moved, replaced or deleted while the store has it open."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outstation.device.recovery.open_files import require_not_moved
from outstation.device.store.store import DATABASE, Store
from outstation.foundation.errors import StorageError, StorageMoved
from scripts.kit.stores import NUMBERS, append, opened


def numbers(store: Store) -> list[int]:
    batch = store.read_rows("numbers", NUMBERS.fields, 0, 1000)
    assert batch is not None
    assert batch.loss_reason is None
    return [int(value) for value in batch.rows.columns[0]]


def move_away(folder: Path) -> None:
    folder.rename(folder.with_name("former"))


def replace_by_empty(folder: Path) -> None:
    move_away(folder)
    folder.mkdir()


def replace_by_copy(folder: Path) -> None:
    move_away(folder)
    shutil.copytree(folder.with_name("former"), folder)


@pytest.mark.parametrize("change", [move_away, replace_by_empty, replace_by_copy])
def test_a_data_folder_that_is_no_longer_the_one_opened_takes_no_commit(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = tmp_path / "data"
    store, _ = opened(folder)
    append(store, "numbers", 20)
    change(folder)
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    with pytest.raises(StorageMoved, match=f"moved to {tmp_path / 'former'}, with all acknowledged data"):
        append(store, "numbers", 1)
    with pytest.raises(StorageMoved):
        store.limit_bytes()
    store.close()
    # Nothing was made, and no file of another store deleted.
    assert (sorted(path.name for path in folder.iterdir()) if folder.exists() else []) == present
    if change is not replace_by_copy:
        with pytest.raises(StorageMoved, match="put it back, or delete"):
            opened(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name("former").rename(folder)
    store, _ = opened(folder)
    assert numbers(store) == list(range(1, 21))
    store.close()
    assert not (tmp_path / "data.moved").exists()


def test_without_its_note_an_empty_store_is_created(tmp_path: Path) -> None:
    store, _ = opened(tmp_path / "data")
    append(store, "numbers", 20)
    move_away(tmp_path / "data")
    with pytest.raises(StorageMoved):
        append(store, "numbers", 1)
    store.close()
    (tmp_path / "data.moved").unlink()
    store, _ = opened(tmp_path / "data")
    assert store.last_row("numbers") == 0
    store.close()


def test_a_deleted_data_folder_is_named_as_deleted(tmp_path: Path) -> None:
    store, _ = opened(tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(StorageMoved, match="deleted with all acknowledged data"):
        append(store, "numbers", 1)
    store.close()
    assert not (tmp_path / "data").exists()
    (tmp_path / "data.moved").write_bytes(b"\0" * 9)
    with pytest.raises(StorageMoved, match=r"delete .*moved to begin an empty store"):
        opened(tmp_path / "data")


def test_a_service_without_rights_on_the_parent_leaves_its_note_in_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "data.moved").mkdir()
    store, _ = opened(tmp_path / "data")
    move_away(tmp_path / "data")
    with pytest.raises(StorageMoved, match=r"delete .*/data\.moved/note to begin an empty store"):
        append(store, "numbers", 1)
    store.close()
    # As the service manager makes it anew.
    (tmp_path / "data").mkdir()
    with pytest.raises(StorageMoved, match=r"put it back, or delete .*/data\.moved/note"):
        opened(tmp_path / "data")
    (tmp_path / "data").rmdir()
    (tmp_path / "former").rename(tmp_path / "data")
    opened(tmp_path / "data")[0].close()
    assert list((tmp_path / "data.moved").iterdir()) == []


def test_a_note_that_cannot_be_written_is_not_promised(tmp_path: Path) -> None:
    store, _ = opened(tmp_path / "data")
    move_away(tmp_path / "data")
    # In its way, as root may write anywhere.
    (tmp_path / "data.moved.new").mkdir()
    with pytest.raises(StorageMoved, match=r"could not be written \(.*data.moved") as raised:
        append(store, "numbers", 1)
    assert "would begin an empty store here" in str(raised.value)
    assert "or delete" not in str(raised.value)
    store.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_disk_that_fails_for_a_moment_is_not_a_moved_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    folder = tmp_path / "data"
    store, _ = opened(folder)
    append(store, "numbers", 20)
    intact = os.stat

    def fail(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(folder)):
            raise OSError(code, os.strerror(code), str(path))
        return intact(path, **options)

    with monkeypatch.context() as failing:
        failing.setattr(os, "stat", fail)
        with pytest.raises(StorageError, match="cannot be read") as raised:
            append(store, "numbers", 1)
        # Exit code 3 would keep the service stopped.
        assert not isinstance(raised.value, StorageMoved)
        store.close()
        # Whether there is a note is not known either: nothing is opened.
        with pytest.raises(StorageError, match=r"data\.moved: cannot be read"):
            require_not_moved(folder)
    assert not (tmp_path / "data.moved").exists()
    store, _ = opened(folder)
    assert numbers(store) == list(range(1, 21))
    store.close()


@pytest.mark.parametrize("name", [DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", "lock", "watermark", "journal"])
def test_a_file_of_the_open_store_that_is_deleted_costs_no_row(tmp_path: Path, name: str) -> None:
    store, _ = opened(tmp_path)
    for _ in range(3):
        append(store, "numbers", 20, small=True)
    log = store.log_id
    (tmp_path / name).unlink()
    with pytest.raises(StorageError, match=f"{name}: deleted while the daemon had it open") as raised:
        append(store, "numbers", 1)
    assert not isinstance(raised.value, StorageMoved)
    store.close()
    store, _ = opened(tmp_path)
    assert (numbers(store), store.log_id) == (list(range(1, 61)), log)
    append(store, "numbers", 1)
    assert (tmp_path / DATABASE).stat().st_mode & 0o007 == 0
    store.close()


def test_a_database_that_is_replaced_takes_no_commit_and_opens_as_what_it_is(tmp_path: Path) -> None:
    store, _ = opened(tmp_path)
    append(store, "numbers", 20)
    store.close()
    shutil.copy(tmp_path / DATABASE, tmp_path / "backup")
    store, _ = opened(tmp_path)
    append(store, "numbers", 20)
    os.replace(tmp_path / "backup", tmp_path / DATABASE)
    with pytest.raises(StorageError, match="replaced while the daemon had it open"):
        append(store, "numbers", 1)
    store.close()
    # It would be replayed into the copy.
    assert not (tmp_path / f"{DATABASE}-wal").exists()
    store, _ = opened(tmp_path)
    # The number of the next row is kept in the watermark: no number is given twice.
    assert store.last_row("numbers") == 40
    store.close()


def test_the_reserve_is_made_again(tmp_path: Path) -> None:
    store, _ = opened(tmp_path)
    append(store, "numbers", 1)
    (tmp_path / "reserve").unlink()
    append(store, "numbers", 1)
    assert (tmp_path / "reserve").exists()
    store.close()
