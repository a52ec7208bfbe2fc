"""Store faults: damaged, lost or outdated files. All rows that the medium did not lose must arrive or be declared."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from outstation.workbench.testing.patience import wait_until
from scripts.faults import fault
from scripts.faults.disk import flip_bit, overwrite, results
from scripts.faults.world import World

_DATABASE, _WAL, _JOURNAL = "outstation.db", "outstation.db-wal", "journal"
_PAGE = 4096
_HEADER_BYTES = 100
_NEW_RESULTS = 200
# The least part of a row that SQLite keeps on its own page is 489 bytes, other columns included.
_ON_ONE_PAGE = 320


@contextlib.contextmanager
def _off(world: World, rng: Random, *, broker: bool | None = None) -> Iterator[Path]:
    """Yield the data folder with the daemon killed; half of the time the broker was down, to fill the outbox."""
    time.sleep(rng.uniform(0.2, 0.8))
    away = rng.random() < 0.5 if broker is None else not broker
    if away:
        world.broker.kill()
        time.sleep(rng.uniform(0.3, 1.2))
    world.kill(world.device)
    yield world.device.data_dir
    if away:
        world.broker.start()
    world.keep(world.device)


def _settle(database: Path) -> sqlite3.Connection:
    """Checkpoint the database into its main file, and return the connection, which the caller closes."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return connection


def _flip_in_blob(database: Path, rng: Random, sql: str) -> bool:
    """Flip a bit of a blob that `sql` lists, in the file; return False if there is none."""
    with contextlib.closing(_settle(database)) as connection:
        blobs = [bytes(row[0]) for row in connection.execute(sql)]
    if not blobs:
        return False
    # This many bytes of a blob share a page; pages that SQLite has freed may hold them too.
    part = rng.choice(blobs)[:_ON_ONE_PAGE]
    content, bit, at = database.read_bytes(), rng.randrange(8 * len(part)), -1
    while (at := content.find(part, at + 1)) >= 0:
        flip_bit(database, 8 * at + bit)
    assert content.count(part), "the blob is not in the file"
    return True


@fault(damages=True)
def wal_truncated(world: World, rng: Random) -> None:
    with _off(world, rng) as data, (data / _WAL).open("r+b") as wal:
        wal.truncate(rng.randrange((data / _WAL).stat().st_size + 1))


@fault(damages=True)
def bit_flip_in_wal(world: World, rng: Random) -> None:
    with _off(world, rng) as data:
        flip_bit(data / _WAL, rng.randrange(8 * (data / _WAL).stat().st_size))


@fault(damages=True)
def wal_deleted(world: World, rng: Random) -> None:
    with _off(world, rng) as data:
        (data / _WAL).unlink()


@fault(damages=True)
def bit_flip_in_journal(world: World, rng: Random) -> None:
    with _off(world, rng) as data:
        flip_bit(data / _JOURNAL, rng.randrange(8 * (data / _JOURNAL).stat().st_size))


@fault(damages=True)
def journal_deleted(world: World, rng: Random) -> None:
    with _off(world, rng) as data:
        (data / _JOURNAL).unlink()


@fault(damages=True)
def bit_flip_in_chunk(world: World, rng: Random) -> None:
    with _off(world, rng, broker=True) as data:
        assert _flip_in_blob(data / _DATABASE, rng, "SELECT data FROM chunks ORDER BY id DESC LIMIT 1")


@fault(damages=True)
def bit_flip_in_outbox_row(world: World, rng: Random) -> None:
    with _off(world, rng, broker=False) as data:
        assert _flip_in_blob(data / _DATABASE, rng, "SELECT payload FROM outbox ORDER BY seq DESC LIMIT 5")


@fault(damages=True)
def bit_flip_in_header(world: World, rng: Random) -> None:
    with _off(world, rng) as data:
        _settle(data / _DATABASE).close()
        flip_bit(data / _DATABASE, rng.randrange(8 * _HEADER_BYTES))


@fault(damages=True)
def page_zeroed(world: World, rng: Random) -> None:
    with _off(world, rng) as data:
        _settle(data / _DATABASE).close()
        _zero_page(data / _DATABASE, rng)


@fault(damages=True)
def page_zeroed_at_work(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 0.8))
    _zero_page(world.device.data_dir / _DATABASE, rng)
    time.sleep(rng.uniform(0.2, 1.0))
    world.restart(world.device)


def _zero_page(database: Path, rng: Random) -> None:
    pages = max(1, database.stat().st_size // _PAGE)
    overwrite(database, rng.randrange(pages) * _PAGE, bytes(_PAGE))


@fault(damages=True)
def deleted_database(world: World, rng: Random) -> None:
    with _off(world, rng) as data:
        for path in data.glob(f"{_DATABASE}*"):
            path.unlink()


@fault(damages=True)
def old_database_restored(world: World, rng: Random) -> None:
    _put_back(world, rng, f"{_DATABASE}*")


@fault(damages=True)
def old_copy_restored(world: World, rng: Random) -> None:
    _put_back(world, rng, "*")


def _put_back(world: World, rng: Random, pattern: str) -> None:
    copy = world.folder / "copy"
    with _off(world, rng) as data:
        shutil.copytree(data, copy, ignore=lambda _, names: [name for name in names if name.endswith(".sock")])
    # A loss is only detectable if messages of the lost time were delivered before.
    before = results(world)
    wait_until("new rows are judged and delivered", lambda: results(world) > before + _NEW_RESULTS)
    time.sleep(rng.uniform(0.5, 2.5))
    with _off(world, rng) as data:
        for path in data.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in copy.glob(pattern):
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, data / path.name)
    shutil.rmtree(copy)
