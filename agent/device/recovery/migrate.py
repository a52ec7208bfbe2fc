"""Older stores get today's tables, with a copy of the old one kept until the new one was closed cleanly once."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from agent import __version__, durable_files
from agent.device.store import schema
from agent.errors import StorageError, UsageError

_MIGRATION_SET = "outstation-device"


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the tables of `db`, the file `path`, up to date.

    Raises UsageError for the store of a newer version, StorageError where a migration fails: then the file is as it
    was, and `db` is closed.
    """
    applied = _applied_steps(db)
    known = [step.__name__ for step in schema.MIGRATIONS]
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
        apply(db)
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
        _restore_backup(db, path, backup)
        raise StorageError(
            f"{path}: it could not be changed for version {__version__} ({', '.join(pending)}): {error}. The store is "
            "as it was before, nothing is lost; go back to the version that made it, and report this"
        ) from error


def apply(db: sqlite3.Connection) -> None:
    """The steps that `db` has not been through yet, each in a transaction of its own."""
    # Costs 40 ms and several MB: only for a store that is made or changed, which few starts find.
    from sqlite_utils import Database, Migrations

    migrations = Migrations(_MIGRATION_SET)
    for step in schema.MIGRATIONS:
        migrations()(step)
    migrations.apply(Database(db, execute_plugins=False))


def drop_backups(folder: Path) -> None:
    """The copies of before a migration are needed no more."""
    for path in folder.glob("*.db.before-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _applied_steps(db: sqlite3.Connection) -> list[str]:
    """Names of the steps that `db` has been through, in their order, from where sqlite-utils keeps them."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = '_sqlite_migrations'").fetchone() is None:
        return []
    found = db.execute("SELECT name FROM _sqlite_migrations WHERE migration_set = ? ORDER BY rowid", (_MIGRATION_SET,))
    return [str(name) for (name,) in found.fetchall()]


def _counts(db: sqlite3.Connection) -> dict[str, int]:
    """Rows of every table of ours."""
    names = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '%sqlite_%'").fetchall()
    return {str(name): int(db.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]) for (name,) in names}


def _back_up(db: sqlite3.Connection, backup: Path) -> None:
    if backup.exists():
        # Of a migration that was killed; each step is one transaction, so this is the older of the two.
        return
    making = backup.with_name(backup.name + ".new")
    making.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(making),))
    durable_files.fsync(making)
    durable_files.rename(making, backup)


def _restore_backup(db: sqlite3.Connection, path: Path, backup: Path) -> None:
    # With its log emptied into it, nothing of the changed database can come to lie over the copy.
    with contextlib.suppress(sqlite3.Error):
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    for name in (f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
    durable_files.rename(backup, path)
