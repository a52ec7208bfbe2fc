"""Open files of the store: whether their paths still lead to what the writing process has open.

A folder can be moved or mounted over, and a file deleted or replaced, while the daemon writes on through its
descriptors. The next start would not find what it wrote there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec

from outstation.device.store import journal, watermark
from outstation.device.store.store import DATABASE
from outstation.device.store.tables import meta
from outstation.device.store.watermark import FILE_NAME
from outstation.foundation import decoders, durable_files
from outstation.foundation.errors import StorageError, StorageMoved

log = logging.getLogger("outstation")

LOCK = "lock"
_MAX_NOTE = 4096
_WAL, _SHM = f"{DATABASE}-wal", f"{DATABASE}-shm"


class OpenFiles:
    """Device and inode of the data folder, and of the files in it that stay open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder_id = _identify(folder)
        names = (DATABASE, _WAL, _SHM, LOCK, FILE_NAME, journal.FILE_NAME)
        self._file_ids = {str(folder / name): _identify(folder / name) for name in names}

    def require_in_place(self, db: sqlite3.Connection, fold: Callable[[], None]) -> None:
        """Raise StorageMoved if the folder is another one, StorageError if a file is; called before each transaction.

        Before that, what is only in a deleted file is written to where the next start finds it; `fold` commits the
        small commits to the database.
        """
        if _identify(self._folder) != self._folder_id:
            raise StorageMoved(
                f"{self._folder}: no longer the data folder that was opened: {self._describe_move()}. The daemon "
                f"stops; {self._write_note(db)}"
            )
        for path, opened in self._file_ids.items():
            present = _identify(path)
            if present == opened:
                continue
            state = "deleted" if present is None else "replaced"
            saved = self._save(db, fold, Path(path).name, is_deleted=present is None)
            raise StorageError(
                f"{path}: {state} while the daemon had it open; {saved}. The daemon stops, and the next start opens "
                "what is there"
            )

    def is_folder_in_place(self) -> bool:
        with contextlib.suppress(StorageError):
            return _identify(self._folder) == self._folder_id
        return False

    def _write_note(self, db: sqlite3.Connection) -> str:
        """Leave a note for the next start, and describe what to do."""
        try:
            note = _note_path(self._folder)
            if _identify(note) is None:
                durable_files.write(note, msgspec.json.encode(_Note(meta.get(db, "log", ""))), 0o600)
        except (StorageError, sqlite3.Error) as error:
            return (
                f"put the former folder back before the next start, which would begin an empty store here: the note "
                f"that prevents it could not be written ({error})"
            )
        return f"put the former folder back, or delete {note} to begin an empty store here"

    def _describe_move(self) -> str:
        """Say what became of the former folder, as far as the kernel tells of the open database."""
        with contextlib.suppress(OSError, StorageError):
            for descriptor in Path("/proc/self/fd").iterdir():
                if _identify(descriptor) == self._file_ids[str(self._folder / DATABASE)]:
                    database = os.readlink(descriptor)
                    if database.endswith(" (deleted)"):
                        return "it was deleted with all acknowledged data"
                    if (place := Path(database).parent) != self._folder.absolute():
                        return f"it was moved to {place}, with all acknowledged data"
        return "it was replaced or mounted over; all acknowledged data is in the former one"

    def _save(self, db: sqlite3.Connection, fold: Callable[[], None], name: str, *, is_deleted: bool) -> str:
        """Save what a deleted or replaced file alone holds, and describe the outcome."""
        if name in (LOCK, FILE_NAME):
            return "another process could open the store" if name == LOCK else "lost commits would not be noticed"
        if name != DATABASE:
            try:
                fold()
                if name == journal.FILE_NAME:
                    journal.end_progress(db)
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except (sqlite3.Error, StorageError) as error:
                return f"commits in it could not be saved: {error}"
            return "all commits in it were saved in the database"
        if not is_deleted:
            self._delete_former_log()
            return "commits since that copy are not in it"
        try:
            fold()
            self._restore_database(db)
        except (sqlite3.Error, StorageError, OSError) as error:
            return f"it could not be restored: {error}"
        return "it was restored with all its contents"

    def _restore_database(self, db: sqlite3.Connection) -> None:
        """Write the deleted database anew under its path. A kill before the rename leaves it deleted."""
        copy = self._folder / f"{DATABASE}.restored"
        copy.unlink(missing_ok=True)
        os.close(os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        db.execute("VACUUM INTO ?", (str(copy),))
        durable_files.fsync(copy)
        self._delete_former_log()
        copy.rename(self._folder / DATABASE)
        durable_files.fsync(self._folder)

    def _delete_former_log(self) -> None:
        """Delete the log of the database that is gone: it would be replayed into the one that has taken its place."""
        for name in (_WAL, _SHM):
            path = self._folder / name
            if _identify(path) == self._file_ids[str(path)]:
                path.unlink()


class _Note(msgspec.Struct, frozen=True):
    """Note that a data folder was moved away while the daemon ran: `log` of the store in it."""

    log: str


def require_not_moved(folder: Path) -> None:
    """Raise StorageMoved if the data folder was moved away under a running daemon and is not back.

    Raises StorageError if that cannot be found out.
    """
    note, log_id, state = _note_path(folder), "", None
    if _identify(note) is None:
        return
    try:
        with contextlib.suppress(msgspec.MsgspecError), note.open("rb") as file:
            # A damaged note is a note.
            log_id = decoders.from_json(file.read(_MAX_NOTE), _Note).log
        if _identify(folder / FILE_NAME) is not None:
            state = watermark.load(folder)
        if state is not None and state.log == log_id:
            note.unlink(missing_ok=True)
            return
    except OSError as error:
        raise _unreadable(note if error.filename is None else error.filename, error) from error
    raise StorageMoved(
        f"{folder}: this data folder was moved away while the daemon ran, with all acknowledged data; put it back, or "
        f"delete {note} to begin an empty store here"
    )


def _note_path(folder: Path) -> Path:
    """Return the path of the note beside the folder; a service that may not write there has a folder for it."""
    folder = folder.absolute()
    path = folder.parent / f"{folder.name}.moved"
    status = _find(path)
    return path / "note" if status is not None and stat.S_ISDIR(status.st_mode) else path


def _identify(path: str | Path) -> tuple[int, int] | None:
    """Return device and inode, None if nothing has this path. Raises StorageError if that cannot be found out."""
    status = _find(path)
    return None if status is None else (status.st_dev, status.st_ino)


def _find(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be read: {error.strerror}; see the disk and who owns the folders above it")
