"""Folder watcher: each file is ingested once, also across a crash, then moved to `done/` or `failed/`.

A file is claimed by moving it to `taking/` under a unique name: nothing that happens to its old name touches it, and
its stored position belongs to it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

import msgspec

from agent import media
from agent.config import StreamConfig
from agent.config.sources import FilesSource
from agent.datasets.formats import TABLE_SUFFIXES, open_file
from agent.device.intake import media_reader
from agent.device.intake.file_reader import FileBlock, read_blocks
from agent.device.intake.group_commit import SourcePosition
from agent.device.intake.source import SourceContext, SubmitRows
from agent.device.store.store import Store
from agent.errors import RowRejected, StorageFull, UsageError
from agent.media import ImageFormat

log = logging.getLogger("outstation.files")

# A file is ingested once it has not changed for this long: its writer may not have finished.
_SETTLED_S = 1.0
_MAX_LOGGED_ROWS = 20
FAILED_COUNTER = "files failed"
_MAX_IMAGES_PER_COMMIT = 32
_INDEX_NAME = "rows.csv"
# Bytes at the end of the index that a crash between an entry and the move of its file can have written.
_TAIL_BYTES = 1 << 16
# Errors of the machine or of a removable medium: every file would fail, so it is tried again later.
_TRANSIENT_ERRNOS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}


class _FileProgress(msgspec.Struct):
    """Progress of a file: its last submitted line, that row's number in the stream, and rejected rows."""

    last_line: int
    last_row: int = 0
    rejected_rows: int = 0


def check(context: SourceContext, source: FilesSource) -> str:
    """Describe the source. Raises ConfigError."""
    media_reader.check_config(context.file, context.name, context.stream, int(context.conf.buffer.max_size))
    content = media.to_toml(source.media_format) if source.media_format else "tables"
    return f"{content}, of the files in {source.folder}"


def build(context: SourceContext, source: FilesSource, store: Store) -> FolderWatcher:
    check(context, source)
    return FolderWatcher(context.name, context.stream, source, store)


