"""What became of a watched folder's file: in `done/`, its rows noted, or in `failed/`, the reason beside it."""

from __future__ import annotations

import os
import time
from pathlib import Path

_INDEX_NAME = "rows.csv"
# Of the notes, what a crash between a note and its file's move can have written.
_TAIL_BYTES = 1 << 16


def move_to_done(path: Path, folder: Path, name: str, rows: tuple[int, int] | None, *, is_retry: bool) -> None:
    """Move `path` to `done/NAME`. `rows`: first and last in the stream; `again`: a crash may have left the note."""
    target = _unused_path(folder / "done" / name)
    if rows is not None:
        _append_to_index(folder / "done" / _INDEX_NAME, target.name, rows, is_retry=is_retry)
    os.rename(path, target)


def move_to_failed(path: Path, folder: Path, name: str, reason: str) -> None:
    """Move `path` to `failed/NAME`, with the reason in `failed/NAME.txt`."""
    target = _unused_path(folder / "failed" / name)
    target.with_name(f"{target.name}.txt").write_text(f"{name}: {reason}\n", encoding="utf-8")
    os.rename(path, target)


def _unused_path(target: Path) -> Path:
    return target.with_name(f"{target.stem}.{time.time_ns()}{target.suffix}") if target.exists() else target


def _append_to_index(index: Path, name: str, rows: tuple[int, int], *, is_retry: bool) -> None:
    ending = f",{rows[0]},{rows[1]}\n"
    with index.open("a+", encoding="utf-8") as file:
        size = file.tell()
        if is_retry:
            file.seek(max(0, size - _TAIL_BYTES))
            if ending in file.read():
                return
        if not size:
            file.write("file,first,last\n")
        quoted = '"' + name.replace('"', '""') + '"' if set(name) & set(',"\r\n') else name
        file.write(quoted + ending)
