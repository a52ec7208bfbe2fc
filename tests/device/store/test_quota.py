"""Quota: it holds to the byte at any moment, and a full disk still allows recording and deleting."""

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

from outstation.device.store import retention
from outstation.device.store.quota import PAGE_SIZE, Budget, DiskReserve, Quota
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.rows import Rows
from outstation.foundation.errors import StorageFull
from outstation.protocol.wire.jws import encode
from tests.device.capacity.test_space import Device

ROOT = Path(__file__).parents[3]
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

    def step(self, operation: str, n: int) -> None:
        with contextlib.suppress(StorageFull):
            getattr(self, operation)(n)
        self.weigh()

    def weigh(self) -> None:
        path = self.device.store.path
        files = [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")]
        files += [path.with_name("reserve"), path.with_name("journal")]
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
        last = int(self.device.store.get_meta("seq", "0"))
        with self.device.store.transaction(vital=True) as tx:
            tx.outbox.set_acknowledged(AcknowledgedSeqs(last * n // 60))

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
            tx.save_state("exercise", f"s{n}", b"x" * n * 500)

    def trim(self, n: int) -> None:
        with self.device.store.transaction() as tx:
            tx.trim_rows("watch", 2**62, 2**62, n)

    def close(self) -> None:
        self.unpin(0)
        self.device.store.close()


@pytest.mark.parametrize("mib", [1, 4])
@settings(max_examples=12)
@given(steps=STEPS)
def test_database_log_index_and_reserve_never_exceed_the_quota(mib: int, steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Mix(Path(folder), mib << 20)) as mix:
        for operation, n in steps:
            mix.step(operation, n)


@pytest.mark.parametrize("mib", [1, 4])
def test_a_full_store_uses_its_quota_and_still_records_deliveries(tmp_path: Path, mib: int) -> None:
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
        assert store.used_bytes() > 0.9 * (store.limit_bytes() - store.quota.reserved_pages * PAGE_SIZE)
        mix.ack(60)
        mix.weigh()
        assert store.outbox_size()[0] == 0
        mix.turn(3)
        mix.weigh()
        assert store.used_bytes() < 0.75 * store.limit_bytes()
        mix.device.write("health", 10, size=3000)
    finally:
        mix.close()


@pytest.mark.parametrize("padding", [3300, 3600])
def test_a_store_without_a_free_page_records_an_acknowledgement(tmp_path: Path, padding: int) -> None:
    device = Device(tmp_path, size=4 << 20, when_full="refuse")
    # So much that the row with the acknowledgement begins a page.
    for number in range(padding // 900 + 1):
        with device.store.transaction() as tx:
            tx.set_meta(f"pad{number}", "p" * min(900, padding - 900 * number))
    for size, count in ((3000, 20), (300, 1), (10, 1)):
        with contextlib.suppress(StorageFull):
            while True:
                with device.store.transaction() as tx:
                    for _ in range(count):
                        device.author.append(tx, "health", None, {"x": "y" * size}, device.now())
    last = int(device.store.get_meta("seq", "0"))
    acknowledgement = encode({"pad": "x" * 300})
    with device.store.transaction(vital=True) as tx:
        tx.outbox.set_acknowledged(AcknowledgedSeqs(last))
        tx.set_meta(retention.ACKNOWLEDGEMENT, acknowledgement.decode())
        tx.set_meta(retention.ACKNOWLEDGED_HISTORY, "[[1000, 1]]")
    device.turns(60)
    device.write("health", 10, size=3000)
    device.store.close()


def test_an_endless_reader_blocks_writers_and_the_quota_holds(tmp_path: Path) -> None:
    with contextlib.closing(Mix(tmp_path, 1 << 20)) as mix:
        mix.device.write("health", 5)
        mix.pin(0)
        with pytest.raises(StorageFull, match="another program has been reading"):  # noqa: PT012
            while True:
                mix.device.write("health", 1)
                mix.weigh()
        mix.unpin(0)
        mix.device.write("health", 5)
        mix.weigh()


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
    quota = Quota.from_max_size(max_size)
    assert quota.database_bytes + quota.wal_bytes + quota.reserve_bytes + 32_768 <= max_size
    assert quota.database_bytes > max_size // 2
    assert quota.transaction_bytes > 100_000


@given(st.lists(st.integers(0, 5000), max_size=60), st.integers(0, 100_000))
def test_what_a_budget_affords_is_counted_and_leaves_half(costs: list[int], left: int) -> None:
    budget = Budget(left)
    count = budget.spend_affordable(costs)
    assert budget.remaining == left - sum(costs[:count])
    assert sum(costs[:count]) <= left // 2
    assert count == len(costs) or sum(costs[: count + 1]) > left // 2


def test_the_reserve_really_takes_up_room_and_gives_it_back(tmp_path: Path) -> None:
    reserve = DiskReserve(tmp_path / "reserve")
    assert reserve.size == 0
    assert reserve.allocate(1 << 20)
    assert reserve.size >= 1 << 20
    assert reserve.allocate(1 << 20)
    reserve.release()
    reserve.release()
    assert reserve.size == 0


# Begins each program that `on_a_small_disk` runs.
_HEAD = """\
import sys
from pathlib import Path

folder = Path(sys.argv[1])


def fill_disk():
    with open(folder / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(b"x" * 4096)
        except OSError:
            pass


"""

_ON_A_FULL_DISK = """\
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.foundation.errors import StorageFull
from outstation.protocol.wire.jws import encode
from tests.device.capacity.test_space import Device

device = Device(folder / "data", size=1 << 30)
device.write("health", 500)
device.feed(1000)
held = (folder / "data" / "reserve").stat().st_blocks
fill_disk()
try:
    for _ in range(1000):
        device.feed(5000)
    raise SystemExit("nothing was refused")
except StorageFull:
    pass
with device.store.transaction(vital=True) as tx:
    tx.outbox.set_acknowledged(AcknowledgedSeqs(400))
device.turns(60)
assert device.store.backlog().messages <= 102, device.store.backlog()
assert len(device.stored_seqs()) < 400, len(device.stored_seqs())
rows = device.store.last_row("watch")
(folder / "ballast").unlink()
device.feed(1000)
assert device.store.last_row("watch") == rows + 1000
assert (folder / "data" / "reserve").stat().st_blocks == held
print(held * 512)
device.store.close()
"""

_CROWDED_ON_A_FULL_DISK = """\
from tests.device.capacity.test_space import Device

device = Device(folder / "data", size=1 << 30)
device.feed(1000)
fill_disk()
device.stuck = device.crowded = {"exercise"}
device.turns(120)
assert device.space.is_evicting, "the disk was not full"
assert device.store.first_row("watch") == 1, "readings went, though that makes no room on the disk"
(folder / "ballast").unlink()
device.turns(120)
device.feed(1000)
print(device.store.first_row("watch"), device.store.last_row("watch"), device.space.is_evicting)
device.store.close()
"""

_STARTED_ON_A_FULL_DISK = """\
import numpy as np
from outstation.foundation import clock
from outstation.device.bootstrap.device import load_config, open_store
from outstation.device.bootstrap.daemon import build_daemon
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.rows import Rows
from outstation.foundation.errors import StorageFull
from outstation.protocol.wire import keys

keys.generate(folder / "device.key")
(folder / "outstation.toml").write_text('''
[device]
id = "pi-07"
fleet = "acme"
data_dir = "data"
[broker]
url = "mqtt://127.0.0.1:1"
[collector]
key = "%s"
[streams.numbers]
fields = [ { name = "n", type = "i64" } ]
''' % keys.generate(folder / "collector.key").public.text)
file, conf = load_config(str(folder / "outstation.toml"))


def start():
    store = open_store(conf)
    return store, build_daemon(file, conf, store)


def feed(store):
    with store.transaction() as tx:
        tx.append("numbers", Rows(np.arange(10), (np.arange(10),)), "synced")


store, daemon = start()
daemon.tick(clock.read())
for _ in range(30):
    feed(store)
    daemon._health_reporter.write_health()
store.close()
fill_disk()
for through in (10, 20):
    store, daemon = start()
    daemon.tick(clock.read())
    try:
        feed(store)
        raise SystemExit("nothing was refused")
    except StorageFull:
        pass
    with store.transaction(vital=True) as tx:
        tx.outbox.set_acknowledged(AcknowledgedSeqs(through))
    store.close()
(folder / "ballast").unlink()
store, daemon = start()
feed(store)
print(store.acknowledged().through, store.last_row("numbers"))
store.close()
"""


def on_a_small_disk(folder: Path, code: str) -> str:
    """Return the output of a program whose first argument is a disk of 16 MiB."""
    unshare = shutil.which("unshare")
    script = 'mount -t tmpfs -o size=16m none "$1" && exec "$2" -c "$3" "$1"'
    command: list[Any] = ["sh", "-c", script, "sh", str(folder), sys.executable, _HEAD + code]
    if unshare is None or subprocess.run([unshare, "-rm", "mount", "-t", "tmpfs", "none", str(folder)]).returncode:
        pytest.skip("no small disk can be made here")
    done = subprocess.run([unshare, "-rm", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_full_disk_still_records_deliveries_and_makes_room(tmp_path: Path) -> None:
    assert int(on_a_small_disk(tmp_path, _ON_A_FULL_DISK)) == 2 << 20


def test_no_reading_is_evicted_while_others_fill_the_disk(tmp_path: Path) -> None:
    assert on_a_small_disk(tmp_path, _CROWDED_ON_A_FULL_DISK) == "1 2000 False"


def test_a_device_starts_on_a_full_disk_and_records_what_is_acknowledged(tmp_path: Path) -> None:
    assert on_a_small_disk(tmp_path, _STARTED_ON_A_FULL_DISK) == "20 310"
