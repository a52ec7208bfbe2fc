"""Migration of an older store's tables, behind a backup that is kept until the new version closed the store cleanly."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from outstation import __version__
from outstation.device.store.tables import schema
from outstation.foundation import durable_files
from outstation.foundation.errors import StorageError, UsageError


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Migrate the tables of `db`, the file `path`, to the current schema.

    Raises UsageError for the store of a newer version, StorageError if a migration fails: the file is then as it was,
    and `db` is closed.
    """
    applied = schema.applied_steps(db)
    known = schema.STEPS
    unknown = [name for name in applied if name not in known]
    if unknown:
        raise UsageError(
            f"{path}: made by a newer version of outstation (it has {', '.join(unknown)}, this is {__version__}); "
            "install that version again, or give this one a data_dir of its own"
        )
    pending = [name for name in known if name not in applied]
    if not pending:
        return
    before = _counts(db)
    if not before:
        # One commit instead of five: a third of what making a store writes.
        db.execute("BEGIN")
        apply(db)
        db.execute("COMMIT")
        return
    backup = path.with_name(f"{path.name}.before-{__version__}")
    _back_up(db, backup)
    try:
        apply(db)
        after = _counts(db)
        lost = [
            f"{table} has {after.get(table, 0)} rows instead of {n}"
            for table, n in before.items()
            if after.get(table, 0) < n
        ]
        if lost:
            raise sqlite3.IntegrityError("; ".join(lost))
    except Exception as error:
        # The write-ahead log is emptied first, so that no page of the changed database can be applied to the backup.
        with contextlib.suppress(sqlite3.Error):
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
        for name in (f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(name).unlink(missing_ok=True)
        durable_files.rename(backup, path)
        raise StorageError(
            f"{path}: migration to version {__version__} failed ({', '.join(pending)}): {error}. The store is as it "
            "was before, nothing is lost; go back to the version that made it, and report this"
        ) from error


def apply(db: sqlite3.Connection) -> None:
    """Apply the pending steps, each in its own transaction or as part of the caller's."""
    # Imported here, 40 ms and several MB: only a new or older store needs it.
    from sqlite_utils import Database, Migrations

    migrations = Migrations(schema.MIGRATION_SET)
    for step in schema.MIGRATIONS:
        migrations()(step)
    migrations.apply(Database(db, execute_plugins=False))


def drop_backups(folder: Path) -> None:
    for path in folder.glob("*.db.before-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _counts(db: sqlite3.Connection) -> dict[str, int]:
    names = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '%sqlite_%'").fetchall()
    return {str(name): int(db.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]) for (name,) in names}


def _back_up(db: sqlite3.Connection, backup: Path) -> None:
    if backup.exists():
        # From a migration that was killed: that backup is the older state.
        return
    copy = backup.with_name(backup.name + ".new")
    copy.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(copy),))
    durable_files.fsync(copy)
    durable_files.rename(copy, backup)
