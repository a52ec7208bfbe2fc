"""Smartwatch recordings of the three people outside the shipped model's training set.

A recording lasts eight minutes, and a site learns for 27. Recordings therefore repeat, each time in another order and
from another row, so that a site is watched on data it has learned from. With `halves`, a site learns from the first
half of each recording and is watched on the second half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.device.intake.sources.recordings import Playlist, PlaylistItem
from outstation.ml.datasets.recordings import Recordings, load
from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, MonitorSettings, Reference
from outstation.ml.drift.detectors.detector import JOINT, OUTPUT, SCORE
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.inference import features, runtime, scores
from outstation.protocol.alerts.alert import Alert
from outstation.workbench.simulate.scenario import SCENARIOS
from scripts.benchmarks.drift_peers.counting import Flags, Row, raised

PEOPLE = (8, 9, 10)
SEEDS = 12
LEARN, QUIET, WATCHED = 40, 60, 20  # drift windows
ROWS, WINDOW = 100, 20  # rows of a model window, and model windows of a drift window
PART = WINDOW * ROWS
FIELDS = 6
SLOWER = 0.8  # factor on the sensor's rate
UNITS = ("g", "g", "g", "rad/s", "rad/s", "rad/s")

Floats = NDArray[np.float32]


class Change(msgspec.Struct, frozen=True):
    """A change: `of` transforms the rows of a recording; a detection must name one of `subjects`."""

    name: str
    subjects: tuple[int, ...]
    transform: Callable[[Floats], Floats]
    rate: float = 1.0  # factor on the recordings' rate


def changes(axis: int, sd: Floats) -> tuple[Change, ...]:
    """Return the changes of field `axis`, scaled by the `sd` (F,) of the learning data."""
    other = axis // 3 * 3 + (axis + 1) % 3
    noise = np.random.default_rng(axis)

    def gain(rows: Floats) -> Floats:
        return np.where(np.arange(FIELDS) == axis, 0.6 * rows, rows)

    def bias(rows: Floats) -> Floats:
        return np.where(np.arange(FIELDS) == axis, rows + 0.5 * sd, rows)

    def swap(rows: Floats) -> Floats:
        order = np.arange(FIELDS)
        order[[axis, other]] = other, axis
        return rows[:, order]

    def noisy(rows: Floats) -> Floats:
        return np.where(np.arange(FIELDS) == axis, rows + 0.5 * sd * noise.normal(size=rows.shape), rows)

    everything = tuple(range(FIELDS + 4))  # any subject counts, the rate included
    return (
        Change("gain × 0.6", (axis,), gain),
        Change("bias 0.5 sd", (axis,), bias),
        Change("swapped axes", (axis, other), swap),
        Change("noise 0.5 sd", (axis,), noisy),
        Change("clock × 0.8", everything, slower, SLOWER),
    )


def slower(rows: Floats) -> Floats:
    """Resample to a sensor at SLOWER times the rate."""
    at = np.arange(0, len(rows) - 1, 1 / SLOWER)
    below = at.astype(np.int64)
    share = (at - below)[:, None].astype(np.float32)
    return (1 - share) * rows[below] + share * rows[below + 1]


class Stream(msgspec.Struct, frozen=True):
    """Rows (n, F) at `t` (n,) epoch µs: whole model windows of consecutive recordings."""

    rows: Floats
    t: NDArray[np.int64]

    @classmethod
    def from_recording(
        cls, recordings: Recordings, parts: Iterator[PlaylistItem], windows: int, change: Change | None = None
    ) -> Stream:
        """Return the next drift windows; an incomplete rest of the last recording is dropped."""
        rows, t, count = [], [], 0
        every = 1 / recordings.rate / (1.0 if change is None else change.rate)
        while count < windows * PART:
            part = next(parts)
            read = recordings.rows[part.start : part.start + part.n]
            read = read if change is None else change.transform(read)
            whole = len(read) // ROWS * ROWS
            rows.append(read[:whole])
            t.append((1e6 * (part.offset_s + every * np.arange(whole))).astype(np.int64))
            count += whole
        return cls(np.concatenate(rows)[: windows * PART].astype(np.float32), np.concatenate(t)[: windows * PART])


class Watch:
    """The shipped bundle with its drift monitor."""

    def __init__(self) -> None:
        self._bundle = bundle.read(builtin.bundles_dir() / "exercise", builtin.publisher_keys())
        self._model = runtime.TfliteModel(self._bundle.model_bytes)
        self.judge = DriftMonitor(MonitorSettings(
            Reference.from_json(self._bundle.files["reference.json"]),
            labels=self._bundle.manifest.output.labels, window=WINDOW, learn_windows=LEARN, units=UNITS,
        ))  # fmt: skip
        self.subjects = {name: i for i, name in enumerate((*self.judge.shipped.fields, OUTPUT, SCORE, JOINT))}

    def step(self, state: DriftState, stream: Stream) -> tuple[DriftState, list[DriftWindowResult]]:
        spec, starts = self._bundle.manifest, np.arange(0, len(stream.rows), ROWS)
        windows = features.build_windows(stream.rows, starts, spec.input)
        predictions = scores.from_outputs(self._model.invoke(windows), spec, windows)
        assert predictions.label is not None
        assert predictions.score is not None
        first = max(0, state.last_counted_row) + 1
        return self.judge.process_batch(
            state, stream.rows, starts, ROWS, predictions.label, predictions.score[:, None].astype(np.float32),
            rows=(first, first + len(stream.rows) - 1), t=stream.t,
        )  # fmt: skip

    def flags(self, state: DriftState, stream: Stream) -> Flags:
        return raised(self.step(state, stream)[1], self.subjects)


def row(name: str, seeds: int = SEEDS, *, halves: bool = False, quiet: int = QUIET) -> Row:
    """Run several sites for each of the PEOPLE; the changed field rotates."""
    watch, row = Watch(), Row(name)
    everyone = load(SCENARIOS["exercise"].file)
    seen, unseen = (half(everyone, 0), half(everyone, 1)) if halves else (everyone, everyone)
    for seed in range(seeds):
        for person in PEOPLE:
            site(watch, row, (seen, unseen), person, seed, quiet)
    return row


def site(watch: Watch, row: Row, played: tuple[Recordings, Recordings], person: int, seed: int, quiet: int) -> None:
    seen, unseen = played
    learning = Stream.from_recording(seen, Playlist(seen, person, seed).iter_items(), LEARN)
    learned, _ = watch.step(watch.judge.start(), learning)
    assert learned.site_reference is not None, "it did not learn"

    def after() -> Iterator[PlaylistItem]:
        later = Playlist(unseen, person, seed if unseen is seen else seed + SEEDS).iter_items(len(learning.rows) + PART)
        next(later)  # drift windows begun
        return later

    row.add_quiet(watch.flags(learned, Stream.from_recording(unseen, after(), quiet)))
    for change in changes((seed + person) % FIELDS, learning.rows.std(0)):
        row.add(
            change.name, watch.flags(learned, Stream.from_recording(unseen, after(), WATCHED, change)), change.subjects
        )


# What a faulty watch makes of rows (n, FIELDS): a gyroscope channel that sticks, a weak accelerometer.
FAULTY: dict[str, Callable[[Floats], Floats]] = {
    "none": lambda rows: rows,
    "stuck wy": lambda rows: np.where(np.arange(FIELDS) == 4, np.float32(0.25), rows),
    "weak ax, ay, az": lambda rows: np.where(np.arange(FIELDS) < 3, np.float32(0.6), np.float32(1.0)) * rows,
}


def mixed_alerts(watch: Watch, seed: int, fault: str, windows: int = QUIET) -> list[Alert]:
    """Return the alerts of a site where many people exercise, from row 130,000 on with a fault of FAULTY."""
    everyone = load(SCENARIOS["exercise"].file)
    learning = Stream.from_recording(everyone, Playlist(everyone, None, seed).iter_items(), 65)
    state, _ = watch.step(watch.judge.start(), learning)
    assert state.site_reference is not None, "it did not learn"
    later = Playlist(everyone, None, seed).iter_items(len(learning.rows) + PART)
    next(later)  # drift windows begun
    stream = Stream.from_recording(everyone, later, windows)
    faulty, alerts = FAULTY[fault](stream.rows).astype(np.float32), []
    for at in range(0, len(faulty), 3 * PART):
        part = Stream(faulty[at : at + 3 * PART], stream.t[at : at + 3 * PART])
        state, results = watch.step(state, part)
        alerts += [alert for result in results for alert in result.alerts]
    return alerts


def half(recordings: Recordings, which: int) -> Recordings:
    """Return the first or the second half of each recording."""
    begin, end = recordings.starts[:-1], recordings.starts[1:]
    middle = (begin + end) // 2
    spans = zip(*((begin, middle) if which == 0 else (middle, end)), strict=True)
    parts = [recordings.rows[a:b] for a, b in spans]
    return replace(
        recordings, rows=np.concatenate(parts), starts=np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    )
