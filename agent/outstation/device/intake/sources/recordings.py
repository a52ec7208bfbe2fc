"""Playlist of a replay: the endless order in which recordings are played.

Recordings without times are repeated, each pass in another order and each recording from another start, all from one
seed. Recordings with times, `t`, keep them: they are played completely and in order. A pass of a week or more is
repeated whole weeks later, one of a day or more whole days later, so that the time of day stays the same. A shorter one
is repeated at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.config.sources import RecordingFilter
from outstation.foundation.errors import UsageError
from outstation.ml.datasets.recordings import Recordings

_PAUSE_S = 5.0
_MAX_SKIP_ROWS = 100
_DAY_S = 86_400
_WEEK_S = 7 * _DAY_S


class PlaylistItem(msgspec.Struct, frozen=True):
    """Recording of a pass: rows `first`… of the replay (from 1) are rows `start`… of the recordings.

    `offset_s`: its begin after that of the replay; for recordings with times, what is added to these.
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
    """Endless order of the recordings of a subject (None: of all), from one seed.

    Each of the `scenes` selects recordings from its row on; `skip` omits the first rows of recordings with times.
    Raises UsageError if nothing is left.
    """

    recordings: Recordings
    subject: int | None
    seed: int
    scenes: Sequence[RecordingFilter] = ()
    skip: int = 0
    _recordings_by_scene: list[tuple[int, NDArray[np.int64]]] = field(init=False)

    def __post_init__(self) -> None:
        candidates = np.arange(len(self.recordings.label))
        if self.subject is not None:
            candidates = candidates[self.recordings.subject == self.subject]
        if not len(candidates):
            raise UsageError(f"the recordings have no subject {self.subject}")
        timed = self.recordings.t is not None
        if self.recordings.t is not None and not (np.diff(self.recordings.t) > 0).all():
            raise UsageError(f"t must ascend, a time for each of {len(self.recordings.rows)} rows")
        if self.scenes and timed:
            raise UsageError("scenes are for recordings without times; these have times and are played in order")
        if self.skip >= (len(self.recordings.rows) if timed else 1):
            content = f"{len(self.recordings.rows)} rows" if timed else "no times, so each begins anywhere"
            raise UsageError(f"skip = {self.skip}: the recordings have {content}")
        selected = [(scene.from_row, self._select_recordings(scene, candidates)) for scene in self.scenes]
        self._recordings_by_scene = selected or [(1, candidates)]

    def _select_recordings(self, scene: RecordingFilter, candidates: NDArray[np.int64]) -> NDArray[np.int64]:
        column = self.recordings.columns.get(scene.column)
        if column is None or len(column) != len(self.recordings.label):
            raise UsageError(f"the recordings have no column {scene.column!r}, by which a scene selects")
        selected: NDArray[np.int64] = candidates[column[candidates].astype(np.str_) == scene.value]
        if not len(selected):
            raise UsageError(f"no recording has {scene.column} = {scene.value!r}")
        return selected

    def iter_items(self, after: int = 0) -> Iterator[PlaylistItem]:
        """Yield the items with rows after row `after`."""
        items = self._iter_timed() if self.recordings.t is not None else self._iter_shuffled()
        return (item for item in items if item.last > after)

    def source_rows(self, rows: int) -> NDArray[np.int64]:
        """Return the row of the recordings (rows,) of each of the first rows of the replay."""
        indices, count = list[NDArray[np.int64]](), 0
        for item in self.iter_items():
            if count >= rows:
                break
            indices.append(np.arange(item.start, item.start + item.n, dtype=np.int64))
            count += item.n
        return np.concatenate(indices)[:rows]

    def _iter_shuffled(self) -> Iterator[PlaylistItem]:
        first, offset, pass_number = 1, 0.0, 0
        while True:
            rng = np.random.default_rng([self.seed, pass_number])
            scenes = self._recordings_by_scene
            at = max(i for i, (begin, _) in enumerate(scenes) if begin <= max(first, scenes[0][0]))
            selected, until = scenes[at][1], scenes[at + 1][0] if at + 1 < len(scenes) else 2**62
            for r in rng.permutation(selected):
                begin, end = int(self.recordings.starts[r]), int(self.recordings.starts[r + 1])
                start = begin + int(rng.integers(0, min(_MAX_SKIP_ROWS, end - begin)))
                n = min(end - start, until - first)
                yield PlaylistItem(first, start, n, int(self.recordings.label[r]), offset)
                first += n
                offset += n / self.recordings.rate + _PAUSE_S
                if first == until:
                    break
            pass_number += 1

    def _iter_timed(self) -> Iterator[PlaylistItem]:
        t, starts = self.recordings.t, self.recordings.starts
        assert t is not None
        period_s = _compute_period(t)
        first, pass_number, skip = 1, 0, self.skip
        while True:
            for r in self._recordings_by_scene[0][1]:
                start, end = max(int(starts[r]), skip), int(starts[r + 1])
                if start < end:
                    offset_s = float(pass_number * period_s)
                    yield PlaylistItem(first, start, end - start, int(self.recordings.label[r]), offset_s)
                    first += end - start
            pass_number, skip = pass_number + 1, 0


def _compute_period(t: NDArray[np.float64]) -> float:
    """Return the seconds from the begin of a pass to that of the next one."""
    span_s = float(t[-1] - t[0]) + (float(np.median(np.diff(t))) if len(t) > 1 else 1.0)
    unit_s = next((unit_s for unit_s in (_WEEK_S, _DAY_S) if span_s >= unit_s), None)
    return span_s if unit_s is None else float(math.ceil(span_s / unit_s) * unit_s)
