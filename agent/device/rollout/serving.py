"""Which bundle answers for a task while another one is tried: what is in memory, after what was committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from agent.clock import Now
from agent.device.bundles.rollout_state import Held, Standing
from agent.device.pipeline.batch import Task
from agent.device.pipeline.tasks import Machine, Planned
from agent.device.rollout import saved_drift
from agent.device.rollout.state_machine import Finding
from agent.device.rollout.supply import Supply
from agent.device.rollout.trial import Trial
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.errors import BadBundle, ConfigError
from agent.model.activation import Proved
from agent.wire.desired_state import Rules


class Makes(Protocol):
    """A bundle that proved itself, as a task of this device."""

    def here(self, name: str, proved: Proved) -> Task:
        """Loaded into this process. Raises BadBundle, ConfigError."""
        ...

    def apart(self, name: str, proved: Proved, rules: Rules) -> Task:
        """In a process of its own, within the time that the rules allow. Raises BadBundle, ConfigError."""
        ...

    def end(self, task: Task) -> None:
        """End a process of its own, if it has one."""
        ...


class Live(msgspec.Struct):
    """A task's roll-out in memory. `trial` runs while a bundle is tried, `proof` is of the bundle it is about.

    `unfit`: why a bundle that proved itself could not be made to run after all.
    """

    name: str
    supply: Supply
    standing: Standing | None
    held: dict[str, Held]
    configured: str
    trial: Trial | None = None
    proof: Proved | None = None
    unfit: Finding | None = None
    rests_until_s: float = 0.0


class Serving:
    """Of one device. `plan` says when a task is due that did not run."""

    def __init__(
        self, store: Store, author: Author, machine: Machine, makes: Makes, plan: Callable[[Task], Planned]
    ) -> None:
        self._store, self._author, self._machine, self.makes, self._plan = store, author, machine, makes, plan

    def task(self, name: str) -> Task | None:
        """The one that answers."""
        planned = self._machine.find(name)
        return None if planned is None else planned.task

    def runs(self, live: Live) -> str:
        """The digest of the bundle that answers, or would if none were on probation; "" for none."""
        task = live.trial.steady if live.trial is not None and live.trial.serves else self.task(live.name)
        return "" if task is None else task.bundle.digest

    def exchange(self, name: str, task: Task | None) -> None:
        if task is None:
            self._machine.remove(name)
        else:
            self._machine.exchange(task, self._plan)

    def keep_up(self, live: Live, now: Now) -> None:
        """What should run by how the task stands and does not yet, as after a start."""
        one, proof = live.standing, live.proof
        if one is None or one.phase not in ("shadow", "probation"):
            return
        try:
            if live.trial is None and proof is not None:
                candidate = self.makes.apart(live.name, proof, one.wanted.rules)
                if one.phase == "probation":
                    self._serve(live, candidate, one)
                else:
                    live.trial = Trial(candidate, self.task(live.name), one, self._store)
        except (BadBundle, ConfigError) as problem:
            live.unfit = Finding("unfit", f"it proved itself, and then could not be started: {problem}")
            return
        if live.trial is not None:
            live.trial.rules = one.wanted.rules
            if one.phase == "shadow":
                self._look_on(live, live.trial)

    def _look_on(self, live: Live, trial: Trial) -> None:
        """Beside whatever answers: an operator's command may have exchanged it."""
        task = self.task(live.name)
        if task is None or task.trying is trial:
            return
        if task is not trial.steady:
            trial.stand_beside(task, self._store)
        task.trying = trial

    def begin(self, live: Live, candidate: Task, now: Now) -> None:
        """Probation: the candidate answers from now on, and what answered until now beside it."""
        one, steady = live.standing, self.task(live.name)
        assert one is not None
        if live.trial is not None:
            live.trial.finish(self._store, self._author, now, over=True)
        if steady is not None:
            steady.trying = None
        if candidate.judge is not None:
            fresh = candidate.judge.start()
            candidate.drift = saved_drift.numbered_on(fresh, steady.drift if steady else None)
            candidate.ended = None
        self._serve(live, candidate, one)

    def _serve(self, live: Live, candidate: Task, one: Standing) -> None:
        live.trial = Trial(candidate, self.task(live.name), one, self._store)
        candidate.trying = live.trial
        self.exchange(live.name, candidate)

    def stand_in(self, live: Live, made: Task | None, now: Now) -> None:
        """After probation: `made`, the same bundle in this process, or the one before."""
        trial, live.trial = live.trial, None
        if trial is None:
            return
        trial.finish(self._store, self._author, now, over=True)
        candidate, steady = trial.candidate, trial.steady
        candidate.trying = None
        if made is not None:
            made.drift, made.ended, made.last_label = candidate.drift, None, candidate.last_label
        elif steady is not None and steady.drift is not None:
            steady.drift = saved_drift.numbered_on(steady.drift, candidate.drift)
        if live.standing is not None and live.standing.phase == "shadow":
            live.trial = Trial(candidate, steady, live.standing, self._store)
        else:
            self.makes.end(candidate)
        self.exchange(live.name, made or steady)

    def end(self, live: Live, now: Now, *, over: bool = True) -> None:
        """Nothing is tried any more; not `over`: until the agent starts again."""
        trial, live.trial = live.trial, None
        if trial is None:
            return
        trial.finish(self._store, self._author, now, over=over)
        self.makes.end(trial.candidate)
        for task in (trial.steady, self.task(live.name)):
            if task is not None and task.trying is trial:
                task.trying = None
