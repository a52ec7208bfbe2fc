"""Files, host and replay sources: each row is stored exactly once, also across kills."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from outstation.device import config
from outstation.device.config.sources import FilesSource, HostSource, ReplayFault, ReplaySource
from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.file_reader import MAX_BLOCK_ROWS
from outstation.device.intake.source import SourceContext
from outstation.device.intake.sources import files as files_module
from outstation.device.intake.sources import finished_files
from outstation.device.intake.sources import host as host_source
from outstation.device.intake.sources.files import FolderWatcher
from outstation.device.intake.sources.host import HostMetrics
from outstation.device.intake.sources.recordings import Playlist
from outstation.device.intake.sources.replay import ReplayPlayer
from outstation.device.intake.sources.watched_folder import FileState, WatchedFolder
from outstation.device.recovery.open import open_store
from outstation.device.store.quota import PAGE_SIZE
from outstation.device.store.rows import Rows, pack_chunk
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import ConfigError, UsageError
from outstation.ml.datasets.recordings import load
from outstation.workbench.testing.patience import wait_until
from tests.kit.killed_watcher import kill_with_a_file_in_hand
from tests.kit.stations import ROOT, T0, Station, conf, rows_of

NUMBERS = StreamConfig(fields=[FieldConfig(name="n", type="i64", max=10**6)])


# --- files


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file has settled after a tenth of a second."""
    monkeypatch.setattr(files_module, "_SETTLED_S", 0.1)


@contextmanager
def watching(folder: Path, commit_every_s: float = 0.02, **store: Any) -> Iterator[Station]:
    source = FilesSource(folder=str(folder / "in"), poll_interval=config.Duration(0.02))
    made = conf(folder / "data", commit_every_s, numbers=NUMBERS)
    with Station(
        made, sources=lambda s: [FolderWatcher("numbers", NUMBERS, source, s, folder / "data")], **store
    ) as station:
        wait_until("the folders", lambda: (folder / "in" / "failed").exists())
        yield station
        assert station.failures == []


def put(folder: Path, name: str, numbers: range | list[Any], header: str = "n") -> Path:
    """A file that appears at once, by rename."""
    (folder / "in").mkdir(exist_ok=True)
    draft = folder / f"{name}.draft"
    draft.write_text("".join(f"{n}\n" for n in [header, *numbers]))
    return draft.rename(folder / "in" / name)


def taken(station: Station) -> list[int]:
    result: list[int] = rows_of(station.store, "numbers", NUMBERS).columns[0].tolist()
    return result


def there(folder: Path) -> dict[str, list[str]]:
    return {where: sorted(p.name for p in (folder / "in" / where).iterdir()) for where in ("done", "failed", "taking")}


def done_are(folder: Path, files: int) -> bool:
    return len(there(folder)["done"]) == files


@pytest.mark.usefixtures("quick")
def test_a_file_is_taken_and_moved_to_done(tmp_path: Path) -> None:
    put(tmp_path, "a.csv", range(10_000))
    with watching(tmp_path) as station:
        wait_until("a.csv in done/", lambda: there(tmp_path)["done"] == ["a.csv"])
        assert taken(station) == list(range(10_000))
        assert there(tmp_path) == {"done": ["a.csv"], "failed": [], "taking": []}


@pytest.mark.usefixtures("quick")
def test_blocks_of_a_long_file_do_not_wait_for_the_timer(tmp_path: Path) -> None:
    put(tmp_path, "a.csv", range(10_000))
    with watching(tmp_path, commit_every_s=60) as station:
        wait_until("all blocks but the last", lambda: station.store.last_row("numbers") == 2 * MAX_BLOCK_ROWS)
        wait_until("the last block waits", lambda: bool(station.intake.group_commit))
        assert station.commits == 2
    with watching(tmp_path) as station:
        wait_until("a.csv in done/", lambda: there(tmp_path)["done"] == ["a.csv"])
        assert taken(station) == list(range(10_000))


