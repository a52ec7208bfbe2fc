"""Access of the event loop to the database: reads in threads with a store each, writes with one opened for each."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from outstation.fleet.database.interface import Connection, is_postgresql
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import StorageError

T = TypeVar("T")
# A slow drift plot must not hold the other pages.
_READERS = 2
# A decision that waits for the broker must not hold a sign-in.
_WRITERS = 2
_CLOSE_TIMEOUT_S = 10.0


class ReopenedStore:
    """A read-only store of one thread, opened again after every failure, and when another file took its place."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._store: FleetStore | None = None
        self._identity: tuple[int, int] | None = None

    def read(self, function: Callable[[FleetStore], T]) -> T:
        """Return `function` of the store. Raises StorageError and UsageError."""
        if self._store is not None and self._identity != self._identify():
            self.close()
        if self._store is None:
            self._identity = self._identify()
            self._store = FleetStore(self._location, read_only=True)
        try:
            return function(self._store)
        except StorageError:
            self.close()
            raise

    def close(self) -> None:
        """Close the store; the next `read` opens it again."""
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def _identify(self) -> tuple[int, int] | None:
        """Return device and inode of the database file; a restored one has others."""
        if is_postgresql(self._location):
            return None
        try:
            status = os.stat(Path(self._location))
        except OSError:
            return (0, 0)
        return status.st_dev, status.st_ino


class DatabaseReader:
    """Reads in threads with a `ReopenedStore` each."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._local = threading.local()
        self._readers = ThreadPoolExecutor(_READERS, "read")
        self._writer = ThreadPoolExecutor(_WRITERS, "write")

    async def read(self, function: Callable[[Connection], T]) -> T:
        """Return `function` of one snapshot. Raises StorageError and UsageError."""

        def in_snapshot(store: FleetStore) -> T:
            with store.snapshot() as db:
                return function(db)

        return await self.read_store(in_snapshot)

    async def read_store(self, function: Callable[[FleetStore], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, lambda: self._own_store().read(function))

    async def run_aside(self, function: Callable[[None], T]) -> T:
        """Run `function`, which reads files and not the database, in a reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, None)

    async def write(self, function: Callable[[Connection], T]) -> T:
        """Return `function` of one transaction. Raises StorageError and UsageError."""

        def in_transaction(store: FleetStore) -> T:
            with store.transaction() as db:
                return function(db)

        return await self.run_writer(in_transaction)

    async def run_writer(self, function: Callable[[FleetStore], T]) -> T:
        """Run `function` with a store that is open for writing only as long as this takes."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._write, function)

    def close(self) -> None:
        """Close the stores, each in the thread that opened it."""
        together = threading.Barrier(_READERS)
        for _ in range(_READERS):
            self._readers.submit(self._close_own, together)
        self._readers.shutdown(wait=True)
        self._writer.shutdown(wait=True)

    def _close_own(self, together: threading.Barrier) -> None:
        # A thread that waits here takes no second turn.
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(_CLOSE_TIMEOUT_S)
        self._own_store().close()

    def _own_store(self) -> ReopenedStore:
        if not hasattr(self._local, "store"):
            self._local.store = ReopenedStore(self.location)
        store: ReopenedStore = self._local.store
        return store

    def _write(self, function: Callable[[FleetStore], T]) -> T:
        with FleetStore(self.location) as store:
            return function(store)
