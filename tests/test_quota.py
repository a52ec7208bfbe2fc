"""The quota holds to the byte at any moment, and on a full disk there is still room to record and to delete."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.device.storage.quota import Budget, Quota, Reserve
from agent.device.storage.retention import Acknowledged
from agent.device.storage.rows import Rows
from agent.errors import StorageFull
from tests.test_space import Device

ROOT = Path(__file__).parents[1]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["feed", "health", "results", "large", "many", "ack", "turn", "pin", "unpin", "state", "trim"]),
        st.integers(1, 60),
    ),
    min_size=10,
    max_size=60,
)


class Mix:
    """A device that is treated badly; after each step its files are weighed."""

    def __init__(self, folder: Path, size: int) -> None:
        self.device = Device(folder, size=size, stuck={"exercise"})
        self.pinned: sqlite3.Connection | None = None
        self.most = 0

    def step(self, what: str, n: int) -> None:
        with contextlib.suppress(StorageFull):
            getattr(self, what)(n)
        self.weigh()

    def weigh(self) -> None:
        path = self.device.store.path
        files = [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")] + [path.with_name("reserve")]
        total = sum(file.stat().st_size for file in files if file.exists())
        assert total <= self.device.size, {file.name: file.stat().st_size for file in files if file.exists()}
        self.most = max(self.most, total)

    def feed(self, n: int) -> None:
        self.device.feed(n * 40, chunk=n * 10)

    def health(self, n: int) -> None:
        self.device.write("health", n, size=n * 20)

    def results(self, n: int) -> None:
        self.device.write("results", n, size=5000)

    def large(self, n: int) -> None:
        self.device.write("health", 1, size=n * 2000)

    def many(self, n: int) -> None:
        self.device.write("alerts", n, size=n)

    def ack(self, n: int) -> None:
        last = int(self.device.store.meta("seq", "0"))
        with self.device.store.transaction(vital=True) as tx:
            tx.outbox.set_acknowledged(Acknowledged(last * n // 60))

    def turn(self, n: int) -> None:
        self.device.turns(10.0 * n)

    def pin(self, n: int) -> None:
        """Somebody looks into the store, and does not stop looking."""
        if self.pinned is None:
            self.pinned = sqlite3.connect(f"file:{self.device.store.path}?mode=ro", uri=True, isolation_level=None)
            self.pinned.execute("BEGIN")
            self.pinned.execute("SELECT count(*) FROM meta").fetchone()

    def unpin(self, n: int) -> None:
        if self.pinned is not None:
            self.pinned.close()
            self.pinned = None

    def state(self, n: int) -> None:
        with self.device.store.transaction() as tx:
            tx.keep("exercise", f"s{n}", b"x" * n * 500)

    def trim(self, n: int) -> None:
        with self.device.store.transaction() as tx:
            tx.trim("watch", 2**62, 2**62, n)

    def close(self) -> None:
        self.unpin(0)
        self.device.store.close()


@pytest.mark.parametrize("mib", [1, 4])
@settings(max_examples=12)
@given(steps=STEPS)
def test_database_log_index_and_reserve_never_exceed_the_quota(mib: int, steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mix = Mix(Path(folder), mib << 20)
        try:
            for what, n in steps:
                mix.step(what, n)
        finally:
            mix.close()


@pytest.mark.parametrize("mib", [1, 4])
def test_a_store_filled_to_the_brim_uses_its_quota_and_still_records_deliveries(tmp_path: Path, mib: int) -> None:
    mix = Mix(tmp_path, mib << 20)
    store = mix.device.store
    try:
        full = 0
        while full < 3:
            try:
                mix.device.write("health", 10, size=3000)
            except StorageFull:
                full += 1
            mix.weigh()
        assert store.used_bytes() > 0.9 * store.limit_bytes()
        mix.ack(60)
        mix.weigh()
        assert store.outbox_size()[0] == 0
        mix.turn(3)
        mix.weigh()
        assert store.used_bytes() < 0.75 * store.limit_bytes()
        mix.device.write("health", 10, size=3000)
    finally:
        mix.close()


def test_a_reader_that_never_ends_has_writers_refused_and_the_quota_kept(tmp_path: Path) -> None:
    mix = Mix(tmp_path, 1 << 20)
    try:
        mix.device.write("health", 5)
        mix.pin(0)
        with pytest.raises(StorageFull, match="somebody reads"):  # noqa: PT012
            while True:
                mix.device.write("health", 1)
                mix.weigh()
        mix.unpin(0)
        mix.device.write("health", 5)
        mix.weigh()
    finally:
        mix.close()


def test_a_transaction_that_is_too_large_is_refused_before_it_is_written(tmp_path: Path) -> None:
    mix = Mix(tmp_path, 4 << 20)
    n = 200_000
    columns = tuple(np.random.default_rng(0).normal(size=n).astype("<f4") for _ in range(2))
    try:
        with pytest.raises(StorageFull, match="too much for one transaction"), mix.device.store.transaction() as tx:
            tx.append("watch", Rows(np.arange(n), columns), "synced")
        mix.weigh()
        assert mix.device.store.last_row("watch") == 0
    finally:
        mix.close()


@given(st.integers(1 << 20, 1 << 40))
def test_the_parts_of_a_quota_come_to_no_more_than_it(max_size: int) -> None:
    quota = Quota.of(max_size)
    assert quota.pages + quota.wal + quota.reserve + 32_768 <= max_size
    assert quota.pages > max_size // 2
    assert quota.transaction > 100_000


@given(st.lists(st.integers(0, 5000), max_size=60), st.integers(0, 100_000))
def test_what_a_budget_affords_is_counted_and_leaves_half(costs: list[int], left: int) -> None:
    budget = Budget(left)
    count = budget.affords(costs)
    assert budget.left == left - sum(costs[:count])
    assert sum(costs[:count]) <= left // 2
    assert count == len(costs) or sum(costs[: count + 1]) > left // 2


def test_the_reserve_really_takes_up_room_and_gives_it_back(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve")
    assert reserve.size == 0
    assert reserve.take(1 << 20)
    assert reserve.size >= 1 << 20
    assert reserve.take(1 << 20)
    reserve.release()
    reserve.release()
    assert reserve.size == 0


_ON_A_FULL_DISK = """\
import sys
from pathlib import Path
from agent.device.storage.retention import Acknowledged
from agent.errors import StorageFull
from tests.test_space import Device