@pytest.mark.usefixtures("quick")
def test_invalid_lines_are_logged_and_others_ingested(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.csv", [1, "x", 2, "3,4", 10**7, 5])
    with caplog.at_level(logging.INFO), watching(tmp_path) as station:
        wait_until("a.csv in done/", lambda: there(tmp_path)["done"] == ["a.csv"])
        assert taken(station) == [1, 2, 5]
    text = [record.getMessage() for record in caplog.records if record.name == "outstation.files"]
    assert text == [
        "a.csv: line 3: n is no number",
        "a.csv: line 5: 2 values, the header names 1",
        "a.csv: line 6: n is above max 1000000",
        "a.csv: ingested, 3 rows rejected",
    ]


@pytest.mark.usefixtures("quick")
def test_an_unsuitable_file_goes_to_failed_with_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.csv", [1], header="m")
    put(tmp_path, "b.csv", [1])
    (tmp_path / "in" / "c.parquet").write_bytes(b"PAR1")
    (tmp_path / "in" / "d.csv").touch()
    with watching(tmp_path) as station:
        wait_until("three failed files and why", lambda: len(there(tmp_path)["failed"]) == 6)
        wait_until("b.csv in done/", lambda: there(tmp_path)["done"] == ["b.csv"])
        assert taken(station) == [1]
        wait_until("the count", lambda: station.store.counters().get("files failed") == 3)
    failed = there(tmp_path)["failed"]
    assert failed == ["a.csv", "a.csv.txt", "c.parquet", "c.parquet.txt", "d.csv", "d.csv.txt"]
    reason = "a.csv: column 'm' is not a field of this stream; there is n, t"
    assert f"{reason}; moved to failed/" in caplog.text
    assert (tmp_path / "in" / "failed" / "a.csv.txt").read_text() == f"{reason}\n"


@pytest.mark.usefixtures("quick")
def test_a_name_that_comes_again_is_taken_again_and_overwrites_nothing(tmp_path: Path) -> None:
    with watching(tmp_path) as station:
        for turn in range(3):
            put(tmp_path, "a.csv", range(turn * 10, turn * 10 + 3))
            wait_until("another file in done/", partial(done_are, tmp_path, turn + 1))
        assert taken(station) == [0, 1, 2, 10, 11, 12, 20, 21, 22]


@pytest.mark.usefixtures("quick")
def test_a_file_that_comes_again_under_any_name_goes_to_failed_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timed = [f"{T0 + n},{n}" for n in range(3)]
    put(tmp_path, "a.csv", timed, header="t,n")
    with watching(tmp_path):
        wait_until("a.csv in done/", partial(done_are, tmp_path, 1))
    with watching(tmp_path) as station:
        put(tmp_path, "b.csv", timed, header="t,n")
        wait_until("the copy in failed/", lambda: there(tmp_path)["failed"] == ["b.csv", "b.csv.txt"])
        put(tmp_path, "c.csv", range(1, 3))
        wait_until("another file in done/", partial(done_are, tmp_path, 2))
        assert taken(station) == [0, 1, 2, 1, 2]
        wait_until("both files counted", lambda: station.store.counters().get("files ingested") == 2)
        assert station.store.counters()["files duplicate"] == 1
        assert "files failed" not in station.store.counters()
    text = (tmp_path / "in" / "failed" / "b.csv.txt").read_text()
    assert text.startswith("b.csv: duplicate: a file with the same content was ingested at 20")
    assert text.count("\n") == 1
    assert [r.levelname for r in caplog.records if "b.csv" in r.getMessage()] == ["WARNING"]


@pytest.mark.usefixtures("quick")
def test_hourly_files_with_equal_readings_and_no_time_are_all_ingested(tmp_path: Path) -> None:
    with watching(tmp_path) as station:
        for turn in range(3):
            put(tmp_path, f"{turn}.csv", [21])
            wait_until("another file in done/", partial(done_are, tmp_path, turn + 1))
        assert taken(station) == [21, 21, 21]
        assert there(tmp_path)["failed"] == []


@pytest.mark.usefixtures("quick")
def test_files_with_their_header_only_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    with watching(tmp_path):
        for turn in range(2):
            put(tmp_path, f"{turn}.csv", [], header="t,n")
            wait_until("the file in done/", partial(done_are, tmp_path, turn + 1))
        assert there(tmp_path)["failed"] == []


@pytest.mark.usefixtures("quick")
def test_a_crash_before_a_finished_file_is_moved_makes_it_no_duplicate_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a.csv", range(3))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the power went away")

    with monkeypatch.context() as broken:
        broken.setattr(WatchedFolder, "move_to_done", fail)
        with watching(tmp_path) as station:
            wait_until("the rows", lambda: station.store.last_row("numbers") == 3)
            time.sleep(0.2)
    assert len(there(tmp_path)["taking"]) == 1
    with watching(tmp_path) as station:
        wait_until("a.csv in done/", partial(done_are, tmp_path, 1))
        assert taken(station) == [0, 1, 2]
        assert there(tmp_path)["failed"] == []


