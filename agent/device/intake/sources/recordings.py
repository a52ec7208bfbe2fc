"""Recordings in a file, and the order in which a replay plays them.

Recordings without times go over again and again, each pass in another order and each recording from another start, all
from one seed. Where the file has times, `t`, these are kept: recordings come in their order and whole, and the next
pass is whole weeks later, so that the time of day and the day of the week stay what they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.config.sources import RecordingFilter
from agent.datasets.recordings import Recordings
from agent.errors import UsageError

_PAUSE_S = 5.0
_MAX_SKIP_ROWS = 100
_WEEK_S = 7 * 86_400


class PlaylistItem(msgspec.Struct, frozen=True):
    """One recording of a pass: rows `first`… of the replay (from 1) are rows `start`… of the recordings.

    `offset_s`: when it begins, after the replay did; with times of their own, how much later than these its rows are.
    """

    first: int
    start: int
    n: int
    label: int
    offset_s: float

    @property
    def last(self) -> int:
        return self.first + self.n - 1


@dataclass
class Playlist:
    """The order of recordings of a subject (None: of all), for ever, from one seed.

    Of those the `scenes` choose, each from its row on; `skip` leaves out the first rows of recordings with times.
    Raises UsageError where nothing is left.
    """

    recordings: Recordings
    subject: int | None
    seed: int
    scenes: Sequence[RecordingFilter] = ()
    skip: int = 0
    _recordings_by_scene: list[tuple[int, NDArray[np.int64]]] = field(init=False)

    def __post_init__(self) -> None:
        everyone = np.arange(len(self.recordings.label))
        mine = everyone if self.subject is None else everyone[self.recordings.subject == self.subject]
        if not len(mine):
            raise UsageError(f"the recordings have no subject {self.subject}")
        timed = self.recordings.t is not None
        if self.recordings.t is not None and not (np.diff(self.recordings.t) > 0).all():
            raise UsageError(f"t must ascend, a time for each of {len(self.recordings.rows)} rows")
        if self.scenes and timed:
            raise UsageError("scenes are for recordings without times; these are played in the order of theirs")
        if self.skip >= (len(self.recordings.rows) if timed else 1):
            has = f"{len(self.recordings.rows)} rows" if timed else "no times, so each begins anywhere"
            raise UsageError(f"skip = {self.skip}: the recordings have {has}")
        self._recordings_by_scene = [
            (scene.from_row, self._select_recordings(scene, mine)) for scene in self.scenes
        ] or [(1, mine)]

    def _select_recordings(self, scene: RecordingFilter, candidates: NDArray[np.int64]) -> NDArray[np.int64]:
        said = self.recordings.columns.get(scene.column)
        if said is None or len(said) != len(self.recordings.label):
            raise UsageError(f"the recordings have no column {scene.column!r}, which the scenes choose by")
        found: NDArray[np.int64] = candidates[said[candidates].astype(np.str_) == scene.value]
        if not len(found):
            raise UsageError(f"no recording has {scene.column} = {scene.value!r}")
        return found

    def iter_items(self, after: int = 0) -> Iterator[PlaylistItem]:
        """The parts that hold rows after row `after`."""
        every = self._iter_timed() if self.recordings.t is not None else self._iter_shuffled()
        return (part for part in every if part.last > after)

    def source_rows(self, rows: int) -> NDArray[np.int64]:
        """(rows,) which row of the recordings each of the first rows of the replay is."""
        found, have = list[NDArray[np.int64]](), 0
        for part in self.iter_items():
            if have >= rows:
                break
            found.append(np.arange(part.start, part.start + part.n, dtype=np.int64))
            have += part.n
        return np.concatenate(found)[:rows]

    def _iter_shuffled(self) -> Iterator[PlaylistItem]:
        first, offset, turn = 1, 0.0, 0
        while True:
            rng = np.random.default_rng([self.seed, turn])
            chosen, until = self._find_scene(first)
            for r in rng.permutation(chosen):
                begin, end = int(self.recordings.starts[r]), int(self.recordings.starts[r + 1])
                start = begin + int(rng.integers(0, min(_MAX_SKIP_ROWS, end - begin)))
                part = PlaylistItem(
                    first, start, min(end - start, until - first), int(self.recordings.label[r]), offset
                )
                yield part
                first = part.last + 1
                offset += part.n / self.recordings.rate + _PAUSE_S
                if first == until:
                    break
            turn += 1

    def _find_scene(self, row: int) -> tuple[NDArray[np.int64], int]:
        """The recordings of the scene at `row`, and the row from which the next one is on."""
        at = max(
            i
            for i, (begin, _) in enumerate(self._recordings_by_scene)
            if begin <= max(row, self._recordings_by_scene[0][0])
        )
        until = self._recordings_by_scene[at + 1][0] if at + 1 < len(self._recordings_by_scene) else 2**62
        return self._recordings_by_scene[at][1], until

    def _iter_timed(self) -> Iterator[PlaylistItem]:
        t, starts = self.recordings.t, self.recordings.starts
        assert t is not None
        again_s = math.ceil((float(t[-1] - t[0]) + 1 / self.recordings.rate) / _WEEK_S) * _WEEK_S
        first, turn, skip = 1, 0, self.skip
        while True:
            for r in self._recordings_by_scene[0][1]:
                start, end = max(int(starts[r]), skip), int(starts[r + 1])
                if start < end:
                    yield PlaylistItem(first, start, end - start, int(self.recordings.label[r]), float(turn * again_s))
                    first += end - start
            turn, skip = turn + 1, 0
