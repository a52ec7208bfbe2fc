"""Device whose task has a shadow, without a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.bootstrap.assembly import assemble_task
from outstation.device.rollout.shadow import ShadowRunner
from outstation.foundation.clock import ClockReading
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.protocol.wire.messages import ShadowPayload
from outstation.workbench.testing.patience import wait_until
from scripts.kit.bundles import Recipe
from tests.kit.devices import NOW, Device


class ShadowDevice:
    """A device whose task runs `active`, with `other` as the shadow in its own process."""

    def __init__(self, folder: Path, recipe: Recipe, active: LoadedBundle, other: Bundle, **options: Any) -> None:
        self.device = Device(folder, recipe, active)
        self.model = SubprocessModel(other, call_timeout_s=options.pop("call_timeout_s", 5.0))
        self.other, self.options = other, {"min_batches": 1, **options}
        self.observed: list[tuple[Any, InferenceResult]] = []
        self.runner = self.begin()
        wait_until("the other bundle has started", self.model.poll_ready)

    def begin(self) -> ShadowRunner:
        device = self.device
        self.task = assemble_task(
            TaskPlan.from_bundle("tiny", device.task.config, device.stream, self.other, self.model, "sha256:c")
        )
        return ShadowRunner(device.task, self.task, "better", device.store, **self.options)

    def close(self) -> None:
        self.model.close()
        self.device.store.close()

    def batch(self, values: np.ndarray, at_s: float = 100.0, *, wait: bool = True) -> InferenceResult | None:
        """Feed and run a batch, pass it to the shadow, and wait for its answer (`hear`). Return the task's result."""
        observed = self.observed = []
        self.device.feed(values)
        self.device.task.attach(Recorder(observed))
        self.device.run()
        for batch, answers in observed:
            self.runner.submit_batch(self.device.store, batch, answers)
        if wait:
            wait_until("it answered", lambda: self.runner.poll(0.05))
        self.turn(at_s)
        return observed[0][1] if observed else None

    def turn(self, at_s: float = 100.0) -> bool:
        return self.runner.tick(self.device.store, self.device.author, ClockReading(NOW.wall_us, at_s, "synced"))

    def shadows(self) -> list[ShadowPayload]:
        return [m.body for m in self.device.messages() if isinstance(m.body, ShadowPayload)]


class Recorder(BatchPart):
    """A part of a batch that keeps the rows and answers of every committed one."""

    def __init__(self, observed: list[tuple[Any, InferenceResult]]) -> None:
        self._observed = observed

    def follow(self, batch: Batch, results: InferenceResult) -> None:
        self._observed.append((batch.rows, results))
