"""Attacks on a watched folder: a writer to it can neither hold nor redirect the agent, nor read or write its files."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from outstation.device.intake import decode_process
from outstation.device.intake.decode_process import DecodeProcess
from outstation.device.intake.sources import files as files_module
from outstation.device.intake.sources import watched_folder
from outstation.device.intake.sources.watched_folder import WatchedFolder, safe_name
from outstation.foundation.errors import UsageError
from outstation.workbench.testing.patience import wait_until
from tests.device.intake.test_sources import put, taken, there, watching
from tests.kit.marks import root_only
from tests.kit.stations import ROOT

pytestmark = pytest.mark.attack("folders")

SECRET = "the agent's own key\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_SETTLED_S", 0.1)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "device.key"
    path.write_text(SECRET)
    return path


def contents(folder: Path) -> str:
    """Return all that lies in the working folders, links not followed."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return "".join(path.read_text(errors="replace") for path in files)


def test_pipes_sockets_and_links_go_to_failed_and_hold_nothing_up(tmp_path: Path, secret: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    os.mkfifo(folder / "a.csv")
    (folder / "b.csv").symlink_to(secret)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "c.csv"))
    os.link(secret, folder / "d.csv")
    put(tmp_path, "z.csv", [7])
    with watching(tmp_path) as station:
        wait_until("z.csv in done/", lambda: there(tmp_path)["done"] == ["z.csv"])
        assert taken(station) == [7]
        # The device counts a file after it moved it.
        wait_until("the count", lambda: station.store.counters().get("files ingested") == 1)
        assert station.store.counters()["files failed"] == 4
    reasons = {name: (folder / "failed" / f"{name}.csv.txt").read_text() for name in "abcd"}
    assert "a named pipe" in reasons["a"]
    assert "a symbolic link" in reasons["b"]
    assert "a socket" in reasons["c"]
    assert "2 names (hard links)" in reasons["d"]
    assert not any(SECRET.strip() in reason for reason in reasons.values())


@contextlib.contextmanager
def swapping(folder: Path, secret: Path) -> Iterator[list[int]]:
    """Exchange the file `a.csv` for a link and a pipe as fast as one thread can; the list counts the turns."""
    stopped, turns = threading.Event(), [0]

    def swap() -> None:
        while not stopped.is_set():
            turns[0] += 1
            draft = folder / f".draft{turns[0]}"
            if turns[0] % 3 == 0:
                draft.write_text("n\n1\n")
            elif turns[0] % 3 == 1:
                draft.symlink_to(secret)
            else:
                os.mkfifo(draft)
            draft.replace(folder / "a.csv")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield turns
    finally:
        stopped.set()
        thread.join()


def test_a_link_or_pipe_swapped_in_after_the_look_is_neither_followed_nor_waited_for(
    tmp_path: Path, secret: Path
) -> None:
    (tmp_path / "in").mkdir()
    opened: list[bytes] = []
    with WatchedFolder(tmp_path / "in") as folder, swapping(tmp_path / "in", secret) as turns:
        while turns[0] < 3000 or len(opened) < 3:
            for name in folder.list_files([".csv"]):
                claimed = folder.claim(name)
                try:
                    file = folder.open_claimed(claimed)
                except UsageError as problem:
                    folder.move_to_failed(claimed, str(problem))
                    continue
                opened.append(os.read(file, 100))
                os.close(file)
    assert set(opened) <= {b"n\n1\n", b""}
    assert SECRET not in contents(tmp_path / "in")


@pytest.mark.attack("folders", control=True)
def test_without_its_checks_the_agent_follows_a_link_to_its_own_key(
    tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_folder, "_check_regular", lambda _: None)
    monkeypatch.setattr(watched_folder, "_FILE_FLAGS", os.O_CLOEXEC)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").symlink_to(secret)
    with WatchedFolder(tmp_path / "in") as folder:
        file = folder.open_claimed(folder.claim("a.csv"))
        assert os.read(file, 100).decode() == SECRET
        os.close(file)


def test_a_link_in_the_place_of_a_reason_overwrites_nothing(tmp_path: Path, secret: Path) -> None:
    failed = tmp_path / "in" / "failed"
    failed.mkdir(parents=True)
    (failed / "a.csv.txt").symlink_to(secret)
    put(tmp_path, "a.csv", [1], header="m")
    with watching(tmp_path) as station:
        wait_until("the file and its reason", lambda: station.store.counters().get("files failed") == 1)
    assert secret.read_text() == SECRET
    assert (failed / "a.csv.txt").is_symlink()
    assert "column 'm'" in contents(failed)


@pytest.mark.parametrize("name", ["taking", "done", "failed"])
def test_a_link_in_the_place_of_a_working_folder_is_moved_aside(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).symlink_to(elsewhere)
    put(tmp_path, "a.csv", [1])
    put(tmp_path, "b.csv", [1], header="m")
    with watching(tmp_path) as station:
        wait_until("a.csv in done/", lambda: (tmp_path / "in" / "done" / "a.csv").exists())
        wait_until("b.csv in failed/", lambda: station.store.counters().get("files failed") == 1)
        assert taken(station) == [1]
    assert len(there(tmp_path)["failed"]) == 2
    assert list(elsewhere.iterdir()) == []
    assert len(list((tmp_path / "in").glob(f"{name}.*"))) == 1


@root_only
def test_a_working_folder_of_another_user_is_moved_aside(tmp_path: Path) -> None:
    done = tmp_path / "in" / "done"
    done.mkdir(parents=True)
    os.chown(done, 12345, 12345)
    with WatchedFolder(tmp_path / "in"):
        assert done.stat().st_uid == os.geteuid()
    [aside] = (tmp_path / "in").glob("done.*")
    assert aside.stat().st_uid == 12345


