"""Salvage of a damaged store: its files go to quarantine, and everything readable is copied into a new database.

A salvage that is killed anywhere continues at the next opening: the marker file `damaged` stays until the new database,
built under another name, has taken the place of the old one. The newest two damaged databases stay in `quarantine/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from outstation.device.recovery import migrate
from outstation.device.store import journal
from outstation.device.store.store import DATABASE
from outstation.device.store.tables import row_crc
from outstation.device.store.watermark import WatermarkState
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import StorageError

MARKER, QUARANTINE = "damaged", "quarantine"
_BUILDING = f"{DATABASE}.salvaged"
_MAX_QUARANTINED = 2
# Length of the file header on page 1, with counters that change all the time.
_HEADER = 100
_PATCHED = "patched.db"
# Copy of the journal of small commits; `journal` is SQLite's.
_SMALL_COMMITS = "small-commits"


def write_damage_marker(folder: Path, cause: str) -> None:
    """Have the database salvaged at the next opening. If this fails, the damage will be detected again."""
    with contextlib.suppress(StorageError):
        _write_marker(folder, {"cause": cause})


def read_cause(folder: Path) -> str | None:
    """Return the recorded cause of a pending salvage, or None."""
    marker = _read_marker(folder)
    return str(marker.get("cause", "unknown")) if marker is not None else None


def salvage(folder: Path, cause: str, saved: WatermarkState | None, first_page: bytes | None) -> None:
    """Replace the damaged database by an intact one. Raises StorageError if not even that is possible."""
    journal.require_known_records(folder)
    marker = _read_marker(folder) or {"cause": cause}
    if "quarantine" not in marker:
        numbers = [int(path.name) for path in (folder / QUARANTINE).glob("*") if path.name.isdecimal()]
        marker["quarantine"] = str(max(numbers, default=0) + 1)
        _write_marker(folder, marker)
    place = folder / QUARANTINE / marker["quarantine"]
    try:
        if not ((place / DATABASE).exists() and (folder / DATABASE).exists()):
            place.mkdir(parents=True, exist_ok=True)
            # The journal stays: the small commits in it are applied to the copy.
            if content := journal.read_file(folder):
                durable_files.write(place / _SMALL_COMMITS, content, 0o600)
            # The -shm is an index of the -wal and can be rebuilt. The database goes last: a kill here is then detected.
            (folder / f"{DATABASE}-shm").unlink(missing_ok=True)
            # A journal beside the new database would be rolled back into it.
            for name, target in (
                (f"{DATABASE}-journal", "journal"),
                (f"{DATABASE}-wal", f"{DATABASE}-wal"),
                (DATABASE, DATABASE),
            ):
                if (folder / name).exists():
                    (folder / name).rename(place / target)
            durable_files.fsync(place)
            durable_files.fsync(folder)
            older = sorted((p for p in place.parent.glob("*") if p.name.isdecimal()), key=lambda p: int(p.name))
            for path in older[:-_MAX_QUARANTINED]:
                import shutil

                shutil.rmtree(path, ignore_errors=True)
            _build(folder, place, str(marker["cause"]), saved, first_page)
        (folder / MARKER).unlink()
        durable_files.fsync(folder)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(
            f"{folder / DATABASE} is damaged ({marker['cause']}) and cannot be replaced: {error}; make room on the "
            f"disk, or replace it. The damaged files are in {place} or still in {folder}"
        ) from error


def _build(folder: Path, place: Path, cause: str, saved: WatermarkState | None, first_page: bytes | None) -> None:
    # Imported here, 15 ms: few starts need it.
    from outstation.device.recovery.copy import StoreCopy
    from outstation.device.recovery.raw_pages import DamagedDatabase

    building = folder / _BUILDING
    for path in (building, folder / f"{_BUILDING}-journal"):
        path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(building, isolation_level=None)) as new:
        # Nobody relies on it before it is renamed.
        new.execute("PRAGMA synchronous=OFF")
        migrate.apply(new)
        row_crc.install(new, writes=True)
        with _open_damaged(place, first_page) as old:
            copy = StoreCopy(DamagedDatabase(old), new, saved)
            copy.copy_tables()
        copy.complete(cause, f"{QUARANTINE}/{place.name}", folder)
    durable_files.fsync(building)
    durable_files.rename(building, folder / DATABASE)


@contextlib.contextmanager
def _open_damaged(place: Path, first_page: bytes | None) -> Iterator[sqlite3.Connection]:
    """Open the damaged database read-only, with its first page restored if that is known."""
    path, patched = place / DATABASE, place / _PATCHED
    try:
        if first_page is not None and _first_page_differs(path, first_page):
            if path.exists():
                _copy_sparse(path, patched)
            page = bytearray(first_page)
            patched.touch()
            pages = max(1, -(-patched.stat().st_size // len(page)))
            # Size in pages, with the counter that marks it as valid; no list of free pages.
            page[28:32] = pages.to_bytes(4, "big")
            page[92:96] = page[24:28]
            page[32:40] = bytes(8)
            with patched.open("r+b") as file:
                file.write(page)
            if (place / f"{DATABASE}-wal").exists():
                import shutil

                shutil.copyfile(place / f"{DATABASE}-wal", place / f"{_PATCHED}-wal")
            path = patched
        if not path.exists():
            path.touch()
        # Read-only, so that the quarantined file stays unchanged.
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as old:
            old.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
            yield old
    finally:
        for rest in (*place.glob(f"{_PATCHED}*"), place / f"{DATABASE}-shm"):
            rest.unlink(missing_ok=True)


def _copy_sparse(source: Path, target: Path) -> None:
    """Copy a file without filling its holes: a file that claims a terabyte must not fill the disk."""
    with source.open("rb") as old, target.open("wb") as new:
        new.truncate(os.fstat(old.fileno()).st_size)
        for begin, end in input_files.data_ranges(old):
            while begin < end:
                begin += os.copy_file_range(old.fileno(), new.fileno(), end - begin, begin, begin)


def _first_page_differs(path: Path, first_page: bytes) -> bool:
    if not path.exists():
        return True
    with path.open("rb") as file:
        page = file.read(len(first_page))
    fixed = [slice(0, 24), slice(44, 92), slice(_HEADER, None)]
    return any(page[part] != first_page[part] for part in fixed)


def _read_marker(folder: Path) -> dict[str, str] | None:
    try:
        text = (folder / MARKER).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    with contextlib.suppress(ValueError):
        marker = json.loads(text)
        if isinstance(marker, dict):
            return marker
    # Torn by a crash.
    return {"cause": "unknown"}


def _write_marker(folder: Path, marker: dict[str, str]) -> None:
    durable_files.write(folder / MARKER, json.dumps(marker).encode())
