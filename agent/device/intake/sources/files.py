"""A watched folder: each file is taken once, also across a crash, then moved to `done/` or `failed/`.

A file is claimed by a move into `taking/` under a name that never comes again: nothing that happens to its old name
touches it, and the mark of how far it was taken belongs to it alone.
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

from agent.config import FilesSource, Stream
from agent.device.intake import media_reader
from agent.device.intake.file_reader import SUFFIXES, Block, blocks, open_text
from agent.device.intake.group_commit import Mark, Outcome
from agent.device.intake.server import Offer
from agent.device.intake.sources import filed
from agent.device.store.store import Store
from agent.errors import Rejected, StorageFull, UsageError
from agent.media import Image

log = logging.getLogger("outstation.files")

# A writer may still be at it: a file is taken once it has been left alone for this long.
_SETTLED_S = 1.0
_SHOWN = 20
FAILED = "files failed"
# So many images wait together for a commit at most.
_IMAGES = 32
# Of the machine, or of a medium that may come back, whatever the file: each would fail alike, and is read later.
_NOT_OF_THE_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}


class _Taken(msgspec.Struct):
    """Of a file: rows rejected, and how far it was taken: its rows, and the last one's number in the stream."""

    through: int
    row: int = 0
    problems: int = 0


class Files:
    """Takes what is put into `folder`. A file that appears under its final name by rename is never seen half."""

    def __init__(self, name: str, stream: Stream, source: FilesSource, store: Store) -> None:
        self._name, self._stream, self._source, self._store = name, stream, source, store
        self._folder = Path(source.folder)
        self._taking = self._folder / "taking"
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}
        self._trouble = ""
        self._suffixes = media_reader.suffixes(stream.made) if stream.made else SUFFIXES
        self._decoding = asyncio.Lock()
        self._last_us: int | None = None

    async def run(self, offer: Offer) -> None:
        while True:
            try:
                await self._turn(offer)
                self._trouble = ""
            except OSError as error:
                # The folder may be on a medium that comes back; said once, not at every look.
                if self._trouble != str(error):
                    self._trouble = str(error)
                    log.error("%s: %s; looking again every %g s", self._folder, error, self._source.every)
            await asyncio.sleep(self._source.every)

    async def _turn(self, offer: Offer) -> None:
        """Take what a crash left half taken, then what waits."""
        for folder in (self._folder, self._taking, self._folder / "done", self._folder / "failed"):
            folder.mkdir(parents=True, exist_ok=True)
        for some in self._some(sorted(self._taking.iterdir())):
            await self._take_all(some, offer, again=True)
        for some in self._some(self._settled()):
            claimed = [self._taking / f"{time.time_ns()}.{path.name}" for path in some]
            for path, target in zip(some, claimed, strict=True):
                os.rename(path, target)
            await self._take_all(claimed, offer, again=False)

    def _some(self, paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
        """Images may share a commit, of other files each row has its place among those before it."""
        at_once = _IMAGES if isinstance(self._stream.made, Image) else 1
        return (paths[start : start + at_once] for start in range(0, len(paths), at_once))

    async def _take_all(self, paths: Sequence[Path], offer: Offer, *, again: bool) -> None:
        self._last_us = self._last_time()
        done = await asyncio.gather(*(self._take(path, offer, again=again) for path in paths), return_exceptions=True)
        for problem in done:
            if problem is not None:
                raise problem

    def _settled(self) -> list[Path]:
        """Files whose size and time have not changed for a while, by a clock that nobody steps."""
        now, seen = time.monotonic(), {}
        for path in self._folder.iterdir():
            if path.suffix.lower() in self._suffixes and not path.name.startswith(".") and path.is_file():
                state = _state(path)
                kept, since = self._seen.get(path, (None, now))
                seen[path] = (state, since if kept == state else now)
        self._seen = seen
        return sorted(path for path, (_, since) in seen.items() if now - since >= _SETTLED_S)

    async def _take(self, path: Path, offer: Offer, *, again: bool) -> None:
        taken = _Taken(self._store.mark(f"files:{self._name}", path.name))
        problem: Exception | None = None
        while True:
            before = _state(path)
            try:
                await self._read(path, offer, taken)
                problem = None
            except (Rejected, UsageError) as found:
                problem = found
            await asyncio.sleep(0)
            if _state(path) == before:
                break
            # Its writer was not done after all, and writes on into the moved file.
            await asyncio.sleep(_SETTLED_S)
        if problem is not None:
            self._fail(path, str(problem).removeprefix(f"{path}: "))
            return
        name = _plain_name(path)
        log.info("%s: taken%s", name, f", {taken.problems} rows rejected" if taken.problems else "")
        filed.done(path, self._folder, name, self._rows_of(taken), again=again)
        # A mark that stays is of no harm: its name never comes again.
        with contextlib.suppress(StorageFull), self._store.transaction() as tx:
            tx.drop_mark(f"files:{self._name}", path.name)

    def _fail(self, path: Path, reason: str) -> None:
        filed.failed(path, self._folder, _plain_name(path), reason)
        log.error("%s: %s; moved to failed/", _plain_name(path), reason)
        with contextlib.suppress(StorageFull), self._store.transaction() as tx:
            tx.count(FAILED, 1)
            tx.drop_mark(f"files:{self._name}", path.name)

    async def _read(self, path: Path, offer: Offer, taken: _Taken) -> None:
        """Offer what was not taken yet."""
        async with contextlib.aclosing(self._readable(path, taken)) as found:
            async for block in found:
                rejected = dict(block.bad)
                if block.lines:
                    outcome = await self._offered(path, offer, block)
                    taken.through, taken.row = block.lines[-1], outcome.row or taken.row
                    rejected |= dict(outcome.rejected)
                if rejected and self._stream.made:
                    raise Rejected(next(iter(rejected.values())))
                for line, reason in sorted(rejected.items())[: max(0, _SHOWN - taken.problems)]:
                    log.warning("%s: line %d: %s", _plain_name(path), line, reason)
                taken.problems += len(rejected)

    async def _offered(self, path: Path, offer: Offer, block: Block) -> Outcome:
        position = None if isinstance(self._stream.made, Image) else block.lines[-1]
        mark = Mark(f"files:{self._name}", path.name, position)
        while (outcome := await offer(self._name, block.raw, mark, block.lines)).full:
            await asyncio.sleep(self._source.every)
        return outcome

    async def _readable(self, path: Path, taken: _Taken) -> AsyncGenerator[Block]:
        """What was not taken yet. Raises UsageError where this file cannot be read, OSError where none can."""
        try:
            async with contextlib.aclosing(self._blocks(path, taken.through)) as found:
                async for block in found:
                    yield block
        except OSError as error:
            if error.errno in _NOT_OF_THE_FILE:
                raise
            kept = f"; its lines up to {taken.through} are in the stream already" if taken.through else ""
            said = f"cannot be read: {error.strerror or error}; mend that, and put it into the folder again{kept}"
            raise UsageError(f"{path}: {said}") from None

    async def _blocks(self, path: Path, skip: int) -> AsyncGenerator[Block]:
        if self._stream.made is None:
            with open_text(path) as text:
                for block in blocks(path, text, self._name, self._stream, skip):
                    yield block
            return
        # Decoded beside the loop, which other producers wait for, and in turn, so that rows come in the files' order.
        async with self._decoding:
            found = media_reader.blocks(path, _plain_name(path), self._stream, skip, self._last_us)
            first = await asyncio.to_thread(next, found, None)
            if first is not None:
                self._last_us = round(first.raw.t[-1] * 1e6)
        while first is not None:
            yield first
            first = await asyncio.to_thread(next, found, None)

    def _last_time(self) -> int | None:
        """When the stream's last row was, epoch µs; None where that is not known."""
        last = self._store.last_row(self._name)
        if self._stream.made is None or not last:
            return None
        found = self._store.take(self._name, self._stream.fields, last - 1, 1)
        return None if found is None or found.lost else int(found.rows.t[-1])

    def _rows_of(self, taken: _Taken) -> tuple[int, int] | None:
        """First and last row in the stream of a file that was taken as a whole."""
        made = self._stream.made
        if made is None:
            return None
        if isinstance(made, Image):
            last = taken.row or taken.through
            return last - made.height + 1, last
        last = taken.row or self._store.last_row(self._name)
        return last - taken.through + 1, last


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _plain_name(claimed: Path) -> str:
    """The name a file in `taking/` had; its own, where somebody else put it there."""
    return claimed.name.partition(".")[2] or claimed.name
