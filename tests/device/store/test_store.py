"""Device store: a committed transaction survives anything, and an aborted one leaves nothing."""

from __future__ import annotations

import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.group_commit import GroupCommit
from outstation.device.recovery.open import open_store
from outstation.device.store.outbox import OutboxMessage
from outstation.device.store.quota import PAGE_SIZE
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.rows import RawColumns, Rows, concatenate, pack_chunk, validate_columns
from outstation.device.store.store import Store
from outstation.device.store.tables import schema
from outstation.device.store.transaction import TrimmedChunks
from outstation.foundation import clock
from outstation.foundation.errors import StorageBusy, StorageError, StorageFull, UsageError
from scripts.kit.stores import append_message, filled
from tests.kit.stations import ROOT, rows_of

NUMBERS = StreamConfig(fields=[FieldConfig(name="n", type="i64")])
STREAMS = {"numbers": NUMBERS}


def numbers(first: int, n: int = 1) -> Rows:
    """Rows `first` … whose value is their number."""
    values = np.arange(first, first + n, dtype=np.int64)
    return Rows(values * 1000, (values,))


def opened(folder: Path, **options: Any) -> Store:
    store = open_store(folder, **options)
    store.declare_streams(STREAMS)
    return store


def append(store: Store, rows: Rows) -> int:
    with store.transaction() as tx:
        return tx.append("numbers", rows, "synced")


def values(store: Store) -> list[int]:
    result: list[int] = rows_of(store, "numbers", NUMBERS).columns[0].tolist()
    return result


def raw_database(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / "outstation.db", isolation_level=None)


_WRITER = """\
import sys
from pathlib import Path
import numpy as np
from outstation.foundation import clock
from outstation.device.config import FieldConfig, StreamConfig
from outstation.device.recovery.open import open_store
from outstation.device.store.rows import Rows

store = open_store(Path(sys.argv[1]))
store.declare_streams({"numbers": StreamConfig(fields=[FieldConfig(name="n", type="i64")])})
while True:
    first = store.last_row("numbers") + 1
    values = np.arange(first, first + 1 + first % 7)
    with store.transaction() as tx:
        last = tx.append("numbers", Rows(values * 1000, (values,)), "synced")
    print(last, flush=True)
"""


