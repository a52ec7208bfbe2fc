"""The journal of small commits under errors at random: of the card, of memory, and of writes that power cuts tear."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from outstation.device.recovery.findings import LAST_FINDING
from outstation.device.store import journal
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.foundation.errors import StorageError, StorageFull
from scripts.kit.stores import append, append_message, opened, pulled, served

_COUNTER, _SECTOR, _STEPS = "lines rejected", 512, 100
_Write = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, use_errno=True
)


class _Vfs(ctypes.Structure):
    """SQLite's sqlite3_vfs of version 3 (https://www.sqlite.org/c3ref/vfs.html)."""

    _fields_ = (
        ("numbers", ctypes.c_int * 3),
        ("pointers", ctypes.c_void_p * 3),
        ("methods", ctypes.c_void_p * 13),
        ("set_system_call", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)),
    )


class Work:
    """Commits of a store, small and large, with folds and reads between; their values count up."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.folder, self.random = folder, random
        self.store, self.author = opened(folder)
        self.acknowledged, self.uncertain = set[int](), set[int]()
        self.errors = self.next_value = 0

    def commit(self, n: int) -> None:
        values = np.arange(self.next_value, self.next_value + n, dtype=np.int64)
        self.next_value += n
        try:
            with self.store.transaction(small=True) as tx:
                tx.append("numbers", Rows(values * 1000, (values, np.zeros(n, np.uint16))), "synced")
                tx.increment_counter(_COUNTER, n)
        except StorageFull:
            self.errors += 1
        except (StorageError, MemoryError):
            self.errors += 1
            self.uncertain |= set(values.tolist())
        else:
            self.acknowledged |= set(values.tolist())

    def attempt(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except (StorageError, MemoryError):
            self.errors += 1

    def step(self) -> None:
        kind = self.random.random()
        if kind < 0.03:
            self.commit(1500)
        elif kind < 0.06:
            self.attempt(lambda: append_message(self.store, self.author, "between"))
        elif kind < 0.08:
            self.attempt(self.store.fold)
        elif kind < 0.2:
            self.attempt(lambda: served(self.store))
        else:
            self.commit(self.random.choice((1, 3, 40, 120)))

    def restart(self) -> None:
        self.store.close()
        self.store, self.author = opened(self.folder)

    def check(self, store: Store) -> None:
        """Check that a store has each acknowledged value once, counted, and no other but uncertain ones."""
        values = list(served(store).values())
        assert len(set(values)) == len(values)
        assert self.acknowledged <= set(values) <= self.acknowledged | self.uncertain
        assert store.counters().get(_COUNTER, 0) == len(values)

    def check_after_a_power_cut(self, to: Path) -> None:
        restarted, _ = opened(pulled(self.folder, to))
        with restarted:
            self.check(restarted)
            assert restarted.get_meta(LAST_FINDING, "") == ""


@pytest.fixture
def work(tmp_path: Path, seed: int) -> Iterator[Work]:
    work = Work(tmp_path / "data", Random(seed))
    yield work
    work.store.close()


@pytest.fixture
def sqlite() -> ctypes.CDLL:
    """SQLite's library, which this process uses."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    if (path := re.search(r"/\S*libsqlite3\.so\S*", maps)) is None:
        pytest.skip("SQLite is a part of the interpreter")
    return ctypes.CDLL(path[0])


