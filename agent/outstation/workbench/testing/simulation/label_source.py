"""Labels of simulated devices: from a column of the recording, wrong ones while an event says so."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Ints
from outstation.foundation.errors import UsageError
from outstation.foundation.indices import repeat
from outstation.ml.datasets.tables import MISSING_VALUES
from outstation.workbench.testing.simulation import feed
from outstation.workbench.testing.simulation.feed import Block, RecordingFile
from outstation.workbench.testing.simulation.scenario import Scenario, WrongLabels
from outstation.workbench.testing.simulation.setup import Setup


class LabelColumn(msgspec.Struct, frozen=True, eq=False):
    """Labels of the rows of a recording: `values` (n,), NaN for none; or codes of `names`, -1 for none."""

    values: NDArray[Any]
    names: list[str]

    def select(self, rows: Ints) -> list[Any]:
        """Return the label of each of these rows; None where there is none."""
        chosen = self.values[rows].tolist()
        if self.names:
            return [None if code < 0 else self.names[code] for code in chosen]
        return [None if value != value else value for value in chosen]


class LabelSource:
    """Labels of all devices of a scenario."""

    def __init__(self, scenario: Scenario, setup: Setup) -> None:
        """Load the labels. Raises UsageError if a recording has none."""
        self._scenario, self._setup = scenario, setup
        self._rng = random.Random(f"labels/{scenario.seed}")
        names = scenario.device_names()
        self._distorted = [
            (event, {*scenario.select(event, names)}) for event in scenario.events if isinstance(event, WrongLabels)
        ]
        self._columns = {
            task: _load_column(setup.recordings[setup.config.tasks[task].stream], settings.column)
            for task, settings in scenario.labels.items()
        }

    def find(self, device: str, stream: str, block: Block) -> list[tuple[str, int, float, Any]]:
        """Return task, row index, delay and value of each label of a block."""
        chosen = []
        for task, settings in self._scenario.labels.items():
            if self._setup.config.tasks[task].stream != stream:
                continue
            indices = np.arange(-block.first % settings.every, len(block.due_s), settings.every)
            values = self._columns[task].select(block.source_rows[indices])
            for i, value in zip(indices.tolist(), values, strict=True):
                if value is not None:
                    value = self._distort(device, task, value, float(block.due_s[i]))
                    chosen.append((task, i, float(settings.delay), value))
        return chosen

    def _distort(self, device: str, task: str, value: Any, now_s: float) -> Any:
        """Return another label than the recording's while an event says so."""
        for event, devices in self._distorted:
            if event.task != task or not event.at <= now_s < event.end_s:
                continue
            if device not in devices or self._rng.random() >= event.share:
                continue
            if isinstance(value, str):
                others = [name for name in self._columns[task].names if name != value]
                return self._rng.choice(others) if others else value
            return value * 2
        return value


def _load_column(file: RecordingFile, column: str) -> LabelColumn:
    """Return the labels of a recording. Raises UsageError."""
    recordings = file.recordings
    n = len(recordings.rows)
    if column == "label" and recordings.labels:
        return LabelColumn(repeat(recordings.label, np.diff(recordings.starts)), recordings.labels)
    values = recordings.columns.get(column)
    if values is None and column in recordings.fields:
        values = recordings.rows[:, recordings.fields.index(column)]
    if values is None and file.path.suffix != ".npz":
        return _encode_texts(feed.load_texts(file, column))
    if values is None or len(values) != n:
        raise UsageError(f"{file.path}: has no column {column!r} for labels, with a value for each of its {n} rows")
    return LabelColumn(values, [])


def _encode_texts(texts: list[str]) -> LabelColumn:
    """Return labels as numbers, if some have decimals and all are numbers, or as names of classes."""
    with suppress(ValueError):
        numbers = np.array([float("nan") if text in MISSING_VALUES else float(text) for text in texts])
        if not np.array_equal(numbers, np.rint(numbers), equal_nan=True):
            return LabelColumn(numbers, [])
    names = sorted({*texts} - {*MISSING_VALUES})
    if not names:
        return LabelColumn(np.full(len(texts), np.nan), [])
    codes = {name: code for code, name in enumerate(names)}
    return LabelColumn(np.array([codes.get(text, -1) for text in texts]), names)