def test_what_was_committed_is_there_after_kill_9(tmp_path: Path) -> None:
    rng, acknowledged = random.Random(5), 0
    for _ in range(8):
        command = [sys.executable, "-c", _WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            for _ in range(rng.randrange(2, 12)):
                acknowledged = int(process.stdout.readline())
            time.sleep(rng.random() * 0.01)
            process.kill()
            text = process.stdout.read().splitlines()
            acknowledged = max([acknowledged, *(int(line) for line in text if line)])
        store = opened(tmp_path)
        result = values(store)
        assert len(result) >= acknowledged
        assert result == list(range(1, len(result) + 1))
        assert store.last_row("numbers") == len(result)
        store.close()
    assert acknowledged > 20


_VISITED = """\
import sys
from pathlib import Path
from tests.device.store.test_store import append, numbers, opened

store = opened(Path(sys.argv[1]))
for first in (1, 101):
    print(append(store, numbers(first, 100)), flush=True)
    sys.stdin.readline()
"""


def test_a_visitor_who_may_write_takes_nothing_along_when_leaving(tmp_path: Path) -> None:
    visit = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM chunks').fetchone(); c.close()"
    )
    command = [sys.executable, "-c", _VISITED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "100\n"
        subprocess.run([sys.executable, "-c", visit, str(tmp_path / "outstation.db")], check=True)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "200\n"
        process.kill()
    store = opened(tmp_path)
    assert values(store) == list(range(1, 201))
    store.close()


def locked(path: Path) -> bool:
    """Return True if any process holds a lock on a file."""
    # The kernel leaves out a lock now and then while other processes take and drop theirs.
    return any(f":{path.stat().st_ino} " in Path("/proc/locks").read_text(encoding="ascii") for _ in range(50))


def test_the_locks_that_keep_other_programs_from_deleting_the_log_stay(tmp_path: Path) -> None:
    for _ in range(2):
        store = opened(tmp_path)
        for first in range(1, 2000, 100):
            assert locked(store.path)
            assert locked(store.path.with_name("outstation.db-shm"))
            append(store, numbers(store.last_row("numbers") + 1, 100))
            assert store.read_rows("numbers", NUMBERS.fields, first - 1, 10)
        store.used_bytes()
        store.limit_bytes()
        assert locked(store.path)
        assert locked(store.path.with_name("outstation.db-shm"))
        store.close()


def test_a_transaction_that_raises_leaves_nothing_behind(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(RuntimeError), store.transaction() as tx:  # noqa: PT012
        tx.append("numbers", numbers(1, 5), "synced")
        tx.set_source_position("client", "a", 5)
        tx.advance_cursor("task", 1, 5)
        tx.enqueue(OutboxMessage(1, "topic", b"{}", "jws", "now"), "digest")
        raise RuntimeError
    assert store.last_row("numbers") == 0
    assert store.source_position("client", "a") == 0
    assert store.cursor("task") is None
    assert store.outbox_size() == (0, 0)
    assert append(store, numbers(1, 3)) == 3
    store.close()


def test_a_second_process_is_refused_and_the_first_one_named(tmp_path: Path) -> None:
    store = opened(tmp_path)
    code = (
        "import sys; from pathlib import Path; from outstation.device.recovery.open import open_store; "
        "open_store(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert f"another outstation (process {os.getpid()}) uses this data folder; stop it first" in done.stderr
    with pytest.raises(StorageBusy):
        open_store(tmp_path)
    store.close()
    open_store(tmp_path).close()


def test_the_folder_is_free_again_after_the_owner_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(StorageBusy, match=f"process {process.pid}"):
            open_store(tmp_path)
        process.kill()
    opened(tmp_path).close()


def test_a_concurrent_reader_sees_each_commit_and_cannot_write(tmp_path: Path) -> None:
    store = opened(tmp_path)
    append(store, numbers(1, 3))
    reader = Store.open_read_only(tmp_path)
    assert values(reader) == [1, 2, 3]
    with store.transaction() as tx:
        tx.append("numbers", numbers(4, 2), "synced")
        assert reader.last_row("numbers") == 3
    assert values(reader) == [1, 2, 3, 4, 5]
    assert reader.log_id == store.log_id
    with pytest.raises(StorageError, match="READONLY"), reader.transaction() as tx:
        tx.set_source_position("client", "a", 1)
    reader.close()
    store.close()


def test_a_reader_without_a_store_gets_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=re.escape(str(tmp_path))):
        Store.open_read_only(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"check .* data_dir"):
        open_store(tmp_path / "file" / "data")


def test_the_pragmas_that_safety_hangs_on_are_in_force(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_size=1000 * PAGE_SIZE)
    read = {name: store._fetch_one(f"PRAGMA {name}") for name in ("journal_mode", "synchronous", "max_page_count")}
    assert read == {
        "journal_mode": ("wal",),
        "synchronous": (2,),
        "max_page_count": (store.quota.database_bytes // PAGE_SIZE,),
    }
    others = {name: store._fetch_one(f"PRAGMA {name}") for name in ("foreign_keys", "trusted_schema", "page_size")}
    assert others == {"foreign_keys": (1,), "trusted_schema": (0,), "page_size": (PAGE_SIZE,)}
    store.close()


def test_a_pragma_that_does_not_take_hold_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "pragmas", lambda *_: [("synchronous=OFF", "2")])
    with pytest.raises(StorageError, match="acknowledged rows would not be safe"):
        open_store(tmp_path)
    monkeypatch.undo()
    open_store(tmp_path).close()


def test_a_store_is_numbered_once_and_boots_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = []
    for boot_id in ("a", "a", "b", "", ""):
        monkeypatch.setattr("outstation.foundation.clock.boot_id", lambda boot_id=boot_id: boot_id)
        store = open_store(tmp_path)
        result.append((store.log_id, store.boot))
        store.close()
    assert [boot for _, boot in result] == [1, 1, 2, 3, 4]
    assert len({log for log, _ in result}) == 1


def test_opening_again_and_again_changes_nothing(tmp_path: Path) -> None:
    def schema_of() -> list[Any]:
        with raw_database(tmp_path) as db:
            result = db.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
        db.close()
        return result

    store = opened(tmp_path)
    append(store, numbers(1, 3))
    store.close()
    before = schema_of()
    for _ in range(3):
        store = opened(tmp_path)
        assert values(store) == [1, 2, 3]
        store.close()
    assert schema_of() == before
    assert "chunks" in [name for _, name, _ in before]


def test_a_file_that_is_no_database_is_set_aside_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "outstation.db").write_bytes(b"not a database, but of some length" * 100)
    store = opened(tmp_path)
    append(store, numbers(1, 3))
    store.close()
    assert (tmp_path / "quarantine/1/outstation.db").read_bytes() == b"not a database, but of some length" * 100
    store = opened(tmp_path)
    assert values(store) == [1, 2, 3]
    store.close()


# --- quota


def fill(store: Store) -> int:
    """Group commits until the store takes no more; how many rows it acknowledged."""
    group = GroupCommit(store, STREAMS)
    while True:
        first = store.last_row("numbers") + 1
        raw = RawColumns(500, None, {"n": list(range(first, first + 500))})
        group.add_rows("producer", "numbers", validate_columns(raw, NUMBERS, 0, None), list(range(500)), clock.read())
        outcome = group.commit(clock.read())["producer"]
        if outcome.is_store_full:
            assert outcome.accepted == 0
            assert len(outcome.rejected) == 500
            assert "not stored" in outcome.rejected[0][1]
            return first - 1
        assert outcome.accepted == 500


def test_a_full_store_rejects_rows_until_some_are_trimmed(tmp_path: Path) -> None:
    store = opened(tmp_path, max_size=200 * PAGE_SIZE)
    taken = fill(store)
    assert taken > 10_000
    assert fill(store) == taken
    assert values(store) == list(range(1, taken + 1))
    removed: list[TrimmedChunks] = []
    while not removed or removed[-1].last < taken // 2 - 500:
        with store.transaction() as tx:
            item = tx.trim_rows("numbers", taken // 2, 2**62, 1000)
        assert item is not None
        removed.append(item)
    assert sum(item.chunks for item in removed) > 5
    assert (removed[0].first, removed[-1].last + 1) == (1, store.first_row("numbers"))
    assert store.first_row("numbers") > taken // 3
    again = fill(store)
    assert again > taken
    batch = store.read_rows("numbers", NUMBERS.fields, store.first_row("numbers") - 1, 10**6)
    assert batch is not None
    assert batch.rows.columns[0].tolist() == list(range(store.first_row("numbers"), again + 1))
    store.close()


def test_reading_does_not_keep_another_thread_from_making_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    for first in range(1, 400, 10):
        append(store, numbers(first, 10))
    emptied: list[bool] = []

    def meanwhile(parts: list[Rows]) -> Rows:
        other = threading.Thread(target=lambda: emptied.append(store._quota_enforcer._restart_wal(store._db)))
        other.start()
        other.join()
        return concatenate(parts)

    monkeypatch.setattr("outstation.device.store.row_batch.concatenate", meanwhile)
    taken = store.read_rows("numbers", NUMBERS.fields, 0, 25)
    assert taken is not None
    assert len(taken.rows) == 25
    assert set(emptied) == {True}
    store.close()


def test_results_and_deletions_still_find_room_when_intake_is_full(tmp_path: Path) -> None:
    store = opened(tmp_path, max_size=200 * PAGE_SIZE)
    fill(store)
    with store.transaction(batch=True) as tx:
        tx.enqueue(OutboxMessage(1, "topic", b"x" * 5000, "jws", "now"), "digest")
        tx.advance_cursor("task", 1, 100)
        tx.trim_rows("numbers", 100, 2**62, 10)
    assert store.outbox_size() == (1, 1)
    store.close()


def test_a_group_commit_fits_into_one_transaction(tmp_path: Path) -> None:
    store = opened(tmp_path, max_size=256 * PAGE_SIZE)
    group, first = GroupCommit(store, STREAMS), 1
    while not group.is_full:
        raw = RawColumns(500, None, {"n": list(range(first, first + 500))})
        group.add_rows("producer", "numbers", validate_columns(raw, NUMBERS, 0, None), list(range(500)), clock.read())
        first += 500
    assert 1000 < first < 16_384
    assert group.commit(clock.read())["producer"].accepted == first - 1
    assert not group.is_full
    store.close()


def test_a_transaction_over_the_quota_is_refused_as_a_whole(tmp_path: Path) -> None:
    store = opened(tmp_path, max_size=256 * PAGE_SIZE)
    append(store, numbers(1, 10))
    with pytest.raises(StorageFull, match=r"\[buffer\] max_size"), store.transaction() as tx:  # noqa: PT012
        tx.set_source_position("client", "a", 7)
        tx.append("numbers", numbers(11, 100_000), "synced")
    assert store.source_position("client", "a") == 0
    assert values(store) == list(range(1, 11))
    assert append(store, numbers(11, 10)) == 20
    store.close()


_ON_A_SMALL_DISK = """\
import sys
from pathlib import Path
from outstation.foundation.errors import StorageFull
from tests.device.store.test_store import append, numbers, opened, values

folder = Path(sys.argv[1]) / "data"
ballast = Path(sys.argv[1]) / "ballast"
ballast.write_bytes(b"x" * 600_000)
store = opened(folder)
last = 0
try:
    while True:
        last = append(store, numbers(last + 1, 500))
except StorageFull as full:
    assert "disk is full" in str(full), full
assert values(store) == list(range(1, last + 1))
store.close()
ballast.unlink()
store = opened(folder)
assert values(store) == list(range(1, last + 1))
assert append(store, numbers(last + 1, 500)) == last + 500
store.close()
print(last)
"""


def test_a_full_disk_is_reported_and_the_store_recovers(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    script = 'mount -t tmpfs -o size=3m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["sh", "-c", script, "sh", str(tmp_path), sys.executable, _ON_A_SMALL_DISK]
    if unshare is None or subprocess.run([unshare, "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)]).returncode:
        pytest.skip("no small disk can be made here")
    done = subprocess.run([unshare, "-rm", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5000


# --- taking rows


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with open_store(tmp_path_factory.mktemp("shelf")) as store:
        yield store


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    after=st.integers(0, 40),
    limit=st.integers(1, 60),
    noise=st.lists(st.integers(0, 11), max_size=4),
)
def test_what_is_taken_is_what_was_appended_for_any_chunks_and_limits(
    shelf: Store, chunks: list[int], after: int, limit: int, noise: list[int]
) -> None:
    name = f"s{shelf.get_meta('count', '0')}"
    with shelf.transaction() as tx:
        tx.set_meta("count", str(int(name[1:]) + 1))
        for stream in (name, f"{name}.other"):
            tx.declare_stream(stream, "[]")
        last = 0
        for index, n in enumerate(chunks):
            last = tx.append(name, numbers(last + 1, n), "synced")
            if index in noise:
                tx.append(f"{name}.other", numbers(999, 3), "synced")
    assert last == sum(chunks)
    batch = shelf.read_rows(name, NUMBERS.fields, after, limit)
    expected = list(range(after + 1, min(last, after + limit) + 1))
    if not expected:
        assert batch is None
        return
    assert batch is not None
    assert (batch.first, batch.last) == (expected[0], expected[-1])
    assert batch.rows.columns[0].tolist() == expected
    assert batch.rows.t.tolist() == [1000 * n for n in expected]
    walked, at = [], 0
    while (part := shelf.read_rows(name, NUMBERS.fields, at, limit)) is not None:
        assert part.first == at + 1
        walked.append(part.rows)
        at = part.last
    assert pack_chunk(concatenate(walked)) == pack_chunk(numbers(1, last))


def test_taking_uses_the_index_and_costs_the_same_however_much_waits(tmp_path: Path) -> None:
    store = opened(tmp_path)
    plan = store._fetch_all(
        f"EXPLAIN QUERY PLAN {schema.SELECT_CHUNKS}".replace(":stream", "'numbers'").replace(":after", "100000")
    )
    text = " | ".join(str(row[3]) for row in plan)
    assert "SEARCH chunks USING INDEX chunk_rows (stream=? AND first_row>?)" in text
    assert "SCAN chunks" not in text
    assert "TEMP B-TREE" not in text
    steps = []
    for waiting in (20, 400):
        with store.transaction() as tx:
            while (last := tx.append("numbers", numbers(1, 10), "synced")) < waiting * 10:
                pass
        ticks: list[int] = []
        store._db.set_progress_handler(partial(ticks.append, 0), 1)
        for after in (5, last - 30):
            assert store.read_rows("numbers", NUMBERS.fields, after, 20) is not None
        store._db.set_progress_handler(None, 1)
        steps.append(len(ticks))
    assert steps[1] < steps[0] * 1.5
    store.close()


def test_nothing_is_taken_from_a_stream_that_has_nothing_or_is_not_there(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.read_rows("numbers", NUMBERS.fields, 0, 10) is None
    assert store.read_rows("nobody", NUMBERS.fields, 0, 10) is None
    assert (store.first_row("numbers"), store.last_row("nobody")) == (1, 0)
    store.close()


# --- damage


def damaged(folder: Path) -> Store:
    """Rows 1-30 in three chunks, one byte of the middle one flipped on the disk."""
    store = opened(folder)
    for first in (1, 11, 21):
        append(store, numbers(first, 10))
    store.close()
    db = raw_database(folder)
    data = bytearray(db.execute("SELECT data FROM chunks WHERE first_row = 11").fetchone()[0])
    data[50] ^= 1
    db.execute("UPDATE chunks SET data = ? WHERE first_row = 11", (bytes(data),))
    db.close()
    return opened(folder)


def test_a_damaged_chunk_is_reported_and_its_neighbours_are_read(tmp_path: Path) -> None:
    store = damaged(tmp_path)

    def take(after: int, limit: int = 100) -> RowBatch:
        batch = store.read_rows("numbers", NUMBERS.fields, after, limit)
        assert batch is not None
        return batch

    before, lost, rest = take(0), take(10), take(20)
    assert (before.first, before.last, before.loss_reason) == (1, 10, None)
    assert (lost.first, lost.last, lost.loss_reason, len(lost.rows)) == (11, 20, "CRC does not match", 0)
    assert (rest.first, rest.last, rest.loss_reason) == (21, 30, None)
    assert (take(14).first, take(14).last) == (15, 20)
    store.close()


@pytest.mark.parametrize(
    "damage", ["first_t = first_t + 1", "n = 9", "time_bytes = 8", "crc = 1", "data = x''", "data = data || x'00'"]
)
def test_any_other_damage_to_a_chunk_is_detected(tmp_path: Path, damage: str) -> None:
    store = opened(tmp_path)
    append(store, numbers(1, 10))
    store.close()
    db = raw_database(tmp_path)
    db.execute(f"UPDATE chunks SET {damage}")
    db.close()
    store = opened(tmp_path)
    batch = store.read_rows("numbers", NUMBERS.fields, 0, 100)
    assert batch is not None
    assert batch.loss_reason is not None
    store.close()


def test_a_blob_that_a_flipped_bit_turned_into_text_is_read(tmp_path: Path) -> None:
    store = opened(tmp_path)
    append(store, numbers(1, 10))
    with raw_database(tmp_path) as db:
        db.execute("UPDATE chunks SET data = CAST(data AS TEXT)")
    db.close()
    assert values(store) == list(range(1, 11))
    store.close()


@pytest.mark.parametrize("n", ["1000", "1", "-5", "'x'"])
def test_a_damaged_row_count_affects_no_other_chunk(tmp_path: Path, n: str) -> None:
    store = damaged(tmp_path)
    store.close()
    db = raw_database(tmp_path)
    db.execute(f"UPDATE chunks SET n = {n} WHERE first_row = 11")
    db.close()
    store = opened(tmp_path)
    lost: list[int] = []
    at = 0
    while (batch := store.read_rows("numbers", NUMBERS.fields, at, 100)) is not None:
        if batch.loss_reason:
            lost += range(batch.first, batch.last + 1)
        at = batch.last
    assert lost == list(range(11, 21))
    assert at == 30
    store.close()


def test_a_quarantined_chunk_is_lost_to_every_task_and_preserved(tmp_path: Path) -> None:
    store = damaged(tmp_path)
    with store.transaction() as tx:
        tx.quarantine_rows("numbers", 11, 20)
    for after, first, last, lost in [(0, 1, 10, False), (10, 11, 20, True), (14, 15, 20, True), (20, 21, 30, False)]:
        batch = store.read_rows("numbers", NUMBERS.fields, after, 100)
        assert batch is not None
        assert (batch.first, batch.last, batch.loss_reason is not None) == (first, last, lost)
    store.close()
    db = raw_database(tmp_path)
    assert db.execute("SELECT first_row, n, length(data) FROM quarantined_rows").fetchall() == [(11, 10, 120)]
    db.close()


# --- streams, categories, marks, outbox


def test_fields_of_a_stream_may_change_only_while_it_is_empty(tmp_path: Path) -> None:
    store = opened(tmp_path)
    other = StreamConfig(fields=[FieldConfig(name="n", type="f64")])
    store.declare_streams({"numbers": other})
    store.declare_streams({"numbers": NUMBERS})
    append(store, numbers(1, 1))
    with pytest.raises(UsageError, match=r"streams\.numbers\.fields: .* give the changed stream a new name"):
        store.declare_streams({"numbers": other})
    limits = StreamConfig(fields=[FieldConfig(name="n", type="i64", unit="m", min=0, max=10)])
    store.declare_streams({"numbers": limits})
    assert values(store) == [1]
    store.close()


def test_category_codes_stay_what_they_were(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with store.transaction() as tx:
        assert tx.assign_category_codes("s", "mode", ["on", "", "off", "on"], limit=1000, last_row=0)[0] == [1, 0, 2, 1]
    store.close()
    store = opened(tmp_path)
    with store.transaction() as tx:
        assert tx.assign_category_codes("s", "mode", ["new", "off"], limit=1000, last_row=0)[0] == [3, 2]
        assert tx.assign_category_codes("s", "other", ["off"], limit=1000, last_row=0)[0] == [1]
    assert store.categories("s", "mode") == ["", "on", "off", "new"]
    store.close()


def test_made_up_categories_share_one_code_until_codes_are_free_again(tmp_path: Path) -> None:
    store = opened(tmp_path)

    def assign(texts: list[str], last_row: int) -> tuple[list[int], int]:
        with store.transaction() as tx:
            codes, others = tx.assign_category_codes("numbers", "mode", texts, limit=4, last_row=last_row)
        return codes, len(others)

    append(store, numbers(1, 10))
    assert assign(["on", "off"], 10) == ([1, 2], 0)
    assert assign(["made-up-1", "made-up-2", "on", "made-up-3"], 10) == ([3, 4, 1, 4], 2)
    assert store.categories("numbers", "mode") == ["", "on", "off", "made-up-1", "(other)"]
    append(store, numbers(11, 5990))
    assert assign(["on", "new"], 6000) == ([1, 4], 1)
    with store.transaction() as tx:
        tx.trim_rows("numbers", 10, 2**62, 100)
    assert assign(["on", "new"], 6001) == ([1, 4], 1), "a code is given back only a few thousand rows later"
    with store.transaction() as tx:
        tx.trim_rows("numbers", 6000, 2**62, 100)
    assert assign(["on", "new", "newer", "newest"], 6001) == ([1, 2, 3, 4], 1)
    assert assign(["", "off"], 6001) == ([0, 4], 1), "codes of rows to come are not given back"
    assert store.categories("numbers", "mode") == ["", "on", "new", "newer", "(other)"]
    store.close()


def test_every_category_code_has_one_text_when_codes_are_given_back_and_the_others_begin(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with store.transaction() as tx:
        for texts, expected in ((["a", "b"], [1, 2]), (["x", "y", "b"], [1, 3, 2]), (["z"], [1]), (["p", "q"], [1, 2])):
            codes, _ = tx.assign_category_codes("numbers", "mode", texts, limit=3, last_row=-5000)
            assert codes == expected
    assert store.categories("numbers", "mode") == ["", "p", "q", "(other)"]
    store.close()


def test_categories_end_at_65535(tmp_path: Path) -> None:
    store = opened(tmp_path)
    many = [f"c{i}" for i in range(66_000)]
    with store.transaction() as tx:
        codes, others = tx.assign_category_codes("s", "many", [*many, "c0"], limit=65_535, last_row=1)
    assert (codes[0], codes[65_533], codes[65_534], codes[-2], codes[-1], len(others)) == (
        1,
        65_534,
        65_535,
        65_535,
        1,
        466,
    )
    store.close()


def test_the_outbox_is_numbered_without_a_gap_and_deleted_as_acknowledged(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with store.transaction() as tx:
        for _ in range(6):
            seq, digest = tx.log_head()
            assert digest == (f"digest {seq}" if seq else "")
            tx.enqueue(OutboxMessage(seq + 1, "topic", b"{}", "jws", "now"), f"digest {seq + 1}")
    with pytest.raises(RuntimeError), store.transaction() as tx:  # noqa: PT012
        tx.enqueue(OutboxMessage(tx.log_head()[0] + 1, "topic", b"{}", "jws", "now"), "digest 7")
        raise RuntimeError
    with store.transaction() as tx:
        assert tx.log_head() == (6, "digest 6")
        assert tx.outbox.set_acknowledged(AcknowledgedSeqs(5, ((2, 3),))) == []
    assert [message.seq for message in store.unacknowledged_messages(0, 10)] == [2, 3, 6]
    assert [message.seq for message in store.unacknowledged_messages(2, 1)] == [3]
    assert [message.seq for message in store.pending_messages([1, 3, 6])] == [3, 6]
    assert store.outbox_size() == (3, 6)
    store.close()


def test_the_newest_thousand_alerts_are_stored(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with store.transaction() as tx:
        for i in range(1003):
            tx.record_alert({"i": i})
    assert [alert["i"] for alert in store.recent_alerts(2)] == [1002, 1001]
    assert len(store.recent_alerts(5000)) == 1000
    store.close()


def test_threads_that_write_at_once_wait_for_each_other(tmp_path: Path) -> None:
    store = opened(tmp_path)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                with store.transaction() as tx:
                    tx.append("numbers", numbers(1, 3), "synced")
                store.last_row("numbers")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.last_row("numbers") == 6 * 20 * 3
    store.close()


def test_the_digest_of_the_newest_message_is_read_atomically(tmp_path: Path) -> None:
    store, author = filled(tmp_path)
    seq = append_message(store, author, "the newest")
    known = store.message_digest(seq)
    real, late = store.get_meta, threading.Thread(target=append_message, args=(store, author, "a later one"))

    def meta(key: str, default: str) -> str:
        result = real(key, default)
        if key == "seq":
            late.start()
            late.join(0.2)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "get_meta", meta)
        assert store.message_digest(seq) == known
    late.join()
    assert store.message_digest(seq) == known
    store.close()
