"""SQLite's errors as errors of storage, for the store's database and for connections that only read it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from outstation.device.store.tables import row_crc
from outstation.foundation import input_files
from outstation.foundation.errors import StorageBusy, StorageDamaged, StorageError, StorageFull

SALVAGED_LATER = "the agent sets it aside and salvages it when it starts next"


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Connect to a database beside the process that writes. Raises StorageError."""
    require_regular(path)
    with translate_errors(path):
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=5.0)


def require_regular(path: Path) -> None:
    """Raise StorageError if something else than a file has the database's name: SQLite would wait for a pipe."""
    try:
        input_files.require_regular(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}; move it away, and restore the data folder") from error


@contextlib.contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as StorageError, StorageFull, StorageBusy or StorageDamaged."""
    try:
        yield
    except sqlite3.Error as error:
        raise _storage_error(path, error) from error
    except UnicodeDecodeError as error:
        # SQLite's message quotes bytes of the damaged database.
        raise StorageDamaged(f"{path}: a text in it is not what was written; {SALVAGED_LATER}") from error


_CORRUPTION_WORDS = ("Could not decode to UTF-8", "unsupported file format", row_crc.FUNCTION_FAILED)


def is_corruption(error: sqlite3.Error) -> bool:
    name = str(getattr(error, "sqlite_errorname", ""))
    # A header with an unknown schema format or text encoding has no error code of its own.
    unreadable = any(words in str(error) for words in _CORRUPTION_WORDS)
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or unreadable


def _storage_error(path: Path, error: sqlite3.Error) -> StorageError:
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if name.startswith("SQLITE_FULL"):
        return StorageFull(f"{path}: the quota ([buffer] max_size) or the disk is full")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StorageBusy(f"{path}: locked by another process")
    if is_corruption(error):
        problem = "a row is not what was written" if row_crc.FUNCTION_FAILED in str(error) else str(error)
        return StorageDamaged(f"{path}: {problem}; {SALVAGED_LATER}")
    return StorageError(f"{path}: {name}: {error}")