folder = Path(sys.argv[1])
device = Device(folder / "data", size=1 << 30)
device.write("health", 500)
device.feed(1000)
held = (folder / "data" / "reserve").stat().st_blocks
with open(folder / "ballast", "wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(b"x" * 65536)
    except OSError:
        pass
try:
    for _ in range(1000):
        device.feed(5000)
    raise SystemExit("nothing was refused")
except StorageFull:
    pass
with device.store.transaction(vital=True) as tx:
    tx.outbox.set_acknowledged(Acknowledged(400))
device.turns(60)
assert device.store.waiting().messages <= 102, device.store.waiting()
assert len(device.kept()) < 400, len(device.kept())
rows = device.store.last_row("watch")
(folder / "ballast").unlink()
device.feed(1000)
assert device.store.last_row("watch") == rows + 1000
assert (folder / "data" / "reserve").stat().st_blocks == held
print(held * 512)
device.store.close()
"""


def test_on_a_disk_that_others_filled_deliveries_are_recorded_and_room_is_made(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    script = 'mount -t tmpfs -o size=16m none "$1" && exec "$2" -c "$3" "$1"'
    command: list[Any] = ["sh", "-c", script, "sh", str(tmp_path), sys.executable, _ON_A_FULL_DISK]
    if unshare is None or subprocess.run([unshare, "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)]).returncode:
        pytest.skip("no small disk can be made here")
    done = subprocess.run([unshare, "-rm", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 << 20
