"""Salvage: a store opens after any damage; surviving rows and messages are readable, lost ones declared."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outstation.device.recovery import raw_pages, salvage
from outstation.device.store import watermark
from outstation.foundation import clock
from outstation.foundation.errors import StorageDamaged, StorageError
from scripts.kit.stores import (
    alarms,
    append,
    append_message,
    declared_numbers,
    filled,
    opened,
    outbox_payloads,
    pulled,
    put_aside,
    served,
)
from tests.kit.stations import ROOT

PAGE = 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store after a power cut with everything in the database file."""
    folder = tmp_path_factory.mktemp("whole")
    store, _ = filled(folder / "live")
    copy = pulled(folder / "live", folder / "copy", store, emptied=True)
    store.close()
    return copy


@pytest.fixture(scope="module")
def in_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store after a power cut with the newest commits in its write-ahead log only."""
    folder = tmp_path_factory.mktemp("in_log")
    store, author = filled(folder / "live")
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for number in range(10):
        append(store, "numbers", 10)
        append_message(store, author, f"late {number}")
    copy = pulled(folder / "live", folder / "copy")
    store.close()
    return copy


def check_whole(folder: Path, rows: int, messages: int) -> tuple[set[int], set[int]]:
    """Open a damaged store and hold it to everything that is promised; rows and seqs that survived."""
    store, author = opened(folder)
    try:
        put_aside(store, author)
        stored = served(store)
        assert all(number == value for number, value in stored.items()), "a row is served as another one"
        texts = outbox_payloads(store)
        survived = {seq for seq, body in texts.items() if seq <= messages and body["log"] == author.log_id}
        for seq in survived:
            assert texts[seq]["seq"] == seq
            assert "message" in texts[seq]["summary"] or "late" in texts[seq]["summary"]
        lost_rows = set(range(1, rows + 1)) - stored.keys()
        lost_seqs = set(range(1, messages + 1)) - survived
        new = {seq: body for seq, body in texts.items() if seq > messages}
        if not store.get_meta("previous log", ""):
            assert store.last_row("numbers") == rows
            assert lost_seqs - set(range(1, 9)) <= declared_numbers(new, "seq"), "a lost message is not declared"
            used = {row for row in lost_rows if row <= (store.cursor("judge") or 0)}
            assert used <= declared_numbers(new, "rows", "numbers"), "a lost reading that was used is not declared"
        if lost_rows or lost_seqs - set(range(1, 9)):
            assert alarms(new) or store.get_meta("previous log", "")
        before = store.last_row("numbers")
        append(store, "numbers", 10)
        assert store.last_row("numbers") == before + 10
        append_message(store, author, "goes on")
    finally:
        store.close()
    return set(stored), survived


def damages(size: int, page: int) -> Iterator[tuple[str, Callable[[bytearray], None]]]:
    def zero(data: bytearray) -> None:
        data[page : page + PAGE] = bytes(len(data[page : page + PAGE]))

    def overwrite(data: bytearray) -> None:
        data[page : page + 64] = b"\xff" * len(data[page : page + 64])

    def head(data: bytearray) -> None:
        data[page + 3 : page + 5] = b"\x00\x01"

    def middle(data: bytearray) -> None:
        data[page + 2000 : page + 2300] = b"\xa5" * len(data[page + 2000 : page + 2300])

    def cut(data: bytearray) -> None:
        del data[page:]

    yield from (("zeroed", zero), ("overwritten", overwrite), ("shortened", head), ("scribbled", middle), ("cut", cut))


def test_any_page_of_the_database_may_be_damaged(whole: Path, tmp_path: Path) -> None:
    data = (whole / "outstation.db").read_bytes()
    survived = []
    for number, page in enumerate(range(0, len(data), PAGE)):
        kinds = list(damages(len(data), page))
        # Every kind for the first page; the others take turns.
        for _, damage in kinds if page == 0 else kinds[number % 5 : number % 5 + 1]:
            changed = bytearray(data)
            damage(changed)
            rows, seqs = check_whole(damaged_copy(whole, tmp_path, "outstation.db", changed), 400, 30)
            survived.append(len(rows) + len(seqs))
    assert sum(survived) / len(survived) > 300


@pytest.mark.parametrize("byte", range(100))
def test_one_bit_of_the_header_may_be_turned(whole: Path, tmp_path: Path, byte: int) -> None:
    data = bytearray((whole / "outstation.db").read_bytes())
    data[byte] ^= 1 << byte * 5 % 8
    check_whole(damaged_copy(whole, tmp_path, "outstation.db", data), 400, 30)


def damaged_copy(whole: Path, folder: Path, name: str, data: bytes | bytearray) -> Path:
    case = folder / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(whole, case)
    (case / name).write_bytes(data)
    return case


def test_any_part_of_the_write_ahead_log_may_be_damaged(in_log: Path, tmp_path: Path) -> None:
    data = (in_log / "outstation.db-wal").read_bytes()
    frames = len(data) // (PAGE + 24)
    assert frames > 20
    losses = []
    for number, frame in enumerate(range(0, frames, 3)):
        at = 32 + frame * (PAGE + 24)
        changed = bytearray(data)
        if number % 3 == 0:
            del changed[at + 1000 :]
        elif number % 3 == 1:
            changed[at + 24 + 700] ^= 1
        else:
            changed[at : at + PAGE + 24] = bytes(PAGE + 24)
        rows, seqs = check_whole(damaged_copy(in_log, tmp_path, "outstation.db-wal", changed), 500, 40)
        assert len(rows) >= 400
        losses.append(500 - len(rows) + 40 - len(seqs))
    assert losses[0] > losses[-1]


@pytest.mark.parametrize("table", ["chunks", "outbox"])
def test_leaves_of_a_tree_without_its_root_are_recovered(whole: Path, in_log: Path, tmp_path: Path, table: str) -> None:
    with contextlib.closing(sqlite3.connect(damaged_copy(whole, tmp_path, "lock", b"") / "outstation.db")) as db:
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0]
    data = bytearray((whole / "outstation.db").read_bytes())
    assert data[(page - 1) * PAGE] == 5, "the tree has only one page"
    data[(page - 1) * PAGE : page * PAGE] = bytes(PAGE)
    rows, seqs = check_whole(damaged_copy(whole, tmp_path, "outstation.db", data), 400, 30)
    assert rows == set(range(1, 401))
    assert seqs == set(range(1, 31))


def test_rows_scattered_over_database_and_log_are_those_of_the_tables(in_log: Path, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(damaged_copy(in_log, tmp_path, "lock", b"") / "outstation.db")) as db:
        chunks = dict(db.execute("SELECT id, data FROM chunks").fetchall())
        messages = dict(db.execute("SELECT seq, payload FROM outbox").fetchall())
    result = list(raw_pages.read_leaf_rows(in_log / "outstation.db"))
    assert {rowid: values[6] for rowid, values in result if len(values) >= 10} == chunks
    assert {rowid: values[2] for rowid, values in result if len(values) == 6 and values[0] is None} == messages


@given(st.binary(min_size=1, max_size=200), st.integers(0, 3800), st.integers(0, 2), st.integers(0, 9000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_junk_in_some_pages_costs_no_row_of_the_others(
    whole: Path, tmp_path: Path, junk: bytes, at: int, first: int, cut: int
) -> None:
    """Junk is in every third page; a row is of the others if it is read in the same way with those pages empty."""
    sound = (whole / "outstation.db").read_bytes()
    damaged, emptied = bytearray(sound[: len(sound) - cut]), bytearray(sound[: len(sound) - cut])
    for page in range((first + 1) * PAGE, len(damaged) - PAGE, 3 * PAGE):
        damaged[page + at : page + at + len(junk)] = junk
        emptied[page : page + PAGE] = bytes(PAGE)

    def rows(data: bytes | bytearray) -> set[tuple[Any, ...]]:
        (tmp_path / "junk.db").write_bytes(data)
        return {(rowid, *values) for rowid, values in raw_pages.read_leaf_rows(tmp_path / "junk.db")}

    others = rows(sound) & rows(emptied)
    assert len(others) > 10
    result = rows(damaged)
    assert others <= result
    assert {type(value) for row in result for value in row} <= {int, float, bytes, type(None)}


def test_without_its_write_ahead_log_a_store_goes_on_where_it_had_got(in_log: Path, tmp_path: Path) -> None:
    shutil.copytree(in_log, tmp_path / "case")
    (tmp_path / "case/outstation.db-wal").unlink()
    rows, seqs = check_whole(tmp_path / "case", 500, 40)
    assert rows == set(range(1, 401))
    assert seqs == set(range(1, 31))


@given(
    where=st.floats(0, 1, exclude_max=True),
    name=st.sampled_from(["outstation.db", "outstation.db-wal", "watermark"]),
    how=st.sampled_from(["bit", "zeros", "cut", "junk"]),
    length=st.integers(1, 9000),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_store_opens_after_any_damage_to_any_file(
    in_log: Path, tmp_path: Path, where: float, name: str, how: str, length: int
) -> None:
    data = bytearray((in_log / name).read_bytes())
    at = int(where * len(data))
    if how == "bit":
        data[at] ^= 1 << length % 8
    elif how == "cut":
        del data[at:]
    else:
        part = data[at : at + length]
        data[at : at + length] = bytes(len(part)) if how == "zeros" else bytes(17 * i % 256 for i in range(len(part)))
    case = damaged_copy(in_log, tmp_path, name, data)
    try:
        store, author = opened(case)
    except StorageError as error:
        pytest.fail(f"it does not open: {error}")
    try:
        put_aside(store, author)
        assert all(number == value for number, value in served(store).items())
        assert {body["seq"] for body in outbox_payloads(store).values()} == outbox_payloads(store).keys()
    finally:
        store.close()


def test_a_salvage_killed_at_any_step_is_finished_by_the_next_opening(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray((whole / "outstation.db").read_bytes())
    data[5 * PAGE : 6 * PAGE] = bytes(PAGE)
    expected = check_whole(damaged_copy(whole, tmp_path, "outstation.db", data), 400, 30)
    steps = 0
    for last in range(1, 100):
        case = damaged_copy(whole, tmp_path, "outstation.db", data)
        left = [last]

        def killed(real: Callable[..., object], left: list[int] = left) -> Callable[..., object]:
            def step(*arguments: object, **options: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return real(*arguments, **options)

            return step

        with monkeypatch.context() as patch:
            for owner, names in ((Path, ("rename", "unlink", "mkdir", "open")), (os, ("fsync",))):
                for name in names:
                    patch.setattr(owner, name, killed(getattr(owner, name)))
            try:
                salvage.write_damage_marker(case, "a test")
                salvage.salvage(case, "a test", watermark.load(case), None)
            except Killed:
                steps += 1
        if left[0] > 0:
            break
        assert check_whole(case, 400, 30) == expected
    assert steps > 10


class Killed(BaseException):
    """Stands for SIGKILL between two system calls."""


_OPENER = """\
import sys
from pathlib import Path
from scripts.kit.stores import opened
print("begins", flush=True)
store, _ = opened(Path(sys.argv[1]))
store.close()
print("done", flush=True)
"""


def test_kill_9_during_a_salvage(whole: Path, tmp_path: Path) -> None:
    data = bytearray((whole / "outstation.db").read_bytes())
    data[5 * PAGE : 6 * PAGE] = bytes(PAGE)
    for wait_s in (0.005, 0.02, 0.05):
        case = damaged_copy(whole, tmp_path, "outstation.db", data)
        command = [sys.executable, "-c", _OPENER, str(case)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begins\n"
            time.sleep(wait_s)
            process.kill()
        rows, _ = check_whole(case, 400, 30)
        assert len(rows) >= 300


@pytest.mark.parametrize("broken", [False, True])
def test_a_journal_left_by_a_power_cut_is_rolled_back_or_quarantined(whole: Path, tmp_path: Path, broken: bool) -> None:
    case = damaged_copy(whole, tmp_path, "outstation.db", (whole / "outstation.db").read_bytes())
    with contextlib.closing(sqlite3.connect(case / "outstation.db", isolation_level=None)) as db:
        assert db.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
        # So that pages are written before the transaction ends.
        db.execute("PRAGMA cache_size=1")
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE outbox SET payload = zeroblob(length(payload))")
        db.execute("UPDATE chunks SET data = zeroblob(length(data))")
        cut = {name: (case / name).read_bytes() for name in ("outstation.db", "outstation.db-journal")}
        db.execute("ROLLBACK")
    assert cut["outstation.db"] != (case / "outstation.db").read_bytes()
    for name, data in cut.items():
        (case / name).write_bytes(data)
    if broken:
        (case / "outstation.db").write_bytes(bytes(PAGE // 2) + cut["outstation.db"][PAGE // 2 :])
        store, _ = opened(case)
        store.close()
        assert not (case / "outstation.db-journal").exists()
        return
    rows, _ = check_whole(case, 400, 30)
    assert len(rows) == 400


def test_the_newest_two_quarantines_hold_the_damaged_files(whole: Path, tmp_path: Path) -> None:
    case = damaged_copy(whole, tmp_path, "outstation.db", (whole / "outstation.db").read_bytes())
    for number in range(1, 5):
        data = bytearray((case / "outstation.db").read_bytes())
        data[: PAGE // 2] = bytes(PAGE // 2)
        (case / "outstation.db").write_bytes(data)
        (case / "outstation.db-wal").unlink(missing_ok=True)
        store, _ = opened(case)
        store.close()
        assert (case / f"quarantine/{number}/outstation.db").read_bytes() == data
    assert sorted(path.name for path in (case / "quarantine").iterdir()) == ["3", "4"]


def test_damage_detected_in_use_is_salvaged_at_the_next_opening(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    data = bytearray((tmp_path / "outstation.db").read_bytes())
    root = sqlite3.connect(tmp_path / "outstation.db").execute(
        "SELECT rootpage FROM sqlite_master WHERE name = 'chunks'"
    )
    at = (root.fetchone()[0] - 1) * PAGE
    root.connection.close()
    data[at : at + PAGE] = bytes(PAGE)
    (tmp_path / "outstation.db").write_bytes(data)
    # It was closed cleanly, so that nothing is looked through when it is opened.
    store, _ = opened(tmp_path)
    with pytest.raises(StorageDamaged, match="salvages it when it starts next"):
        served(store)
    store.close()
    assert (tmp_path / "damaged").exists()
    store, _ = opened(tmp_path)
    assert not (tmp_path / "damaged").exists()
    assert alarms(outbox_payloads(store))[-1]["severity"] == "critical"
    store.close()


def test_lost_cursors_are_raised_to_the_stored_results(tmp_path: Path) -> None:
    store, author = filled(tmp_path / "live", messages=0)
    early = (tmp_path / "live/watermark").read_bytes()
    for first in range(1, 200, 20):
        with store.transaction() as tx:
            tx.advance_cursor("judge", first, first + 19)
            author.append(tx, "results", "judge", {"rows": [first, first + 19]}, clock.read())
    case = pulled(tmp_path / "live", tmp_path / "case", store, emptied=True)
    store.close()
    (case / "watermark").write_bytes(early)
    with contextlib.closing(sqlite3.connect(case / "outstation.db")) as db:
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'cursors'").fetchone()[0]
    data = bytearray((case / "outstation.db").read_bytes())
    data[(page - 1) * PAGE : page * PAGE] = bytes(PAGE)
    (case / "outstation.db").write_bytes(data)
    store, _ = opened(case)
    assert (store.first_consumed("judge"), store.cursor("judge")) == (1, 200)
    assert all(not alarm["evidence"]["tasks"] for alarm in alarms(outbox_payloads(store)))
    store.close()


def test_no_category_code_comes_to_mean_another_text(whole: Path, tmp_path: Path) -> None:
    case = damaged_copy(whole, tmp_path, "outstation.db", (whole / "outstation.db").read_bytes())
    with contextlib.closing(sqlite3.connect(case / "outstation.db")) as db:
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'categories'").fetchone()[0]
    data = bytearray((case / "outstation.db").read_bytes())
    data[(page - 1) * PAGE : page * PAGE] = bytes(PAGE)
    (case / "outstation.db").write_bytes(data)
    store, _ = opened(case)
    assert store.categories("numbers", "mode") == ["", "lost category 1", "lost category 2"]
    with store.transaction() as tx:
        assert tx.assign_category_codes("numbers", "mode", ["low"], limit=1000, last_row=0)[0] == [3]
    store.close()


def test_a_full_disk_leaves_the_damaged_store_as_it_is_and_says_so(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray((whole / "outstation.db").read_bytes())
    data[:100] = bytes(100)
    case = damaged_copy(whole, tmp_path, "outstation.db", data)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(salvage, "_build", full)
        with pytest.raises(StorageError, match="make room on the disk"):
            opened(case)
    rows, seqs = check_whole(case, 400, 30)
    assert (len(rows), len(seqs)) == (400, 30)
