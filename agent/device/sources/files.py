"""A watched folder: each file is taken once, also across a crash, then moved to `done/` or `failed/`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from agent.config import FilesSource, Stream
from agent.device.group import Mark
from agent.device.intake import Offer
from agent.device.readfile import SUFFIXES, Block, blocks
from agent.device.store import Store
from agent.errors import Rejected, UsageError

log = logging.getLogger("outstation.files")

# A writer may still be at it: a file is taken once it has been left alone for this long.
_SETTLED_S = 1.0


class Files:
    """Takes what is put into `folder`. A file that appears under its final name by rename is never seen half."""

    def __init__(self, name: str, stream: Stream, source: FilesSource, store: Store) -> None:
        self._name, self._stream, self._source, self._store = name, stream, source, store
        self._folder = Path(source.folder)

    async def run(self, offer: Offer) -> None:
        for folder in (self._folder, self._folder / "done", self._folder / "failed"):
            folder.mkdir(parents=True, exist_ok=True)
        while True:
            for path in self._waiting():
                await self._take(path, offer)
            await asyncio.sleep(self._source.every)

    def _waiting(self) -> list[Path]:
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                age = time.time() - path.stat().st_mtime
                if path.suffix.lower() in SUFFIXES and path.is_file() and not 0 <= age < _SETTLED_S:
                    found.append(path)
        return sorted(found)

    async def _take(self, path: Path, offer: Offer) -> None:
        source, item = f"files:{self._name}", f"{path.name}:{path.stat().st_ino}:{path.stat().st_size}"
        problems = 0
        try:
            for block in self._blocks(path, self._store.mark(source, item)):
                for line, reason in block.bad.items():
                    log.warning("%s: line %d: %s", path.name, line, reason)
                problems += len(block.bad)
                if not block.lines:
                    continue
                while True:
                    outcome = await offer(self._name, block.raw, Mark(source, item, block.lines[-1]), block.lines)
                    if not outcome.full:
                        break
                    await asyncio.sleep(self._source.every)
                for line, reason in outcome.rejected:
                    log.warning("%s: line %d: %s", path.name, line, reason)
                problems += len(outcome.rejected)
        except (Rejected, UsageError, UnicodeDecodeError) as problem:
            log.error("%s: %s; moved to failed/", path.name, problem)
            self._file_away(path, "failed", source, item)
            return
        log.info("%s: taken%s", path.name, f", {problems} rows rejected" if problems else "")
        self._file_away(path, "done", source, item)

    def _blocks(self, path: Path, skip: int) -> Iterator[Block]:
        with path.open(encoding="utf-8", newline="") as text:
            yield from blocks(path, text, self._stream, skip)

    def _file_away(self, path: Path, where: str, source: str, item: str) -> None:
        target = path.parent / where / path.name
        if target.exists():
            target = target.with_name(f"{path.stem}.{time.time_ns()}{path.suffix}")
        os.replace(path, target)
        with self._store.transaction() as tx:
            tx.drop_mark(source, item)
