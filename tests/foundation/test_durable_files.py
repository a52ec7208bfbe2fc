"""Durable files: an old file stays whole until the new one has its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outstation.foundation import durable_files
from outstation.foundation.errors import StorageError, StorageFull


def test_a_file_is_replaced_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    durable_files.write(path, b"first")
    durable_files.write(path, b"second", 0o600)
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    durable_files.write(path, b"first")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFull, match="make room"):
            durable_files.write(path, b"second")
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"untouched")
    (tmp_path / "file.new").symlink_to(tmp_path / "victim")
    durable_files.write(tmp_path / "file", b"content")
    assert (tmp_path / "victim").read_bytes() == b"untouched"
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    """Root that writes a plot to /dev/null must not turn it into a file for everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="it is no regular file"):
        durable_files.write(pipe, b"x")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_write_new_never_overwrites(tmp_path: Path) -> None:
    durable_files.write_new(tmp_path / "file", b"first", 0o600)
    with pytest.raises(FileExistsError):
        durable_files.write_new(tmp_path / "file", b"second", 0o600)
    assert (tmp_path / "file").read_bytes() == b"first"


def test_names_reach_the_disk_after_the_data_they_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append(f"replace {Path(source).name} {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    durable_files.write(tmp_path / "new" / "file", b"content")
    assert calls == [f"fsync {tmp_path.name}", "fsync file.new", "replace file.new file", "fsync new"]


def test_a_file_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"folder: cannot be removed"):
        durable_files.remove(tmp_path / "folder")
    durable_files.remove(tmp_path / "missing")