@pytest.mark.usefixtures("quick")
def test_other_files_and_hidden_ones_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("notes.md", ".a.csv", "a.csv.part"):
        (tmp_path / "in" / name).write_text("n\n1\n")
    with watching(tmp_path) as station:
        put(tmp_path, "z.csv", [7])
        wait_until("z.csv in done/", lambda: there(tmp_path)["done"] == ["z.csv"])
        assert taken(station) == [7]
    assert (tmp_path / "in" / ".a.csv").exists()


class Looks:
    """Looks of a watcher at its folder; its clock stands still but for `now_s` that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.now_s = 0, 1000.0
        list_files = WatchedFolder.list_files

        def look(folder: WatchedFolder, suffixes: Sequence[str]) -> dict[str, FileState]:
            self.began += 1
            return list_files(folder, suffixes)

        monkeypatch.setattr(files_module, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(WatchedFolder, "list_files", look)

    def wait(self) -> None:
        """Wait for the end of a look that begins from now on."""
        before = self.began
        wait_until("another look at the folder", lambda: self.began >= before + 2)


def test_a_growing_file_is_left_alone_despite_clock_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)
    with watching(tmp_path) as station:
        path = tmp_path / "in" / "a.csv"
        with path.open("w") as file:
            for n in range(6):
                file.write(f"{n}\n" if n else "n\n")
                file.flush()
                # Its time lies in the future: the clock was set back since.
                os.utime(path, (time.time() + 1000 + n, time.time() + 1000 + n))
                looks.wait()
                looks.now_s += 0.9
                looks.wait()
                assert path.exists()
        looks.now_s += 0.2
        wait_until("a.csv in done/", lambda: there(tmp_path)["done"] == ["a.csv"])
        assert taken(station) == list(range(1, 6))


def test_a_file_does_not_settle_during_one_long_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s, made = iter([0.0, 10.0, 10.1, 20.0, 20.2, 20.3]), FilesSource(folder=str(tmp_path))
    monkeypatch.setattr(files_module, "time", SimpleNamespace(monotonic=lambda: next(clock_s)))
    with open_store(tmp_path / "data") as store:
        watcher = FolderWatcher("numbers", NUMBERS, made, store, tmp_path / "data")
        states = {"a.csv": FileState(2, 1, 1)}
        settled = [watcher._select_settled(states, next(clock_s)) for _ in range(3)]
    assert settled == [[], [], ["a.csv"]]


@pytest.mark.usefixtures("quick")
def test_what_a_slow_writer_adds_after_its_file_was_read_is_taken_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, is_read, is_added = FolderWatcher._submit_file, threading.Event(), threading.Event()

    async def submit_and_wait(watcher: FolderWatcher, *arguments: Any) -> None:
        await submit(watcher, *arguments)
        is_read.set()
        await asyncio.to_thread(is_added.wait, 60)

    monkeypatch.setattr(FolderWatcher, "_submit_file", submit_and_wait)
    with watching(tmp_path) as station:
        # Under a name that is not looked at, so that it is not claimed while it is empty still.
        path = tmp_path / "in" / ".a.csv"
        with path.open("w") as file:
            file.write("n\n" + "".join(f"{n}\n" for n in range(2000)))
            file.flush()
            path.rename(path.with_name("a.csv"))
            wait_until("a.csv is read", is_read.is_set)
            file.write("2000\n2001\n")
        is_added.set()
        wait_until("a.csv in done/", lambda: there(tmp_path)["done"] == ["a.csv"])
        assert taken(station) == list(range(2002))


@pytest.mark.usefixtures("quick")
def test_a_writer_that_does_not_pause_holds_up_no_other_file_and_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished_files, "_FIRST_PAUSE_S", 0.1)
    submit, is_over, added = FolderWatcher._submit_file, threading.Event(), 0

    async def submit_and_add(watcher: FolderWatcher, number: int, name: str, *arguments: Any) -> None:
        nonlocal added
        await submit(watcher, number, name, *arguments)
        if name.endswith("a.csv") and not is_over.is_set():
            added += 1
            # The end of the line that was cut off, and a part of the next one.
            file.write(f"{added}\n-")
            file.flush()

    monkeypatch.setattr(FolderWatcher, "_submit_file", submit_and_add)
    with watching(tmp_path) as station, (tmp_path / "in" / "a.csv").open("w") as file:
        file.write("n\n100\nx\n-")
        file.flush()
        wait_until("a.csv is read", lambda: added > 0)
        put(tmp_path, "b.csv", [200])
        wait_until("b.csv in done/", lambda: "b.csv" in there(tmp_path)["done"], timeout_s=30)
        is_over.set()
        file.write("0\n")
        file.flush()
        wait_until("all lines", lambda: station.store.last_row("numbers") == 3 + added)
        wait_until("both in done/", lambda: there(tmp_path)["done"] == ["a.csv", "b.csv"])
        assert sorted(taken(station)) == [*range(-added, 1), 100, 200]


@pytest.mark.usefixtures("quick")
def test_a_rejected_last_line_that_was_whole_is_not_rejected_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished_files, "_FIRST_PAUSE_S", 0.1)
    with watching(tmp_path) as station, (tmp_path / "in" / "a.csv").open("w") as file:
        file.write("n\n1\nx\n")
        file.flush()
        wait_until("a.csv in done/", lambda: there(tmp_path)["done"] == ["a.csv"])
        file.write("2\n")
        file.flush()
        wait_until("its other row", lambda: station.store.counters().get("files ingested") == 2)
        assert taken(station) == [1, 2]
        assert station.store.counters()["lines rejected"] == 1


@pytest.mark.usefixtures("quick")
def test_files_that_could_not_be_moved_are_ingested_once_the_folder_is_writable_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, refused = WatchedFolder.claim, []

    def claim_if_permitted(self: WatchedFolder, name: str) -> str:
        # Root is refused nothing, so the mode only stands for a refusal.
        if not (tmp_path / "in").stat().st_mode & 0o055:
            refused.append(name)
            raise PermissionError(errno.EACCES, "Permission denied")
        return claim(self, name)

    monkeypatch.setattr(WatchedFolder, "claim", claim_if_permitted)
    with watching(tmp_path) as station:
        (tmp_path / "in").chmod(0o700)
        put(tmp_path, "a.csv", range(10))
        wait_until("a refusal", lambda: bool(refused))
        (tmp_path / "in").chmod(0o755)
        wait_until("a.csv in done/", lambda: there(tmp_path)["done"] == ["a.csv"])
        assert taken(station) == list(range(10))


@pytest.mark.usefixtures("quick")
def test_small_files_share_commits_in_the_order_of_their_names(tmp_path: Path) -> None:
    for n in range(48):
        put(tmp_path, f"{n:02}.csv", range(10 * n, 10 * n + 10))
    long = [*range(240, 20_240)]
    put(tmp_path, "24.csv", long)
    with watching(tmp_path, commit_every_s=0.2) as station:
        wait_until("all in done/", lambda: done_are(tmp_path, 48))
        assert taken(station) == [*range(240), *long, *range(250, 480)]
        commits = station.store._fetch_one("SELECT count(DISTINCT boot_us) FROM chunks")
    assert commits is not None
    assert commits[0] < 24


@pytest.mark.usefixtures("quick")
def test_what_a_writer_adds_after_a_pause_is_read_and_a_line_that_was_cut_off_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished_files, "_FIRST_PAUSE_S", 0.1)
    with watching(tmp_path) as station:
        with (tmp_path / "in" / "a.csv").open("w") as file:
            # What a buffered writer leaves until its next flush.
            begin = "n\n" + "".join(f"{n}\n" for n in range(100)) + "-"
            file.write(begin)
            file.flush()
            wait_until("a.csv in done/", lambda: there(tmp_path)["done"] == ["a.csv"])
            file.write("5\n100\n")
        wait_until("its other rows", lambda: station.store.counters().get("files ingested") == 2)
        assert there(tmp_path)["done"] == ["a.csv"]
        assert taken(station) == [*range(100), -5, 100]


@pytest.mark.usefixtures("quick")
def test_a_full_store_holds_a_file_up_and_loses_none_of_it(tmp_path: Path) -> None:
    put(tmp_path, "a.csv", range(60_000))
    with watching(tmp_path, max_size=216 * PAGE_SIZE) as station:
        wait_until("a store that fills", lambda: station.store.last_row("numbers") > 20_000)
        time.sleep(0.3)
        stored = station.store.last_row("numbers")
        assert stored < 60_000
        assert there(tmp_path)["done"] == []
        result = taken(station)
        for _ in range(1000):
            with station.store.transaction() as tx:
                tx.trim_rows("numbers", len(result), 2**62, 100)
            time.sleep(0.05)
            batch = station.store.read_rows("numbers", NUMBERS.fields, len(result), 10**6)
            result += batch.rows.columns[0].tolist() if batch else []
            if there(tmp_path)["done"]:
                break
        assert result == list(range(60_000))


@pytest.mark.usefixtures("quick")
def test_a_missing_folder_is_logged_once_and_watched_when_it_returns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with watching(tmp_path) as station:
        wait_until("a moment in which the watcher does not make the folder again", lambda: replace_with_file(tmp_path))
        # While the folder is removed, the watcher may meet a part of it: that is another error, and logged, too.
        wait_until("a complaint", lambda: "File exists" in caplog.text)
        time.sleep(0.2)
        assert caplog.text.count("File exists") == 1
        (tmp_path / "in").unlink()
        put(tmp_path, "a.csv", [1])
        wait_until("a.csv in done/", lambda: (tmp_path / "in" / "done" / "a.csv").exists())
        assert taken(station) == [1]


@pytest.mark.usefixtures("quick")
def test_a_folder_in_taking_goes_to_failed_and_other_files_continue(tmp_path: Path) -> None:
    for name in ("keep", "1.b.csv"):
        (tmp_path / "in" / "taking" / name).mkdir(parents=True)
    put(tmp_path, "z.csv", [7])
    with watching(tmp_path) as station:
        wait_until("z.csv in done/", lambda: there(tmp_path)["done"] == ["z.csv"])
        assert taken(station) == [7]
        assert station.store.counters()["files failed"] == 2
    assert there(tmp_path)["failed"] == ["b.csv", "b.csv.txt", "keep", "keep.txt"]
    assert (tmp_path / "in" / "failed" / "keep.txt").read_text() == (
        "keep: is a folder, not a file; copy the file itself into the folder\n"
    )


def fail_to_open(monkeypatch: pytest.MonkeyPatch, name: str, error: int, times: int) -> list[str]:
    """Make the first `times` attempts to open `name` fail; the attempts are in the list."""
    tried: list[str] = []
    open_claimed = WatchedFolder.open_claimed

    def unreliable(folder: WatchedFolder, claimed: str) -> int:
        if claimed.endswith(name) and len(tried) < times:
            tried.append(claimed)
            raise OSError(error, os.strerror(error), claimed)
        return open_claimed(folder, claimed)

    monkeypatch.setattr(WatchedFolder, "open_claimed", unreliable)
    return tried


@pytest.mark.parametrize(
    ("error", "expected_reason"),
    [(errno.EACCES, "Permission denied"), (errno.EIO, "Input/output error"), (errno.ELOOP, "levels")],
)
@pytest.mark.usefixtures("quick")
def test_an_unreadable_file_goes_to_failed_and_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, expected_reason: str
) -> None:
    fail_to_open(monkeypatch, "a.csv", error, 10**6)
    put(tmp_path, "a.csv", [1])
    put(tmp_path, "b.csv", [2])
    with watching(tmp_path) as station:
        wait_until("b.csv in done/", lambda: there(tmp_path)["done"] == ["b.csv"])
        assert taken(station) == [2]
        assert station.store.counters()["files failed"] == 1
    assert there(tmp_path)["failed"] == ["a.csv", "a.csv.txt"]
    assert expected_reason in (tmp_path / "in" / "failed" / "a.csv.txt").read_text()


@pytest.mark.usefixtures("quick")
def test_a_file_is_read_later_where_the_machine_has_no_descriptor_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = fail_to_open(monkeypatch, "a.csv", errno.EMFILE, 3)
    put(tmp_path, "a.csv", [1])
    with watching(tmp_path) as station:
        wait_until("a.csv in done/", lambda: there(tmp_path)["done"] == ["a.csv"])
        assert taken(station) == [1]
    assert len(tried) == 3
    assert there(tmp_path)["failed"] == []
    assert caplog.text.count("looking again") == 1


def replace_with_file(folder: Path) -> bool:
    """Put a file in the watched folder's place."""
    try:
        shutil.rmtree(folder / "in", ignore_errors=True)
        (folder / "in").write_text("not a folder")
    except IsADirectoryError:
        return False
    return True