class FolderWatcher:
    """Watcher of a folder. A file that gets its final name by a rename is never read incompletely."""

    def __init__(self, name: str, stream: StreamConfig, source: FilesSource, store: Store) -> None:
        self._name, self._stream, self._source, self._store = name, stream, source, store
        self._folder = Path(source.folder)
        self._claimed_folder = self._folder / "taking"
        self._file_states: dict[Path, tuple[tuple[int, int], float]] = {}
        self._last_error = ""
        self._suffixes = media_reader.suffixes(stream.media_format) if stream.media_format else TABLE_SUFFIXES
        self._decode_lock = asyncio.Lock()
        self._last_us: int | None = None

    async def run(self, submit_rows: SubmitRows) -> None:
        while True:
            try:
                for folder in (self._folder, self._claimed_folder, self._folder / "done", self._folder / "failed"):
                    folder.mkdir(parents=True, exist_ok=True)
                for paths in self._group_paths(sorted(self._claimed_folder.iterdir())):
                    await self._ingest_files(paths, submit_rows, is_retry=True)
                for paths in self._group_paths(self._list_settled_files()):
                    claimed = [self._claimed_folder / f"{time.time_ns()}.{path.name}" for path in paths]
                    for path, target in zip(paths, claimed, strict=True):
                        os.rename(path, target)
                    await self._ingest_files(claimed, submit_rows, is_retry=False)
                self._last_error = ""
            except OSError as error:
                # The folder may be on a removable medium; logged once, not at every interval.
                if self._last_error != str(error):
                    self._last_error = str(error)
                    log.error("%s: %s; looking again every %g s", self._folder, error, self._source.poll_interval)
            await asyncio.sleep(self._source.poll_interval)

    def _group_paths(self, paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
        """Group images into shared commits; other files go one by one, because positions depend on earlier rows."""
        size = _MAX_IMAGES_PER_COMMIT if isinstance(self._stream.media_format, ImageFormat) else 1
        return (paths[start : start + size] for start in range(0, len(paths), size))

    async def _ingest_files(self, paths: Sequence[Path], submit_rows: SubmitRows, *, is_retry: bool) -> None:
        last = self._store.last_row(self._name)
        if self._stream.media_format is None or not last:
            self._last_us = None
        else:
            batch = self._store.read_rows(self._name, self._stream.fields, last - 1, 1)
            self._last_us = None if batch is None or batch.loss_reason else int(batch.rows.t[-1])
        done = await asyncio.gather(
            *(self._ingest_file(path, submit_rows, is_retry=is_retry) for path in paths), return_exceptions=True
        )
        for problem in done:
            if problem is not None:
                raise problem

    def _list_settled_files(self) -> list[Path]:
        """Return files whose size and modification time have not changed for a while, by the monotonic clock."""
        now, states = time.monotonic(), {}
        for path in self._folder.iterdir():
            if path.suffix.lower() in self._suffixes and not path.name.startswith(".") and path.is_file():
                state = _read_file_state(path)
                before, since = self._file_states.get(path, (None, now))
                states[path] = (state, since if before == state else now)
        self._file_states = states
        return sorted(path for path, (_, since) in states.items() if now - since >= _SETTLED_S)

    async def _ingest_file(self, path: Path, submit_rows: SubmitRows, *, is_retry: bool) -> None:
        progress = _FileProgress(self._store.source_position(f"files:{self._name}", path.name))
        problem: Exception | None = None
        while True:
            before = _read_file_state(path)
            try:
                await self._submit_file(path, submit_rows, progress)
                problem = None
            except (RowRejected, UsageError) as error:
                problem = error
            await asyncio.sleep(0)
            if _read_file_state(path) == before:
                break
            # Its writer had not finished, and still writes to the moved file.
            await asyncio.sleep(_SETTLED_S)
        if problem is not None:
            self._move_to_failed(path, str(problem).removeprefix(f"{path}: "))
            return
        name = _original_name(path)
        log.info("%s: ingested%s", name, f", {progress.rejected_rows} rows rejected" if progress.rejected_rows else "")
        media_format, target = self._stream.media_format, _unused_path(self._folder / "done" / name)
        if media_format is not None:
            if isinstance(media_format, ImageFormat):
                last, count = progress.last_row or progress.last_line, media_format.height
            else:
                last, count = progress.last_row or self._store.last_row(self._name), progress.last_line
            index = self._folder / "done" / _INDEX_NAME
            _append_to_index(index, target.name, (last - count + 1, last), is_retry=is_retry)
        os.rename(path, target)
        # A position that stays does no harm: its name is unique.
        with contextlib.suppress(StorageFull), self._store.transaction() as tx:
            tx.delete_source_position(f"files:{self._name}", path.name)

    def _move_to_failed(self, path: Path, reason: str) -> None:
        name = _original_name(path)
        target = _unused_path(self._folder / "failed" / name)
        target.with_name(f"{target.name}.txt").write_text(f"{name}: {reason}\n", encoding="utf-8")
        os.rename(path, target)
        log.error("%s: %s; moved to failed/", name, reason)
        with contextlib.suppress(StorageFull), self._store.transaction() as tx:
            tx.increment_counter(FAILED_COUNTER, 1)
            tx.delete_source_position(f"files:{self._name}", path.name)

    async def _submit_file(self, path: Path, submit_rows: SubmitRows, progress: _FileProgress) -> None:
        """Submit the rows after `progress`, and advance it."""
        async with contextlib.aclosing(self._read_blocks(path, progress)) as blocks:
            async for block in blocks:
                rejected = dict(block.rejected)
                if block.lines:
                    line = None if isinstance(self._stream.media_format, ImageFormat) else block.lines[-1]
                    position = SourcePosition(f"files:{self._name}", path.name, line)
                    while (outcome := await submit_rows(self._name, block.raw, position, block.lines)).is_store_full:
                        await asyncio.sleep(self._source.poll_interval)
                    progress.last_line, progress.last_row = block.lines[-1], outcome.last_row or progress.last_row
                    rejected |= dict(outcome.rejected)
                if rejected and self._stream.media_format:
                    raise RowRejected(next(iter(rejected.values())))
                for line, reason in sorted(rejected.items())[: max(0, _MAX_LOGGED_ROWS - progress.rejected_rows)]:
                    log.warning("%s: line %d: %s", _original_name(path), line, reason)
                progress.rejected_rows += len(rejected)

    async def _read_blocks(self, path: Path, progress: _FileProgress) -> AsyncGenerator[FileBlock]:
        """Yield the blocks after `progress`. Raises UsageError if this file cannot be read, OSError if none can."""
        try:
            async with contextlib.aclosing(self._decode_blocks(path, progress.last_line)) as blocks:
                async for block in blocks:
                    yield block
        except OSError as error:
            if error.errno in _TRANSIENT_ERRNOS:
                raise
            stored = f"; its lines up to {progress.last_line} are in the stream already" if progress.last_line else ""
            text = f"cannot be read: {error.strerror or error}; fix that, and put it into the folder again{stored}"
            raise UsageError(f"{path}: {text}") from None

    async def _decode_blocks(self, path: Path, skip: int) -> AsyncGenerator[FileBlock]:
        if self._stream.media_format is None:
            with open_file(path) as file:
                for block in read_blocks(path, file, self._name, self._stream, skip):
                    yield block
            return
        # Decoded in another thread, so that other producers need not wait; in turn, so that rows keep the files' order.
        async with self._decode_lock:
            blocks = media_reader.read_blocks(path, _original_name(path), self._stream, skip, self._last_us)
            first = await asyncio.to_thread(next, blocks, None)
            if first is not None:
                self._last_us = round(first.raw.t[-1] * 1e6)
        while first is not None:
            yield first
            first = await asyncio.to_thread(next, blocks, None)


def _read_file_state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _original_name(claimed: Path) -> str:
    """Return the name before a file was claimed; its own name if somebody else put it into `taking/`."""
    return claimed.name.partition(".")[2] or claimed.name


def _unused_path(target: Path) -> Path:
    return target.with_name(f"{target.stem}.{time.time_ns()}{target.suffix}") if target.exists() else target


def _append_to_index(index: Path, name: str, rows: tuple[int, int], *, is_retry: bool) -> None:
    ending = f",{rows[0]},{rows[1]}\n"
    with index.open("a+", encoding="utf-8") as file:
        size = file.tell()
        if is_retry:
            # A crash may have left the entry.
            file.seek(max(0, size - _TAIL_BYTES))
            if ending in file.read():
                return
        if not size:
            file.write("file,first,last\n")
        quoted = '"' + name.replace('"', '""') + '"' if set(name) & set(',"\r\n') else name
        file.write(quoted + ending)
