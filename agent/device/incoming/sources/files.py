"""A watched folder: each file is taken once, also across a crash, then moved to `done/` or `failed/`.

A file is claimed by a move into `taking/` under a name that never comes again: nothing that happens to its old name
touches it, and the mark of how far it was taken belongs to it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from agent.config import FilesSource, Stream
from agent.device.incoming.group import Mark
from agent.device.incoming.intake import Offer
from agent.device.incoming.readfile import SUFFIXES, Block, blocks, open_text
from agent.device.storage.store import Store
from agent.errors import Rejected, StorageFull, UsageError

log = logging.getLogger("outstation.files")

# A writer may still be at it: a file is taken once it has been left alone for this long.
_SETTLED_S = 1.0
_SHOWN = 20


class Files:
    """Takes what is put into `folder`. A file that appears under its final name by rename is never seen half."""

    def __init__(self, name: str, stream: Stream, source: FilesSource, store: Store) -> None:
        self._name, self._stream, self._source, self._store = name, stream, source, store
        self._folder = Path(source.folder)
        self._taking = self._folder / "taking"
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}
        self._trouble = ""

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
        for path in sorted(self._taking.iterdir()):
            await self._take(path, offer)
        for path in self._settled():
            claimed = self._taking / f"{time.time_ns()}.{path.name}"
            os.rename(path, claimed)
            await self._take(claimed, offer)

    def _settled(self) -> list[Path]:
        """Files whose size and time have not changed for a while, by a clock that nobody steps."""
        now, seen = time.monotonic(), {}
        for path in self._folder.iterdir():
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
                state = _state(path)
                kept, since = self._seen.get(path, (None, now))
                seen[path] = (state, since if kept == state else now)
        self._seen = seen
        return sorted(path for path, (_, since) in seen.items() if now - since >= _SETTLED_S)

    async def _take(self, path: Path, offer: Offer) -> None:
        problems = 0
        try:
            while True:
                before = _state(path)
                problems += await self._read(path, offer)
                await asyncio.sleep(0)
                if _state(path) == before:
                    break
                # Its writer was not done after all, and writes on into the moved file.
                await asyncio.sleep(_SETTLED_S)
        except (Rejected, UsageError) as problem:
            log.error("%s: %s; moved to failed/", _plain_name(path), problem)
            self._file_away(path, "failed")
            return
        log.info("%s: taken%s", _plain_name(path), f", {problems} rows rejected" if problems else "")
        self._file_away(path, "done")

    async def _read(self, path: Path, offer: Offer) -> int:
        """Offer what was not taken yet; how many rows were rejected."""
        problems = 0
        for block in self._blocks(path):
            rejected = dict(block.bad)
            if block.lines:
                mark = Mark(f"files:{self._name}", path.name, block.lines[-1])
                while (outcome := await offer(self._name, block.raw, mark, block.lines)).full:
                    await asyncio.sleep(self._source.every)
                rejected |= dict(outcome.rejected)
            for line, reason in sorted(rejected.items())[: max(0, _SHOWN - problems)]:
                log.warning("%s: line %d: %s", _plain_name(path), line, reason)
            problems += len(rejected)
        return problems

    def _blocks(self, path: Path) -> Iterator[Block]:
        skip = self._store.mark(f"files:{self._name}", path.name)
        with open_text(path) as text:
            yield from blocks(path, text, self._name, self._stream, skip)

    def _file_away(self, path: Path, where: str) -> None:
        target = self._folder / where / _plain_name(path)
        if target.exists():
            target = target.with_name(f"{target.stem}.{time.time_ns()}{target.suffix}")
        os.rename(path, target)
        # A mark that stays is of no harm: its name never comes again.
        with contextlib.suppress(StorageFull), self._store.transaction() as tx:
            tx.drop_mark(f"files:{self._name}", path.name)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _plain_name(claimed: Path) -> str:
    """The name a file in `taking/` had."""
    return claimed.name.partition(".")[2]
