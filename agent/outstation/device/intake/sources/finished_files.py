"""Tables in `done/` whose writer continues: lines that it appends after a pause are read, too."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from outstation.device.intake.sources.watched_folder import FileState, WatchedFolder
from outstation.foundation.backoff import Backoff

# A writer that pauses longer has its rows in the next file.
_WATCH_S = 3600.0
_MAX_FILES = 1000
# Each time a file is decoded from its start: how long it waits for that doubles.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 5.0, 600.0


class FinishedFile(msgspec.Struct, frozen=True):
    """A file that was read up to `line`, when its state was `state`; `claimed`: its name in `taking/`.

    `since_s`: monotonic time of that; `pause_s`: how long it is then left alone.
    """

    claimed: str
    state: FileState
    line: int
    since_s: float
    pause_s: float


class FinishedFiles:
    """The last files that were moved to `done/`, by their names there."""

    def __init__(self) -> None:
        self._files: dict[str, FinishedFile] = {}
        # Records of files that were taken back, by claimed name.
        self._pauses_s: dict[str, float] = {}
        self._next_look_s = 0.0

    def add(self, name: str, claimed: str, state: FileState, line: int) -> None:
        pause_s = Backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S).double_s(self._pauses_s.pop(claimed, _FIRST_PAUSE_S / 2))
        self._files[name] = FinishedFile(claimed, state, line, time.monotonic(), pause_s)
        if len(self._files) > _MAX_FILES:
            del self._files[next(iter(self._files))]

    def take_back(self, name: str) -> None:
        file = self._files.pop(name)
        self._pauses_s = {file.claimed: file.pause_s} | dict(list(self._pauses_s.items())[:_MAX_FILES])

    def iter_grown(self, folder: WatchedFolder) -> Iterator[tuple[str, FinishedFile]]:
        """Yield the files that are longer now, after their pause; at most one look at all in `_FIRST_PAUSE_S`.

        Raises OSError.
        """
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _FIRST_PAUSE_S
        for name, file in list(self._files.items()):
            if now_s - file.since_s < file.pause_s:
                continue
            state = folder.read_done_state(name)
            if state is None or state.inode != file.state.inode or now_s - file.since_s > _WATCH_S:
                del self._files[name]
            elif state.size > file.state.size:
                yield name, file
