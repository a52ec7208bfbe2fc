"""Which bundle answers for a task while another one is tried: what is in memory, after what was committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from agent.clock import ClockReading
from agent.device.bundles.rollout_state import HoldOff, RolloutState
from agent.device.pipeline.loaded_task import LoadedTask
from agent.device.pipeline.tasks import Runtime, ScheduledTask
from agent.device.rollout import saved_drift
from agent.device.rollout.state_machine import BundleAssessment
from agent.device.rollout.supply import BundleSupply
from agent.device.rollout.trial import CanaryRun
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.errors import BadBundle, ConfigError
from agent.model.activation import ProvenBundle
from agent.wire.desired_state import CanaryRules


class TaskFactory(Protocol):
    """A bundle that proved itself, as a task of this device."""

    def load_in_process(self, name: str, proven: ProvenBundle) -> LoadedTask:
        """Loaded into this process. Raises BadBundle, ConfigError."""
        ...

    def start_subprocess(self, name: str, proven: ProvenBundle, rules: CanaryRules) -> LoadedTask:
        """In a process of its own, within the time that the rules allow. Raises BadBundle, ConfigError."""
        ...

    def stop(self, task: LoadedTask) -> None:
        """End a process of its own, if it has one."""
        ...


class TaskRollout(msgspec.Struct):
    """A task's roll-out in memory. `trial` runs while a bundle is tried, `proof` is of the bundle it is about.

    `unfit`: why a bundle that proved itself could not be made to run after all.
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
    """Of one device. `plan` says when a task is due that did not run."""

    def __init__(
        self,
        store: Store,
        author: MessageLog,
        machine: Runtime,
        factory: TaskFactory,
        plan: Callable[[LoadedTask], ScheduledTask],
    ) -> None:
        self._store, self._author, self._machine, self.factory, self._plan = store, author, machine, factory, plan

    def find_task(self, name: str) -> LoadedTask | None:
        """The one that answers."""
        planned = self._machine.find(name)
        return None if planned is None else planned.task

    def find_running_digest(self, rollout: TaskRollout) -> str:
        """The digest of the bundle that answers, or would if none were on probation; "" for none."""
        task = (
            rollout.canary.incumbent
            if rollout.canary is not None and rollout.canary.is_serving
            else self.find_task(rollout.name)
        )
        return "" if task is None else task.bundle.digest

    def replace_task(self, name: str, task: LoadedTask | None) -> None:
        if task is None:
            self._machine.remove(name)
        else:
            self._machine.replace_task(task, self._plan)

    def reconcile(self, rollout: TaskRollout, now: ClockReading) -> None:
        """What should run by how the task stands and does not yet, as after a start."""
        one, proof = rollout.state, rollout.proven
        if one is None or one.phase not in ("shadow", "probation"):
            return
        try:
            if rollout.canary is None and proof is not None:
                candidate = self.factory.start_subprocess(rollout.name, proof, one.desired.rules)
                if one.phase == "probation":
                    self._serve_candidate(rollout, candidate, one)
                else:
                    rollout.canary = CanaryRun(candidate, self.find_task(rollout.name), one, self._store)
        except (BadBundle, ConfigError) as problem:
            rollout.load_failure = BundleAssessment(
                "unfit", f"it proved itself, and then could not be started: {problem}"
            )
            return
        if rollout.canary is not None:
            rollout.canary.rules = one.desired.rules
            if one.phase == "shadow":
                self._attach_shadow(rollout, rollout.canary)

    def _attach_shadow(self, rollout: TaskRollout, canary: CanaryRun) -> None:
        """Beside whatever answers: an operator's command may have exchanged it."""
        task = self.find_task(rollout.name)
        if task is None or task.batch_observer is canary:
            return
        if task is not canary.incumbent:
            canary.replace_incumbent(task, self._store)
        task.batch_observer = canary

    def start_canary(self, rollout: TaskRollout, candidate: LoadedTask, now: ClockReading) -> None:
        """Probation: the candidate answers from now on, and what answered until now beside it."""
        one, steady = rollout.state, self.find_task(rollout.name)
        assert one is not None
        if rollout.canary is not None:
            rollout.canary.finish(self._store, self._author, now, final=True)
        if steady is not None:
            steady.batch_observer = None
        if candidate.drift_monitor is not None:
            fresh = candidate.drift_monitor.start()
            candidate.drift_state = saved_drift.continue_alert_numbers(fresh, steady.drift_state if steady else None)
            candidate.closing_messages = None
        self._serve_candidate(rollout, candidate, one)

    def _serve_candidate(self, rollout: TaskRollout, candidate: LoadedTask, state: RolloutState) -> None:
        rollout.canary = CanaryRun(candidate, self.find_task(rollout.name), state, self._store)
        candidate.batch_observer = rollout.canary
        self.replace_task(rollout.name, candidate)

    def finish_canary(self, rollout: TaskRollout, replacement: LoadedTask | None, now: ClockReading) -> None:
        """After probation: `made`, the same bundle in this process, or the one before."""
        trial, rollout.canary = rollout.canary, None
        if trial is None:
            return
        trial.finish(self._store, self._author, now, final=True)
        candidate, steady = trial.candidate, trial.incumbent
        candidate.batch_observer = None
        if replacement is not None:
            replacement.drift_state, replacement.closing_messages, replacement.last_label = (
                candidate.drift_state,
                None,
                candidate.last_label,
            )
        elif steady is not None and steady.drift_state is not None:
            steady.drift_state = saved_drift.continue_alert_numbers(steady.drift_state, candidate.drift_state)
        if rollout.state is not None and rollout.state.phase == "shadow":
            rollout.canary = CanaryRun(candidate, steady, rollout.state, self._store)
        else:
            self.factory.stop(candidate)
        self.replace_task(rollout.name, replacement or steady)

    def stop_run(self, rollout: TaskRollout, now: ClockReading, *, final: bool = True) -> None:
        """Nothing is tried any more; not `over`: until the agent starts again."""
        trial, rollout.canary = rollout.canary, None
        if trial is None:
            return
        trial.finish(self._store, self._author, now, final=final)
        self.factory.stop(trial.candidate)
        for task in (trial.incumbent, self.find_task(rollout.name)):
            if task is not None and task.batch_observer is trial:
                task.batch_observer = None
