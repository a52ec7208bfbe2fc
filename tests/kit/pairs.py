"""A device whose task has another bundle beside it, without a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agent.clock import Now
from agent.device.pipeline.batch import Task
from agent.device.rollout.shadow import Beside
from agent.model.activation import Active
from agent.model.bundle.bundle import Bundle
from agent.model.inference.inference import Answers
from agent.model.sandbox.subprocess_model import Apart, Bounds
from agent.wire.messages import Shadow
from tests.kit.bundles import Recipe
from tests.kit.devices import NOW, Device
from tests.kit.stations import wait_for


class Pair:
    """A device whose task has another bundle beside it."""

    def __init__(self, folder: Path, recipe: Recipe, active: Active, other: Bundle, **options: Any) -> None:
        self.device = Device(folder, recipe, active)
        self.apart = Apart(other, None, options.pop("bounds", Bounds(call_s=5.0)))
        self.other, self.options = other, {"batches": 1, **options}
        self.looked: list[tuple[Any, Answers]] = []
        self.beside = self.begin()
        wait_for(self.apart.ready, "the other bundle has started")

    def begin(self) -> Beside:
        device = self.device
        self.task = Task("tiny", device.task.config, device.stream, self.other, self.apart, None, None, "sha256:c")
        return Beside(device.task, self.task, "better", device.store, **self.options)

    def close(self) -> None:
        self.apart.close()
        self.device.store.close()

    def batch(self, values: np.ndarray, at_s: float = 100.0, *, hear: bool = True) -> Answers | None:
        """Feed, run, commit, offer, and hear; what the task answered."""
        looked = self.looked = []
        self.device.feed(values)
        self.device.task.trying = Looking(looked)
        self.device.run()
        for taken, answers in looked:
            self.beside.offer(self.device.store, taken, answers)
        if hear:
            wait_for(lambda: self.beside.listen(0.05), "it answered")
        self.turn(at_s)
        return looked[0][1] if looked else None

    def turn(self, at_s: float = 100.0) -> bool:
        return self.beside.turn(self.device.store, self.device.author, Now(NOW.wall_us, at_s, "synced"))

    def shadows(self) -> list[Shadow]:
        return [m.body for m in self.device.messages() if isinstance(m.body, Shadow)]


class Looking:
    """What the task hands over with each batch."""

    def __init__(self, looked: list[tuple[Any, Answers]]) -> None:
        self._looked = looked

    def look(self, task: Task, answers: Answers) -> None: ...

    def write(self, tx: Any) -> None: ...

    def committed(self, task: Task, store: Any, taken: Any, answers: Answers) -> None:
        self._looked.append((taken, answers))