@pytest.mark.parametrize("seed", [1])
def test_when_memory_is_refused_at_random_each_acknowledged_row_is_there_once(
    work: Work, tmp_path: Path, sqlite: ctypes.CDLL
) -> None:
    sqlite.sqlite3_memory_used.restype = ctypes.c_int64
    sqlite.sqlite3_hard_heap_limit64.argtypes = [ctypes.c_int64]
    sqlite.sqlite3_soft_heap_limit64.argtypes = [ctypes.c_int64]
    for number in range(_STEPS):
        if number == 0 or work.random.random() < 0.3:
            room = work.random.choice((0, 200, 1000, 3000, 8000, 20_000))
            sqlite.sqlite3_hard_heap_limit64(sqlite.sqlite3_memory_used() + room * bool(number))
        try:
            work.commit(1500) if number == 0 else work.step()
        finally:
            # A hard limit lowers the soft one, too.
            sqlite.sqlite3_hard_heap_limit64(0)
            sqlite.sqlite3_soft_heap_limit64(0)
        assert work.errors
        work.check(work.store)
        if number % 20 == 0:
            work.check_after_a_power_cut(tmp_path / "copy")
    work.restart()
    work.check(work.store)


@pytest.mark.parametrize("seed", [2, 3])
def test_when_the_card_fails_at_random_each_acknowledged_row_is_there_once(
    work: Work, tmp_path: Path, sqlite: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = {"journal": False, "log": False}
    flush, write = os.fdatasync, os.pwrite

    def flush_journal(file: int) -> None:
        if fails["journal"] and work.random.random() < 0.5:
            raise OSError(errno.EIO, "the card fails")
        flush(file)

    def write_journal(file: int, data: Any, offset: int) -> int:
        if fails["journal"] and work.random.random() < 0.4:
            return write(file, data[:_SECTOR], offset)
        return write(file, data, offset)

    def write_log(file: int, data: int, size: int, offset: int) -> int:
        # As after a failed flush: all of it is there, a part, or nothing.
        is_failing = fails["log"] and os.readlink(f"/proc/self/fd/{file}").endswith("-wal")
        written = write(
            file, ctypes.string_at(data, size * work.random.randrange(3) // 2 if is_failing else size), offset
        )
        if is_failing:
            ctypes.set_errno(errno.EIO)
            return -1
        return written

    sqlite.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    vfs = sqlite.sqlite3_vfs_find(None)
    monkeypatch.setattr(os, "fdatasync", flush_journal)
    monkeypatch.setattr(os, "pwrite", write_journal)
    called = _Write(write_log)
    assert vfs.contents.set_system_call(vfs, b"pwrite64", ctypes.cast(called, ctypes.c_void_p)) == 0
    try:
        is_log_failing = True
        for number in range(_STEPS):
            fails.update(journal=work.random.random() < 0.1, log=is_log_failing)
            work.commit(1500) if number == 0 else work.step()
            assert work.errors
            fails.update(journal=False, log=False)
            work.check(work.store)
            if number % 20 == 10:
                work.check_after_a_power_cut(tmp_path / "copy")
            if number % 16 == 15:
                work.restart()
            if work.random.random() < 0.3:
                is_log_failing = work.random.random() < 0.5
    finally:
        vfs.contents.set_system_call(vfs, b"pwrite64", None)


def test_a_write_of_the_journal_that_the_power_cut_tears_costs_nothing(tmp_path: Path) -> None:
    random, folder = Random(1), tmp_path / "data"
    store, _ = opened(folder)
    append(store, "numbers", 10)
    for _ in range(30):
        rows, before = store.last_row("numbers"), (folder / journal.FILE_NAME).read_bytes()
        copy = pulled(folder, tmp_path / "copy")
        append(store, "numbers", random.choice((1, 20, 150, 300)), small=True)
        after = (folder / journal.FILE_NAME).read_bytes()
        sectors = [random.choice((before, after))[at : at + _SECTOR] for at in range(0, journal.SIZE, _SECTOR)]
        (copy / journal.FILE_NAME).write_bytes(b"".join(sectors))
        restarted, _ = opened(copy)
        with restarted:
            assert len(served(restarted)) in (rows, store.last_row("numbers"))
            assert restarted.get_meta(LAST_FINDING, "") == ""
        action = random.random()
        if action < 0.4:
            store.fold()
        elif action < 0.45:
            store.close()
            store, _ = opened(folder)
    store.close()
