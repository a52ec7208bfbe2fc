"""Serving: which bundle answers for a task while another one is tried. Memory follows what was committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from outstation.device.batch_parts.drift_state import RestoredDrift
from outstation.device.bundles.rollout_state import HoldOff, RolloutState
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.pipeline.tasks import Runtime, ScheduledTask
from outstation.device.rollout import saved_drift
from outstation.device.rollout.canary import CanaryRun
from outstation.device.rollout.state_machine import BundleAssessment
from outstation.device.rollout.supply import BundleSupply
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import BadBundle, ConfigError
from outstation.ml.model.activation import ProvenBundle
from outstation.protocol.wire.desired_state import CanaryRules


class TaskFactory(Protocol):
    """Factory of tasks from proven bundles."""

    def start(self, name: str, proven: ProvenBundle, rules: CanaryRules | None = None) -> LoadedTask:
        """Start the model, as a candidate within the timeout of `rules`. Raises BadBundle, ConfigError."""
        ...

    def stop(self, task: LoadedTask) -> None:
        """End the task's own process, if it has one."""
        ...


class TaskRollout(msgspec.Struct):
    """Roll-out of a task in memory. `canary` is set while a bundle is tried, as a shadow or as the canary.

    `proven` is the verified bundle of the next step. `load_failure` says why a proven bundle could not be loaded.
    """

    name: str
    supply: BundleSupply
    state: RolloutState | None
    hold_offs: dict[str, HoldOff]
    configured_digest: str
    canary: CanaryRun | None = None
    proven: ProvenBundle | None = None
    load_failure: BundleAssessment | None = None
    retry_at_s: float = 0.0


class ServingManager:
    """Manager of the tasks of one device. `schedule` makes a scheduled task of one that did not run before."""

    def __init__(
        self,
        store: Store,
        message_log: MessageLog,
        runtime: Runtime,
        factory: TaskFactory,
        schedule: Callable[[LoadedTask], ScheduledTask],
    ) -> None:
        self._store, self._message_log, self._runtime = store, message_log, runtime
        self.factory, self._schedule = factory, schedule

    def find_task(self, name: str) -> LoadedTask | None:
        """Return the task that answers."""
        scheduled = self._runtime.find(name)
        return None if scheduled is None else scheduled.task

    def find_running_digest(self, rollout: TaskRollout) -> str:
        """Return the digest of the bundle that answers, or would without a canary; "" for none."""
        canary = rollout.canary
        task = canary.incumbent if canary is not None and canary.is_serving else self.find_task(rollout.name)
        return "" if task is None else task.bundle.digest

    def find_incumbent(self, rollout: TaskRollout) -> LoadedTask | None:
        """Return the task that a canary's end brings back. A canary not loaded since the start did not replace it."""
        return self.find_task(rollout.name) if rollout.canary is None else rollout.canary.incumbent

    def replace_task(self, name: str, task: LoadedTask | None) -> None:
        if task is None:
            self._runtime.remove(name)
        else:
            self._runtime.replace_task(task, self._schedule)

    def reconcile(self, rollout: TaskRollout, now: ClockReading) -> None:
        """Start what should run by the task's state and does not yet, as after a start."""
        state, proven = rollout.state, rollout.proven
        if state is None or state.phase not in ("shadow", "canary"):
            return
        try:
            if rollout.canary is None and proven is not None:
                candidate = self.factory.start(rollout.name, proven, state.desired.rules)
                if state.phase == "canary":
                    self._serve_candidate(rollout, candidate, state)
                else:
                    rollout.canary = CanaryRun(candidate, self.find_task(rollout.name), state, self._store)
        except (BadBundle, ConfigError) as problem:
            detail = f"it was verified, but cannot be started: {problem}"
            rollout.load_failure = BundleAssessment("incompatible", detail)
            return
        if rollout.canary is not None:
            rollout.canary.rules = state.desired.rules
            if state.phase == "shadow":
                task = self.find_task(rollout.name)
                if task is not None and rollout.canary not in task.parts:
                    if task is not rollout.canary.incumbent:
                        rollout.canary.replace_incumbent(task, self._store)
                    task.attach(rollout.canary)

    def start_canary(self, rollout: TaskRollout, candidate: LoadedTask, now: ClockReading) -> None:
        """Let the candidate answer from now on, with the previous bundle as its shadow."""
        state, incumbent = rollout.state, self.find_task(rollout.name)
        assert state is not None
        if rollout.canary is not None:
            rollout.canary.finish(self._store, self._message_log, now, final=True)
            if incumbent is not None:
                incumbent.detach(rollout.canary)
        if candidate.drift is not None:
            # Its messages and its basis were committed with the step.
            candidate.drift.replace_state(candidate.drift.state)
        self._serve_candidate(rollout, candidate, state)

    def _serve_candidate(self, rollout: TaskRollout, candidate: LoadedTask, state: RolloutState) -> None:
        rollout.canary = CanaryRun(candidate, self.find_task(rollout.name), state, self._store)
        candidate.attach(rollout.canary)
        self.replace_task(rollout.name, candidate)

    def finish_canary(self, rollout: TaskRollout, replacement: LoadedTask | None, now: ClockReading) -> None:
        """End a canary. `replacement` is the same bundle as the active one; without it the previous one answers."""
        incumbent = self.find_incumbent(rollout)
        if replacement is None and incumbent is not None:
            saved_drift.take_over(incumbent, self._store)
        canary, rollout.canary = rollout.canary, None
        if canary is None:
            return
        canary.finish(self._store, self._message_log, now, final=True)
        candidate = canary.candidate
        candidate.detach(canary)
        if replacement is not None:
            if replacement.drift is not None and candidate.drift is not None:
                replacement.drift.take_over(RestoredDrift(candidate.drift.monitor, candidate.drift.state))
            replacement.results.last_label = candidate.results.last_label
        if rollout.state is not None and rollout.state.phase == "shadow":
            rollout.canary = CanaryRun(candidate, incumbent, rollout.state, self._store)
        else:
            self.factory.stop(candidate)
        self.replace_task(rollout.name, replacement or incumbent)

    def stop_run(self, rollout: TaskRollout, now: ClockReading, *, final: bool = True) -> None:
        """End a trial; unless `final` it continues at the next start of the daemon."""
        canary, rollout.canary = rollout.canary, None
        if canary is None:
            return
        canary.finish(self._store, self._message_log, now, final=final)
        self.factory.stop(canary.candidate)
        for task in (canary.incumbent, self.find_task(rollout.name)):
            if task is not None:
                task.detach(canary)
