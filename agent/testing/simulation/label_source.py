"""Labels of simulated devices: from a column of the recording, wrong ones while an event says so."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from agent.testing.simulation.feed import Block
from agent.testing.simulation.scenario import LateLabels, Scenario, WrongLabels
from agent.testing.simulation.setup import Setup


class LabelSource:
    """Labels of all devices of a scenario."""

    def __init__(self, scenario: Scenario, setup: Setup) -> None:
        self._scenario, self._setup = scenario, setup
        self._rng = random.Random(f"labels/{scenario.seed}")
        names = scenario.device_names()
        self._distorted = [
            (event, {*scenario.select(event, names)}) for event in scenario.events if isinstance(event, WrongLabels)
        ]

    def find(self, device: str, stream: str, block: Block) -> list[tuple[str, int, float, Any]]:
        """Return task, row index, delay and value of each label of a block."""
        chosen = []
        for task, settings in self._scenario.labels.items():
            if self._setup.config.tasks[task].stream != stream:
                continue
            values = _read_values(self._setup.recordings[stream].recordings, settings, block)
            for i in range(-block.first % settings.every, len(block.due_s), settings.every):
                if (value := values[i]) is not None:
                    value = self._distort(device, task, value, float(block.due_s[i]), stream)
                    chosen.append((task, i, float(settings.delay), value))
        return chosen

    def _distort(self, device: str, task: str, value: Any, now_s: float, stream: str) -> Any:
        """Return another label than the recording's while an event says so."""
        for event, devices in self._distorted:
            if event.task != task or not event.at <= now_s < event.end_s:
                continue
            if device not in devices or self._rng.random() >= event.share:
                continue
            if isinstance(value, str):
                others = [name for name in self._setup.recordings[stream].recordings.labels if name != value]
                return self._rng.choice(others) if others else value
            return value * 2
        return value


def _read_values(recordings: Any, settings: LateLabels, block: Block) -> list[Any]:
    """Return the label of each row of a block; None where the recording has none."""
    rows = block.source_rows
    if settings.column == "label" and recordings.labels:
        codes = recordings.label[np.searchsorted(recordings.starts, rows, side="right") - 1]
        return [recordings.labels[code] for code in codes]
    column = recordings.columns.get(settings.column)
    if column is None and settings.column in recordings.fields:
        column = recordings.rows[:, recordings.fields.index(settings.column)]
    if column is None or len(column) != len(recordings.rows):
        return [None] * len(rows)
    return [None if value != value else value for value in column[rows].tolist()]
