"""View of the journal for a process that only reads: its queries include the commits that the database lacks.

The journal changes the small tables in place, so the view has copies of them, which it makes anew when the journal or
the database has changed. Chunks are only added: the view joins those of the journal to those of the database.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from agent.device.store import journal, schema
from agent.errors import StorageError

_COPIED = ("streams", "categories", "source_positions", "counters", "clock_segments")
_COLUMNS = ", ".join(name for name in schema.columns(schema.STEPS)["chunks"])
# A chunk may have come into the database since the journal was read.
_CHUNKS = f"""
    CREATE TEMP VIEW chunks AS SELECT {_COLUMNS} FROM main.chunks
    UNION ALL SELECT {_COLUMNS} FROM temp.journal_chunks AS added
    WHERE NOT EXISTS (
        SELECT 1 FROM main.chunks AS old WHERE old.stream = added.stream AND old.first_row = added.first_row)
"""
_INSERT = f"""
    CREATE TEMP TRIGGER add_chunk INSTEAD OF INSERT ON chunks
    BEGIN
        INSERT INTO journal_chunks ({_COLUMNS}) VALUES ({", ".join(f"new.{name}" for name in _COLUMNS.split(", "))});
    END
"""


class JournalView:
    def __init__(self, folder: Path, db: sqlite3.Connection) -> None:
        self._folder, self._db = folder, db
        self._seen: tuple[bytes, int] | None = None
        self._is_installed = False

    def refresh(self) -> None:
        """Bring the view up to date. Raises StorageError, sqlite3.Error."""
        try:
            content = journal.read_file(self._folder)
        except OSError as error:
            raise StorageError(f"{self._folder / journal.FILE_NAME}: {error.strerror}") from error
        # Read in this order: a commit that leaves the journal meanwhile is in the database.
        seen = content, int(self._db.execute("PRAGMA data_version").fetchone()[0])
        if seen == self._seen:
            return
        self._db.execute("BEGIN")
        try:
            records = journal.pending(self._db, content)
            if records or self._is_installed:
                self._copy_tables()
                for body in records.values():
                    journal.apply(self._db, journal.decode(body))
        except ValueError:
            # A record with a right CRC that is none: the next opening reports it.
            pass
        finally:
            self._db.execute("COMMIT")
        self._seen = seen

    def _copy_tables(self) -> None:
        if not self._is_installed:
            sql = "SELECT sql FROM main.sqlite_master WHERE name = ?"
            for table in (*_COPIED, "chunks"):
                definition = self._db.execute(sql, (table,)).fetchone()[0]
                name = "journal_chunks" if table == "chunks" else table
                self._db.execute(definition.replace(f"TABLE {table}", f"TEMP TABLE {name}", 1))
            for table in _COPIED:
                self._db.execute(f"DROP VIEW checked_{table}")
                self._db.execute(f"CREATE TEMP VIEW checked_{table} AS SELECT * FROM temp.{table}")
            self._db.execute(_CHUNKS)
            self._db.execute(_INSERT)
            self._is_installed = True
        self._db.execute("DELETE FROM temp.journal_chunks")
        for table in _COPIED:
            self._db.execute(f"DELETE FROM temp.{table}")
            self._db.execute(f"INSERT INTO temp.{table} SELECT * FROM main.{table}")