def test_a_link_in_the_place_of_the_index_is_moved_aside(tmp_path: Path, secret: Path) -> None:
    with WatchedFolder(tmp_path / "in") as folder:
        index = tmp_path / "in" / "done" / "rows.csv"
        for attack in ("link", "pipe", "hard link"):
            if attack == "link":
                index.symlink_to(secret)
            elif attack == "pipe":
                os.mkfifo(index)
            else:
                os.link(secret, index)
            folder.append_to_index("a.png", (1, 6), is_retry=False)
            assert index.read_text() == "file,first,last\na.png,1,6\n"
            index.unlink()
    assert secret.read_text() == SECRET


def test_names_that_are_long_or_unprintable_stop_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    names = [
        b"a" * 251 + b".csv",
        b"\xff\x1b[2J.csv",
        "\u202egpj.csv".encode(),
        b"x\ny.csv",
        "é".encode() * 125 + b".csv",
    ]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name)).write_text("m\n1\n")
    put(tmp_path, "z.csv", [7])
    with watching(tmp_path) as station:
        wait_until("all names in failed/", lambda: station.store.counters().get("files failed") == len(names))
        wait_until("z.csv in done/", lambda: there(tmp_path)["done"] == ["z.csv"])
    failed = there(tmp_path)["failed"]
    assert len(failed) == 2 * len(names)
    assert all(name.isprintable() and len(os.fsencode(name)) <= 255 for name in failed)
    assert "%FF%1B[2J.csv" in failed
    assert all(line.isprintable() for line in caplog.text.splitlines())


def test_safe_names_keep_their_suffix_and_differ() -> None:
    long = ["a" * 240 + f"{i}.csv" for i in range(3)]
    assert len({safe_name(name) for name in long}) == 3
    assert all(safe_name(name).endswith(".csv") and len(safe_name(name)) == 200 for name in long)
    assert safe_name("readings 1.csv") == "readings 1.csv"
    assert all(safe_name(safe_name(name)) == safe_name(name) for name in long)


def test_a_cell_with_escape_characters_reaches_the_log_escaped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.csv", ["\x1b]0;owned\x07"])
    put(tmp_path, "b.csv", [1], header="\x1b[31mn")
    with watching(tmp_path):
        wait_until("b.csv in failed/", lambda: len(there(tmp_path)["failed"]) == 2)
        wait_until("a.csv in done/", lambda: there(tmp_path)["done"] == ["a.csv"])
    assert "\x1b" not in caplog.text
    assert "\x1b" not in (tmp_path / "in" / "failed" / "b.csv.txt").read_text()


HOSTILE_DECODER = """
import os, socket, sys
from outstation.device.intake import decoded_blocks
from outstation.device.intake.decoded_blocks import DecodedBlock, DecodeEnd, PackedColumn

channel = socket.socket(fileno=int(sys.argv[1]))
decoded_blocks.receive(channel)
decoded_blocks.send(channel, DecodeEnd())
while received := decoded_blocks.receive_with_file(channel):
    os.close(received[1])
    {attack}
"""


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        ("decoded_blocks.send(channel, DecodedBlock(0, None, PackedColumn('<i8', b''), {}))", "no rows"),
        ("os.kill(os.getpid(), 40)", "ended with signal 40"),
        (f"decoded_blocks.send(channel, DecodeEnd('os', 'no memory', {errno.ENOMEM}))", "no memory"),
        (f"decoded_blocks.send(channel, DecodeEnd('os', 'no file', {errno.ENOENT}))", "no file"),
    ],
)
def test_a_hostile_decoder_costs_its_file_and_neither_ends_nor_stops_the_intake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str, reason: str
) -> None:
    (tmp_path / "hostile_decoder.py").write_text(HOSTILE_DECODER.replace("{attack}", attack))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(decode_process, "_WORKER", "hostile_decoder")
    put(tmp_path, "a.csv", [1])
    with watching(tmp_path) as station:
        wait_until("a.csv in failed/", lambda: there(tmp_path)["failed"] == ["a.csv", "a.csv.txt"])
        wait_until("the count", lambda: station.store.counters().get("files failed") == 1)
    assert reason in (tmp_path / "in" / "failed" / "a.csv.txt").read_text()


def test_an_error_that_no_check_foresees_costs_its_file_and_not_the_intake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = DecodeProcess.decode

    def fail(process: DecodeProcess, file: int, name: str, *arguments: int | None) -> object:
        if name == "a.csv":
            raise ZeroDivisionError
        return decode(process, file, name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodeProcess, "decode", fail)
    put(tmp_path, "a.csv", [1])
    put(tmp_path, "b.csv", [2])
    with watching(tmp_path) as station:
        wait_until("b.csv in done/", lambda: there(tmp_path)["done"] == ["b.csv"])
        wait_until("the count", lambda: station.store.counters().get("files failed") == 1)
    assert "unexpected ZeroDivisionError" in (tmp_path / "in" / "failed" / "a.csv.txt").read_text()


def test_a_working_folder_of_an_unknown_owner_leaks_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: WatchedFolder) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    WatchedFolder(tmp_path).__exit__()
    owner = os.geteuid()
    # Its folders seem to belong to another user.
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    monkeypatch.setattr(WatchedFolder, "_find_foreign_owner", fail)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(OSError, match="Read-only"):
            WatchedFolder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == len(before)
