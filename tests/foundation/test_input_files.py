"""Input files: what is no file is named at once, and nothing is waited for."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from outstation.foundation import input_files
from outstation.foundation.errors import explain


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def bound(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fifo, "is a pipe, where a file is needed"),
        (folder, "Is a directory"),
        (loop, "Too many levels of symbolic links"),
        (bound, "No such device or address"),
        (lambda _: Path("/dev/zero"), "is a device, where a file is needed"),
        (lambda _: Path("/proc/self/mem"), "Input/output error"),
        (lambda path: path, "No such file or directory"),
        (lambda path: path.with_name("n" * 256), "File name too long"),
    ],
)
def test_what_is_no_file_is_named_with_its_reason(tmp_path: Path, make: object, reason: str) -> None:
    path = make(tmp_path / "x")  # type: ignore[operator]
    with pytest.raises(OSError, match=reason) as problem:
        input_files.read_bytes(path)
    assert problem.value.filename == str(path)


def test_a_file_beyond_the_bound_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="is larger than 1,000 bytes"):
        input_files.read_bytes(tmp_path / "x", 1000)


def test_a_stream_from_a_pipe_is_read_to_its_end_and_one_without_writer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fifo(tmp_path / "p")
    writer = threading.Thread(target=lambda: path.write_bytes(b"a\n" * 100_000))
    writer.start()
    with input_files.open_stream(path) as file:
        assert len(file.read()) == 200_000
    writer.join()
    monkeypatch.setattr(input_files, "_PIPE_WAIT_MS", 10)
    with pytest.raises(OSError, match="is a pipe that nobody writes to") as problem:
        input_files.open_stream(path)
    assert explain(problem.value) == "is a pipe that nobody writes to"
