"""Folder watcher: each file is ingested once, also across a crash, then moved to `done/` or `failed/`.

A file is claimed by moving it to `taking/` under a unique name: nothing that happens to its old name touches it, and
its stored position belongs to it alone. A process of its own decodes it; what was in hand at two deaths in a row goes
to `failed/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec

from outstation.device.config import StreamConfig
from outstation.device.config.sources import FilesSource
from outstation.device.intake import media_reader
from outstation.device.intake.decode_process import DecodeProcess, DecoderDied, DecoderFailed
from outstation.device.intake.file_digest import hash_file
from outstation.device.intake.file_reader import FileBlock
from outstation.device.intake.group_commit import SourcePosition
from outstation.device.intake.source import SourceContext, SubmitRows
from outstation.device.intake.sources.file_marker import MAX_DEATHS, FileMarker
from outstation.device.intake.sources.file_progress import FileProgress, has_all_times
from outstation.device.intake.sources.finished_files import FinishedFile, FinishedFiles
from outstation.device.intake.sources.submission_queue import SubmissionQueue
from outstation.device.intake.sources.watched_folder import FileState, WatchedFolder, original_name, safe_name
from outstation.device.store.store import Store
from outstation.foundation import clock, media
from outstation.foundation.errors import OutstationError, RowRejected, StorageError, StorageFull, UsageError
from outstation.foundation.media import ImageFormat, SoundFormat
from outstation.foundation.text import printable
from outstation.ml.datasets.formats import TABLE_SUFFIXES

log = logging.getLogger("outstation.files")
T = TypeVar("T")

# A file is ingested once it has not changed for this long: its writer may not have finished.
_SETTLED_S = 1.0
# A claimed file that its writer still changes is read again this often. What is added to a table later is read from
# `done/`, so that no other file waits for its writer.
_MAX_ROUNDS, _MAX_TABLE_ROUNDS = 600, 3
_MAX_LOGGED_ROWS = 20
FAILED_COUNTER, INGESTED_COUNTER, DUPLICATE_COUNTER = "files failed", "files ingested", "files duplicate"
# Files whose content is recognized; of more, the last ones.
MAX_DIGESTS = 4096
_MAX_FILES_PER_COMMIT = 32
# Errors of the machine or of a removable medium: every file would fail, so it is tried again later.
_TRANSIENT_ERRNOS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
}
# Errors of a file that belongs to another user; others can still be moved.
_FOREIGN_ERRNOS = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.EBUSY}


class _DuplicateFile(UsageError):
    """A file with the content of an earlier one."""


def check(context: SourceContext, source: FilesSource) -> str:
    """Describe the source. Raises ConfigError."""
    media_reader.check_config(context.file, context.name, context.stream, int(context.conf.buffer.max_size))
    content = media.to_toml(source.media_format) if source.media_format else "tables"
    suffixes = _suffixes(context.stream)
    ignored = _list_ignored(Path(source.folder), suffixes)
    if not ignored:
        return f"{content}, of the files in {source.folder}"
    others = f"{len(ignored)} stay there unread, such as {printable(ignored[0])}"
    return f"{content}, of the files in {source.folder} that end in {', '.join(suffixes)}; {others}"


def _suffixes(stream: StreamConfig) -> tuple[str, ...]:
    return media_reader.suffixes(stream.media_format) if stream.media_format else TABLE_SUFFIXES


def _list_ignored(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the sorted names of visible files that the watcher leaves where they are, among the first 10,000."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        visible = [entry.name for entry in islice(entries, 10_000) if entry.is_file() and entry.name[0] != "."]
        return sorted(name for name in visible if not name.lower().endswith(suffixes))
    return []


def build(context: SourceContext, source: FilesSource, store: Store) -> FolderWatcher:
    check(context, source)
    conf = context.conf
    return FolderWatcher(
        *(context.name, context.stream, source, store, conf.data_dir),
        show_values=conf.privacy.values_in_logs,
        must_be_confined=conf.models.confinement == "required",
    )


class FolderWatcher:
    """Watcher of a folder. A file that gets its final name by a rename is never read incompletely."""

    def __init__(
        self,
        name: str,
        stream: StreamConfig,
        source: FilesSource,
        store: Store,
        data_dir: Path,
        *,
        show_values: bool = False,
        must_be_confined: bool = False,
    ) -> None:
        self._name, self._stream, self._source, self._store = name, stream, source, store
        self._path = Path(source.folder)
        self._file_states: dict[str, tuple[FileState, float]] = {}
        self._last_error = ""
        # Files that the agent may not move, each logged once; the folder's permissions may be why.
        self._stuck: set[str] = set()
        self._access: tuple[int, int, int] | None = None
        self._suffixes = _suffixes(stream)
        self._decoder = DecodeProcess(name, stream, show_values=show_values, must_be_confined=must_be_confined)
        self._marker = FileMarker(data_dir / f"reading.{name}")
        # Files at whose last look the decoder reported an error of the machine, and the line it had come to.
        self._decoder_failures: dict[str, int] = {}
        # Digests of files that are read now, and their claimed names.
        self._digests_in_hand: dict[str, str] = {}
        self._finished = FinishedFiles()
        self._decode_lock = asyncio.Lock()
        self._queue = SubmissionQueue(source.poll_interval)
        self._last_us: int | None = None

    async def run(self, submit_rows: SubmitRows) -> None:
        try:
            while True:
                try:
                    with await asyncio.to_thread(WatchedFolder, self._path) as folder:
                        await self._ingest_folder(folder, submit_rows)
                    self._last_error = ""
                except OSError as error:
                    # The folder may be on a removable medium; logged once, not at every interval.
                    if self._last_error != str(error):
                        self._last_error = str(error)
                        text = printable(str(error))
                        log.error("%s: %s; looking again every %g s", self._path, text, self._source.poll_interval)
                self._decoder.close_if_idle()
                await asyncio.sleep(self._source.poll_interval)
        finally:
            self._decoder.close()

    async def _ingest_folder(self, folder: WatchedFolder, submit_rows: SubmitRows) -> None:
        if (access := folder.read_access()) != self._access:
            self._stuck, self._access = set(), access
        for name, finished in self._finished.iter_grown(folder):
            self._take_back(folder, name, finished)
        for names in self._group_names([name for name in folder.list_claimed() if name not in self._stuck]):
            await self._ingest_files(folder, names, submit_rows, is_retry=True)
        began_s = time.monotonic()
        states = await asyncio.to_thread(folder.list_files, self._suffixes)
        for names in self._group_names(self._select_settled(states, began_s)):
            claimed = [claim for name in names if (claim := self._claim(folder, name))]
            await self._ingest_files(folder, claimed, submit_rows, is_retry=False)

    def _take_back(self, folder: WatchedFolder, name: str, finished: FinishedFile) -> None:
        """Claim a finished file again, whose writer went on after a pause; a full store delays it."""
        with contextlib.suppress(StorageFull):
            with self._store.transaction() as tx:
                tx.set_source_position(f"files:{self._name}", finished.claimed, finished.line)
            self._finished.take_back(name)
            text = "its writer went on after a pause; reading on from line %d. Rename finished files into the folder"
            log.warning(f"%s: {text}", self._log_name(original_name(finished.claimed)), finished.line + 1)
            try:
                folder.take_back(name, finished.claimed)
            except OSError as error:
                self._leave(name, error)

    def _claim(self, folder: WatchedFolder, name: str) -> str:
        """Return the claimed name; "" if the file cannot be moved."""
        try:
            return folder.claim(name)
        except OSError as error:
            self._leave(name, error)
            return ""

    def _leave(self, name: str, error: OSError) -> None:
        """Leave a file where it is. Raises `error` if it is about more than this file."""
        if error.errno not in _FOREIGN_ERRNOS:
            raise error
        if error.errno != errno.ENOENT and name not in self._stuck:
            self._stuck.add(name)
            log.error("%s: cannot be moved: %s; it stays where it is", self._log_name(safe_name(name)), error.strerror)

    def _group_names(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """Group files into shared commits; sounds go one by one, because positions depend on earlier rows."""
        size = 1 if isinstance(self._stream.media_format, SoundFormat) else _MAX_FILES_PER_COMMIT
        return (names[start : start + size] for start in range(0, len(names), size))

    async def _ingest_files(
        self, folder: WatchedFolder, names: Sequence[str], submit_rows: SubmitRows, *, is_retry: bool
    ) -> None:
        last = self._store.last_row(self._name)
        if self._stream.media_format is None or not last:
            self._last_us = None
        else:
            batch = self._store.read_rows(self._name, self._stream.fields, last - 1, 1)
            self._last_us = None if batch is None or batch.loss_reason else int(batch.rows.t[-1])
        done = await asyncio.gather(
            *(self._ingest_file(folder, name, submit_rows, is_retry=is_retry) for name in names),
            return_exceptions=True,
        )
        for problem in done:
            if problem is not None:
                raise problem

    def _select_settled(self, states: dict[str, FileState], began_s: float) -> list[str]:
        """Return files whose state had not changed for a while when this look began, by the monotonic clock."""
        now, known = time.monotonic(), self._file_states
        self._file_states = {}
        for name, state in states.items():
            before, since = known.get(name, (None, now))
            self._file_states[name] = (state, since if before == state else now)
        # A file that cannot be moved is tried again if it changes.
        self._stuck &= {name for name in self._stuck if known.get(name) == self._file_states.get(name)}
        settled = (name for name, (_, since) in self._file_states.items() if began_s - since >= _SETTLED_S)
        return sorted(name for name in settled if name not in self._stuck)

    async def _ingest_file(self, folder: WatchedFolder, name: str, submit_rows: SubmitRows, *, is_retry: bool) -> None:
        progress = FileProgress(self._store.source_position(f"files:{self._name}", name))
        progress.is_compared = progress.last_line > 0
        progress.deaths = self._marker.count_deaths(name, progress.last_line)
        try:
            problem = await self._read_file(folder, name, submit_rows, progress)
        except UsageError as error:
            problem = error
        except (OSError, StorageError):
            raise
        except Exception as error:
            # Such as an answer of a hostile decoder that no check foresees: it must not end the daemon at each start.
            log.exception("%s: unexpected error", self._log_name(original_name(name)))
            problem = UsageError(f"unexpected {type(error).__name__}, see the log{self._describe_stored(progress)}")
        finally:
            self._release_digest(name)
        try:
            if problem is None:
                self._finish(folder, name, progress, is_retry=is_retry)
            else:
                self._fail(folder, name, problem)
        except OSError as error:
            self._leave(name, error)

    async def _read_file(
        self, folder: WatchedFolder, name: str, submit_rows: SubmitRows, progress: FileProgress
    ) -> Exception | None:
        """Submit all rows of a file; return what is wrong with it. Raises UsageError if it is no file, OSError."""
        try:
            file = folder.open_claimed(name)
        except OSError as error:
            raise self._to_file_error(error, progress) from None
        is_table = self._stream.media_format is None
        try:
            for n in range(_MAX_ROUNDS):
                problem: Exception | None = None
                before = FileState.from_status(os.fstat(file))
                try:
                    await self._take_digest(file, name, progress)
                    os.lseek(file, 0, os.SEEK_SET)
                    await self._submit_file(file, name, submit_rows, progress)
                except DecoderDied as died:
                    problem = died
                    progress.deaths += 1
                    if progress.deaths < MAX_DEATHS:
                        continue
                except DecoderFailed as failed:
                    # It may pass until the next look, once for each line: a hostile decoder reports it for ever.
                    if self._decoder_failures.get(name) != progress.last_line:
                        self._decoder_failures[name] = progress.last_line
                        raise
                    problem = self._make_file_error(failed, progress)
                except (RowRejected, UsageError) as error:
                    problem = error
                await asyncio.sleep(0)
                progress.state = before
                if FileState.from_status(os.fstat(file)) == before:
                    progress.is_torn = progress.is_torn and os.pread(file, 1, before.size - 1) != b"\n"
                    return problem
                # Its writer had not finished, and still writes to the moved file.
                if is_table and n + 1 >= _MAX_TABLE_ROUNDS and problem is None:
                    return None
                progress.last_line, progress.is_torn = progress.last_line - progress.is_torn, False
                await asyncio.sleep(_SETTLED_S)
            return UsageError(f"its writer still changes it{self._describe_stored(progress)}")
        finally:
            os.close(file)

    async def _take_digest(self, file: int, name: str, progress: FileProgress) -> None:
        """Take the digest of a file, and compare that of an image or sound. Raises UsageError, see `_compare`."""
        stream = self._stream
        if stream.duplicates == "accept":
            return
        self._release_digest(name)
        # With other fields, or another time, a file has other rows.
        own_us = None
        if stream.media_format:
            own_us = media_reader.parse_name_time_us(original_name(name)) or os.fstat(file).st_mtime_ns // 1000
        context = msgspec.json.encode([stream.fields, stream.media_format, own_us])
        try:
            # In turn, as decoding: rows keep the files' order.
            async with self._decode_lock:
                progress.digest = await asyncio.to_thread(hash_file, file, context)
        except OSError as error:
            raise self._to_file_error(error, progress) from None
        # Only the rows of a table say whether they have a time.
        if stream.media_format:
            self._compare(name, progress)

    def _compare(self, name: str, progress: FileProgress) -> None:
        """Raise UsageError if an earlier file has the same digest, unless rows of this one are stored."""
        if not progress.digest or progress.is_compared:
            return
        earlier_ns = self._store.source_position(self._digest_source, progress.digest)
        if (
            earlier_ns not in (0, _claim_number(name))
            or self._digests_in_hand.setdefault(progress.digest, name) != name
        ):
            when = f" at {clock.to_rfc3339(earlier_ns // 1000)}" if earlier_ns > 1 else ""
            raise _DuplicateFile(
                f"duplicate: a file with the same content was ingested{when}; delete it, or set "
                f'duplicates = "accept" in [streams.{self._name}] if files may repeat'
            )

    def _release_digest(self, name: str) -> None:
        self._digests_in_hand = {digest: other for digest, other in self._digests_in_hand.items() if other != name}

    @property
    def _digest_source(self) -> str:
        return f"file digest:{self._name}"

    def _finish(self, folder: WatchedFolder, name: str, progress: FileProgress, *, is_retry: bool) -> None:
        target = folder.unused_done_name(name)
        rejected = f", {progress.rejected_rows} rows rejected" if progress.rejected_rows else ""
        media_format = self._stream.media_format
        if media_format is not None:
            if isinstance(media_format, ImageFormat):
                last, count = progress.last_row or progress.last_line, media_format.height
            else:
                last, count = progress.last_row or self._store.last_row(self._name), progress.last_line
            folder.append_to_index(target, (last - count + 1, last), is_retry=is_retry)
        # Equal rows without a time are readings of another moment.
        if progress.digest and progress.last_line and progress.has_all_times:
            # Before the move: after a crash in between, the file is still here under its own number.
            position = (self._digest_source, progress.digest, _claim_number(name), MAX_DIGESTS)
            with contextlib.suppress(StorageFull), self._store.transaction() as tx:
                tx.set_source_position(*position)
        folder.move_to_done(name, target)
        if media_format is None and progress.state is not None:
            # A last line that was cut off is read again in full.
            line = progress.last_line - progress.is_torn
            self._finished.add(target, name, progress.state, line)
        log.info("%s: ingested%s", self._log_name(original_name(name)), rejected)
        self._forget(name, INGESTED_COUNTER)

    def _fail(self, folder: WatchedFolder, name: str, problem: Exception) -> None:
        shown, reason, is_duplicate = original_name(name), printable(str(problem)), isinstance(problem, _DuplicateFile)
        folder.move_to_failed(name, f"{shown}: {reason}")
        level = logging.WARNING if is_duplicate else logging.ERROR
        log.log(level, "%s: %s; moved to failed/", self._log_name(original_name(name)), reason)
        self._forget(name, DUPLICATE_COUNTER if is_duplicate else FAILED_COUNTER)

    def _log_name(self, shown: str) -> str:
        """Return the name of a file for the journal, unless the stream's owner keeps names out of it."""
        return shown if self._stream.privacy.file_names else f"a file of {self._name}"

    def _forget(self, name: str, counter: str) -> None:
        self._decoder_failures.pop(name, None)
        # A position that stays does no harm: its name is unique.
        with contextlib.suppress(StorageFull), self._store.transaction() as tx:
            tx.increment_counter(counter, 1)
            tx.delete_source_position(f"files:{self._name}", name)

    async def _submit_file(self, file: int, name: str, submit_rows: SubmitRows, progress: FileProgress) -> None:
        """Submit the rows after `progress`, and advance it."""
        if progress.last_line and isinstance(self._stream.media_format, ImageFormat):
            # An image is one commit. To decode it again would only count deaths of it.
            return
        if progress.deaths >= MAX_DEATHS:
            raise UsageError(f"{progress.deaths} processes in a row ended while they read it; look for damage in it")
        async with contextlib.aclosing(self._read_blocks(file, name, progress)) as blocks:
            async for block, is_last in blocks:
                rejected = dict(block.rejected)
                if rejected and self._stream.media_format:
                    raise RowRejected(next(iter(rejected.values())))
                if self._stream.media_format is None and block.raw.n:
                    progress.has_all_times = progress.has_all_times and has_all_times(block.raw)
                    if progress.has_all_times:
                        self._compare(name, progress)
                last_line = max([*block.lines[-1:], *rejected])
                line = None if isinstance(self._stream.media_format, ImageFormat) else last_line
                position = SourcePosition(f"files:{self._name}", name, line)
                submit = partial(
                    submit_rows, self._name, block.raw, position, block.lines, rejected, is_stalled=not is_last
                )
                outcome = await self._queue.submit(submit)
                progress.last_line, progress.last_row = last_line, outcome.last_row or progress.last_row
                progress.deaths, progress.is_compared = 0, progress.is_compared or block.raw.n > 0
                rejected |= dict(outcome.rejected)
                if rejected and self._stream.media_format:
                    raise RowRejected(next(iter(rejected.values())))
                progress.is_torn = last_line in rejected
                for line, reason in sorted(rejected.items())[: max(0, _MAX_LOGGED_ROWS - progress.rejected_rows)]:
                    log.warning("%s: line %d: %s", self._log_name(original_name(name)), line, printable(reason))
                progress.rejected_rows += len(rejected)

    async def _read_blocks(
        self, file: int, name: str, progress: FileProgress
    ) -> AsyncGenerator[tuple[FileBlock, bool]]:
        """Yield each block after `progress`, and True with the last one.

        Raises UsageError if this file cannot be read, OSError if none can.
        """
        try:
            async with contextlib.aclosing(self._decode_blocks(file, name, progress.last_line)) as blocks:
                async for block_and_end in blocks:
                    yield block_and_end
        except DecoderFailed:
            raise
        except OSError as error:
            raise self._to_file_error(error, progress) from None

    def _to_file_error(self, error: OSError, progress: FileProgress) -> Exception:
        """Return `error` if it is one of the machine, else an error of the file."""
        if error.errno in _TRANSIENT_ERRNOS:
            return error
        return self._make_file_error(error, progress)

    def _make_file_error(self, error: OSError, progress: FileProgress) -> UsageError:
        text = f"cannot be read: {error.strerror or error}; fix that, and put it into the folder again"
        return UsageError(text + self._describe_stored(progress))

    def _describe_stored(self, progress: FileProgress) -> str:
        return f"; its lines up to {progress.last_line} are in the stream already" if progress.last_line else ""

    async def _decode_blocks(self, file: int, name: str, skip: int) -> AsyncGenerator[tuple[FileBlock, bool]]:
        # In turn, so that rows keep the files' order.
        async with self._decode_lock:
            await self._run_decoder(lambda: self._decoder.start(original_name(name)))
            with self._marker.guard(name, skip):
                blocks = self._decoder.decode(file, original_name(name), skip, self._last_us)
                if isinstance(self._stream.media_format, ImageFormat):
                    last = await self._run_decoder(lambda: list(blocks))
                    self._last_us = round(last[-1].raw.t[-1] * 1e6) if last else self._last_us
                else:
                    last = []
                    try:
                        while (block := await self._run_decoder(lambda: next(blocks, None))) is not None:
                            for earlier in last:
                                yield earlier, False
                            last = [block]
                    except (OSError, OutstationError):
                        for earlier in last:
                            yield earlier, True
                        raise
        # After its turn: other small files then share the commit.
        for block in last:
            yield block, True

    async def _run_decoder(self, call: Callable[[], T]) -> T:
        """Wait for the decoder in another thread, so that producers need not wait."""
        try:
            return await asyncio.to_thread(call)
        except asyncio.CancelledError:
            # The thread then ends, too.
            self._decoder.close()
            raise


def _claim_number(claimed: str) -> int:
    """Return the number in a claimed name, epoch ns; 1 if another program put the file into `taking/`."""
    number = claimed.partition(".")[0]
    return int(number) if number.isascii() and number.isdigit() and len(number) == 19 else 1