_WATCHER = """\
import sys, time
from pathlib import Path
from outstation.device.config import Duration, FieldConfig, StreamConfig
from outstation.device.config.sources import FilesSource
from outstation.device.intake.sources import files
from tests.kit.killed_watcher import kill_with_a_file_in_hand
from tests.kit.stations import Station, conf

files._SETTLED_S = 0.0
folder, stream = Path(sys.argv[1]), StreamConfig(fields=[FieldConfig(name="n", type="i64")])
source = FilesSource(folder=str(folder / "in"), poll_interval=Duration(0.01))
made = conf(folder / "data", 0.001, numbers=stream)
with Station(made, sources=lambda store: [files.FolderWatcher("numbers", stream, source, store, folder / "data")]):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_rows_of_files_come_once_when_the_agent_is_killed_again_and_again(tmp_path: Path) -> None:
    rng = random.Random(8)
    n = 40_000
    for index in range(3):
        put(tmp_path, f"{index}.csv", range(index * n, (index + 1) * n))
    command = [sys.executable, "-c", _WATCHER, str(tmp_path)]
    interrupted = kill_with_a_file_in_hand(command, tmp_path / "in", 3, 8, rng)
    store = open_store(tmp_path / "data")
    store.declare_streams({"numbers": NUMBERS})
    assert rows_of(store, "numbers", NUMBERS).columns[0].tolist() == list(range(3 * n))
    store.close()
    assert interrupted > 0, "no kill in the middle of a file"


# --- host


def host(*fields: FieldConfig, every_s: float = 0.05) -> StreamConfig:
    return StreamConfig(fields=list(fields), source=HostSource(poll_interval=config.Duration(every_s)))


@contextmanager
def hosting(folder: Path, stream: StreamConfig, commit_every_s: float = 0.02) -> Iterator[Station]:
    source = stream.source
    assert isinstance(source, HostSource)
    made = conf(folder, commit_every_s, host=stream)
    with Station(made, sources=lambda _: [HostMetrics("host", stream, source, folder)]) as station:
        yield station
        assert station.failures == []


def test_the_host_is_measured_at_its_interval_while_rows_wait_for_their_commit(tmp_path: Path) -> None:
    stream = host(FieldConfig(name="memory"), every_s=0.02)
    with hosting(tmp_path, stream, commit_every_s=60) as station:
        wait_until("five rows that wait", lambda: station.intake.group_commit._rows >= 5)
        assert station.commits == 0
        wait_until("the row that brings the commit", lambda: station.store.last_row("host") == 100)


def test_the_hosts_condition_comes_again_and_again(tmp_path: Path) -> None:
    names = ("cpu", "load1", "memory", "disk", "swap", "uptime")
    stream = host(
        *(FieldConfig(name=name, type="f64", min=0) for name in names), FieldConfig(name="temperature", optional=True)
    )
    with hosting(tmp_path, stream) as station:
        wait_until("three readings", lambda: station.store.last_row("host") >= 3)
        rows = station.rows("host")
    values = dict(zip([*names, "temperature"], rows.columns, strict=True))
    assert (values["memory"] > 0).all()
    assert (values["memory"] <= 100).all()
    assert abs(values["uptime"][-1] - clock.boot_seconds()) < 60
    assert np.diff(rows.t).min() > 0
    assert abs(rows.t[-1] / 1e6 - time.time()) < 60


def test_a_field_that_no_host_has_is_named_with_those_there_are(tmp_path: Path) -> None:
    stream = host(FieldConfig(name="memroy"))
    with pytest.raises(ConfigError, match=r"streams\.host\.fields: the host has no 'memroy'; did you mean 'memory'"):
        host_source.check(SourceContext("outstation.toml", conf(tmp_path, host=stream), "host"), HostSource())


def test_an_unreadable_metric_is_missing_and_logged_once_if_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable() -> dict[str, Any]:
        raise OSError("no sensors")

    monkeypatch.setattr("psutil.sensors_temperatures", unreadable)
    with hosting(tmp_path / "a", host(FieldConfig(name="temperature", optional=True))) as station:
        wait_until("two readings", lambda: station.store.last_row("host") >= 2)
        assert np.isnan(station.rows("host").columns[0]).all()
    with hosting(tmp_path / "b", host(FieldConfig(name="temperature"))) as station:
        wait_until("three rejected readings", lambda: station.store.counters().get("lines rejected", 0) >= 3)
    text = [record.getMessage() for record in caplog.records if record.name == "outstation.host"]
    assert text == ["host: not stored: temperature is missing (optional = true allows a missing value)"]


# --- replay


RATE = 100.0
WATCH = StreamConfig(fields=[FieldConfig(name="ax"), FieldConfig(name="ay", optional=True)])


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subjects, six recordings each of 150-400 rows; ax counts all rows, ay is the recording's number."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(150, 400, 18)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.stack([np.arange(starts[-1]), np.repeat(np.arange(18), lengths)], axis=1).astype(np.float32)
    path = tmp_path_factory.mktemp("recordings") / "r.npz"
    labels: dict[str, Any] = {
        "label": np.arange(18) % 2,
        "labels": np.array(["rest", "move"]),
        "subject": np.arange(18) // 6,
    }
    np.savez(path, rows=rows, starts=starts, fields=np.array(["ax", "ay"]), rate=RATE, **labels)
    return path


def replay_of(path: Path, **source: Any) -> ReplaySource:
    defaults: dict[str, Any] = {"file": str(path), "speed": 1000.0, "rows": 3000, "subject": 1, "seed": 5}
    return ReplaySource(**(defaults | source))


def start(at_s: float = T0) -> ClockReading:
    return ClockReading(round(at_s * 1e6), 0.0, "synced")


@contextmanager
def replaying(folder: Path, source: ReplaySource, at_s: float = T0, **store: Any) -> Iterator[Station]:
    made = conf(folder, watch=WATCH)
    station = Station(made, sources=lambda s: [ReplayPlayer("watch", WATCH, source, s, start(at_s))], **store)
    with station:
        yield station
        assert station.failures == []


def rows_are(station: Station, rows: int) -> bool:
    return station.store.last_row("watch") >= rows


def played(folder: Path, source: ReplaySource, stops: tuple[int, ...] = ()) -> Rows:
    """All rows of a replay that is stopped once each of `stops` rows is there, and started again later."""
    for index, stop in enumerate([*stops, source.rows or 0]):
        with replaying(folder, source, T0 + index * 500) as station:
            wait_until(f"{stop} rows", partial(rows_are, station, stop))
            if stop == source.rows:
                time.sleep(0.3)
                assert station.store.last_row("watch") == stop
                return station.rows("watch")
    raise AssertionError


def test_row_n_of_a_replay_is_the_same_whenever_it_was_stopped(tmp_path: Path, recordings: Path) -> None:
    whole = played(tmp_path / "a", replay_of(recordings))
    parts = played(tmp_path / "b", replay_of(recordings, speed=30.0), (400, 900, 901, 2500))
    assert pack_chunk(parts) == pack_chunk(whole)
    other = played(tmp_path / "c", replay_of(recordings, seed=6))
    assert other.columns[0].tolist() != whole.columns[0].tolist()


def test_a_replay_is_what_its_playlist_says(tmp_path: Path, recordings: Path) -> None:
    rows = played(tmp_path, replay_of(recordings))
    known = load(recordings)
    at = 0
    for part in Playlist(known, 1, 5).iter_items():
        n = min(part.n, len(rows) - at)
        assert part.first == at + 1
        assert rows.columns[0][at : at + n].tolist() == list(range(part.start, part.start + n))
        assert np.diff(rows.t[at : at + n]) == pytest.approx(1e6 / RATE, abs=1)
        assert {known.subject[int(r)] for r in rows.columns[1][at : at + n]} == {1}
        at += n
        if at == len(rows):
            break
    assert np.diff(rows.t).min() > 0
    assert np.diff(rows.t).max() > 4e6


def test_a_playlist_goes_on_after_any_row(recordings: Path) -> None:
    known = load(recordings)
    everything = Playlist(known, None, 3).iter_items()
    parts = [next(everything) for _ in range(60)]
    for after in (0, 1, parts[20].last - 1, parts[20].last, parts[40].first):
        assert next(Playlist(known, None, 3).iter_items(after)) == next(p for p in parts if p.last > after)


def test_a_replay_of_known_length_ends_now_and_keeps_its_times(tmp_path: Path, recordings: Path) -> None:
    with replaying(tmp_path, replay_of(recordings, rows=500)) as station:
        wait_until("500 rows", lambda: station.store.last_row("watch") == 500)
        last = station.rows("watch").t[-1] / 1e6
    assert T0 - 10 < last <= T0


def test_injected_faults_begin_at_their_row(tmp_path: Path, recordings: Path) -> None:
    faults = [
        ReplayFault(kind="gain", fields=["ax"], from_row=1000, amount=0.5),
        ReplayFault(kind="offset", fields=["ax"], from_row=1500, amount=7.0),
        ReplayFault(kind="missing", fields=["ay"], from_row=2000),
        ReplayFault(kind="stuck", fields=["ax"], from_row=2500, amount=-3.0),
    ]
    clean = played(tmp_path / "a", replay_of(recordings))
    faulty = played(tmp_path / "b", replay_of(recordings, faults=faults))
    ax, ay = (column.astype(float) for column in clean.columns)
    expected = ax.copy()
    expected[999:] *= 0.5
    expected[1499:] += 7
    expected[2499:] = -3
    assert faulty.columns[0].tolist() == expected.astype("f4").tolist()
    assert np.flatnonzero(np.isnan(faulty.columns[1])).tolist() == list(range(1999, 3000))
    assert faulty.columns[1][:1999].tolist() == ay[:1999].tolist()
    assert faulty.t.tolist() == clean.t.tolist()


def test_a_replay_keeps_its_pace(tmp_path: Path, recordings: Path) -> None:
    began = time.monotonic()

    def due(after_s: float) -> float:
        return 10 * RATE * (time.monotonic() - began + after_s)

    with replaying(tmp_path, replay_of(recordings, speed=10.0, rows=None)) as station:
        wait_until("the first rows", lambda: station.store.last_row("watch") >= 100)
        time.sleep(1.0)
        assert station.store.last_row("watch") <= due(0.1)
        wait_until("half of what is due", lambda: station.store.last_row("watch") > 0.5 * due(-0.3))


def test_a_full_store_holds_a_replay_up_and_skips_nothing(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outstation.device.intake.sources.replay._FULL_RETRY_S", 0.05)
    source = replay_of(recordings, rows=40_000, speed=1e5)
    whole = played(tmp_path / "a", source)
    with replaying(tmp_path / "b", source, max_size=216 * PAGE_SIZE) as station:
        wait_until("a store that fills", lambda: station.store.last_row("watch") > 10_000)
        result: list[float] = []
        for _ in range(1000):
            batch = station.store.read_rows("watch", WATCH.fields, len(result), 10**6)
            result += batch.rows.columns[0].tolist() if batch else []
            with station.store.transaction() as tx:
                tx.trim_rows("watch", len(result), 2**62, 100)
            time.sleep(0.05)
            if len(result) == 40_000:
                break
    assert result == whole.columns[0].tolist()


_PLAYER = """\
import sys, time
from pathlib import Path
from outstation.foundation.clock import ClockReading
from outstation.device.config import FieldConfig, StreamConfig
from outstation.device.config.sources import ReplaySource
from outstation.device.intake.sources.replay import ReplayPlayer
from outstation.device.intake.sources.watched_folder import WatchedFolder
from tests.kit.killed_watcher import kill_with_a_file_in_hand
from tests.kit.stations import Station, conf

