"""Small commits: transactions that are durable in the journal, and that the database gets many at a time.

They stay in one open transaction of the connection, so every read of this process includes them. That transaction is
committed (folded) with the next one that the journal cannot hold, when the journal is full, and at the end. After some
errors SQLite rolls it back as a whole: then it is run again from the journal's records.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3

from outstation.device.store import journal
from outstation.device.store.journal import Journal, JournaledConnection
from outstation.device.store.quota import Budget, QuotaEnforcer
from outstation.foundation.errors import StorageError

log = logging.getLogger("outstation")


class SmallCommits:
    """Begin, commit and rollback of a store's transactions; without a journal, each is committed to the database."""

    def __init__(self, db: sqlite3.Connection, enforcer: QuotaEnforcer, file: Journal | None) -> None:
        self._db, self._enforcer, self._journal = db, enforcer, file
        # After a failed write, until the database includes the number of the record.
        self._is_uncertain = False
        # The write-ahead log may hold it, and a crash would bring it back over a later record of the journal.
        self._has_commit_failed = False
        # False while the open transaction may hold a part of what it should, or more.
        self._is_restored = True
        # Budget of the open transaction while small commits are in it.
        self._open: Budget | None = None
        self._budget = Budget(0)
        self._changes = 0

    def begin(self, *, vital: bool, small: bool) -> Budget:
        """Begin a transaction. Raises StorageFull, StorageError, sqlite3.Error."""
        self.require_complete()
        if self._open is not None:
            # First, because a fold needs room, too.
            self._enforcer.check_disk_space(vital=vital)
            needed = self._enforcer.quota.transaction_bytes // (2 if small else 1)
            if self._open.remaining < needed:
                self.fold()
        if self._open is None:
            self._budget = self._enforcer.prepare_transaction(self._db, vital=vital, small=small)
        else:
            self._budget = self._open
        self._is_restored = False
        self._db.execute("BEGIN IMMEDIATE" if self._open is None else "SAVEPOINT part")
        self._is_restored = True
        self._changes = self._db.total_changes
        if small and self._journal is not None and isinstance(self._db, JournaledConnection):
            self._db.recorded = []
        return self._budget

    def commit(self) -> None:
        """Make the transaction durable. Raises StorageError, sqlite3.Error."""
        recorded = self._stop_recording()
        if self._is_uncertain or self._has_commit_failed:
            recorded = None
        body = journal.encode(recorded) if recorded else None
        if body is not None and self._journal is not None and not self._journal.has_place(body):
            body = None
        if self._journal is not None and (body is not None or self._is_uncertain):
            self._journal.write_progress(self._db, self._journal.number + (body is not None))
        if self._open is not None:
            self._db.execute("RELEASE part")
            if self._db.total_changes == self._changes:
                return
        if body is None:
            self._commit_all()
        else:
            self._append(body)

    def roll_back(self) -> None:
        """Undo the transaction, but not the small commits before it.

        Raises StorageError, sqlite3.Error, MemoryError: `require_complete` then does it.
        """
        self._is_restored = False
        self._stop_recording()
        if self._open is not None:
            # An error: SQLite rolled back everything, or the part has ended, or memory is short.
            with contextlib.suppress(sqlite3.Error, MemoryError):
                self._db.execute("ROLLBACK TO part")
                self._db.execute("RELEASE part")
                self._is_restored = True
        self.require_complete()

    def require_complete(self) -> None:
        """Run the small commits again if SQLite has rolled them back: an error in a mere read does that, too.

        Raises StorageError, sqlite3.Error, MemoryError.
        """
        if not self._is_restored or (self._open is not None and not self._db.in_transaction):
            self._restore()

    def fold(self) -> None:
        """Commit the small commits to the database. Raises StorageError, sqlite3.Error."""
        self.require_complete()
        if self._open is None:
            return
        try:
            self._commit_all()
        except (sqlite3.Error, MemoryError):
            self._restore()
            raise

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _append(self, body: bytes) -> None:
        """Write to the journal or, if that fails, to the database. Raises StorageError."""
        assert self._journal is not None
        # If this is interrupted, the record may be on the disk: no other may follow before the database has its number.
        self._is_uncertain = True
        try:
            self._journal.append(body)
            self._open = self._budget
            self._is_uncertain = False
            return
        except OSError as error:
            log.error("file %s in the data folder: %s; each commit goes to the database", journal.FILE_NAME, error)
        try:
            self._commit_all()
        except sqlite3.Error as error:
            raise StorageError(f"neither the journal nor the database could be written: {error}") from error

    def _commit_all(self) -> None:
        self._has_commit_failed = True
        self._db.execute("COMMIT")
        self._has_commit_failed, self._open = False, None
        if self._is_uncertain:
            self._is_uncertain = False
            self.close()
        elif self._journal is not None:
            self._journal.clear()

    def _restore(self) -> None:
        """Run the small commits again, if there are any, in a new open transaction."""
        self._is_restored = False
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        if self._open is not None:
            assert self._journal is not None
            try:
                self._db.execute("BEGIN IMMEDIATE")
                # A COMMIT that was interrupted may have included them.
                included = journal.included_through(self._db)
                for number, body in self._journal.records.items():
                    if number > included:
                        journal.apply(self._db, journal.decode(body))
                self._journal.write_progress(self._db, self._journal.number)
            except (sqlite3.Error, ValueError) as error:
                problem = "small commits wait in the journal, and the database takes none"
                raise StorageError(f"{problem}: {error}") from error
        self._is_restored = True

    def _stop_recording(self) -> list[tuple[int, object]] | None:
        if not isinstance(self._db, JournaledConnection):
            return None
        recorded, self._db.recorded = self._db.recorded, None
        return recorded