stream = StreamConfig(fields=[FieldConfig(name="ax"), FieldConfig(name="ay", optional=True)])
source = ReplaySource(file=sys.argv[2], subject=1, seed=5, rows=3000, speed=40.0)
made = conf(Path(sys.argv[1]), watch=stream)
begin = ClockReading(1_764_022_680_000_000, 0.0, "synced")
with Station(made, sources=lambda store: [ReplayPlayer("watch", stream, source, store, begin)]):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_replay_that_is_killed_again_and_again_repeats_and_skips_no_row(tmp_path: Path, recordings: Path) -> None:
    rng = random.Random(4)
    for _ in range(5):
        command = [sys.executable, "-c", _PLAYER, str(tmp_path / "b"), str(recordings)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.25 + rng.random() * 0.2)
            process.kill()
    parts = played(tmp_path / "b", replay_of(recordings))
    assert pack_chunk(parts) == pack_chunk(played(tmp_path / "a", replay_of(recordings)))


@pytest.mark.parametrize(
    ("change", "expected_reason"),
    [
        ({"subject": 9}, "the recordings have no subject 9"),
        ({"file": "/nowhere.npz"}, "/nowhere.npz: cannot be read: No such file or directory"),
    ],
)
def test_a_replay_that_cannot_play_is_named(
    tmp_path: Path, recordings: Path, change: Any, expected_reason: str
) -> None:
    store = open_store(tmp_path)
    with pytest.raises(UsageError, match=expected_reason):
        ReplayPlayer("watch", WATCH, replay_of(recordings, **change), store, start())
    store.close()


def test_fields_without_a_recording_are_named(tmp_path: Path, recordings: Path) -> None:
    store = open_store(tmp_path)
    stream = StreamConfig(fields=[FieldConfig(name="ax"), FieldConfig(name="az")])
    with pytest.raises(UsageError, match="has no az; it has ax, ay"):
        ReplayPlayer("watch", stream, replay_of(recordings), store, start())
    store.close()


def test_a_file_of_recordings_that_is_damaged_is_named(tmp_path: Path, recordings: Path) -> None:
    whole = recordings.read_bytes()
    path = tmp_path / "r.npz"
    for content in (b"", b"PK\x03\x04", whole[: len(whole) // 2], b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="not readable as recordings"):
            load(path)


def test_the_threads_of_these_tests_have_ended() -> None:
    assert [thread.name for thread in threading.enumerate() if thread.name == "intake"] == []
