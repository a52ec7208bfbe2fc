"""A bundle that is tried, beside the one that runs or in its place: how far it got, and what speaks against it.

What it did is counted in the commit of each batch, so that neither a restart nor a crash forgets it or counts twice.
"""

from __future__ import annotations

import math

import msgspec

from agent.clock import Now
from agent.device.author import Author
from agent.device.batch import Task
from agent.device.storage.store import Batch, Store
from agent.device.storage.transaction import Transaction
from agent.device.updates.decide import Finding
from agent.device.updates.standing import Reason, Standing
from agent.drift.state import State
from agent.errors import ModelDied
from agent.model.inference import Answers
from agent.wire.desired import Rules

PROGRESS = "rollout progress"
# Subjects of drift that are about answers and not about what was read: the third and second from the end.
_OUTPUTS = slice(-3, -1)
# Of the lower end of an interval around a share, two-sided 95 %.
_Z = 1.96


class Progress(msgspec.Struct, frozen=True):
    """Batches that a bundle was tried in, of them such as it failed in; of one phase of one roll-out."""

    rollout: str
    digest: str
    phase: str
    batches: int = 0
    errors: int = 0


class Trial:
    """Of `candidate`, as its task stands. `serves`: its answers are the task's results; else nothing of it counts.

    `steady` runs otherwise, None where nothing does. Hung on to the task that serves, as `Task.beside`.
    """

    def __init__(self, candidate: Task, steady: Task | None, one: Standing, store: Store) -> None:
        self.candidate, self.steady, self.serves = candidate, steady, one.phase == "probation"
        self.rules: Rules = one.wanted.rules
        self.progress = _restored(store, candidate.name, one)
        self._coming = self.progress
        self._against: Finding | None = None

    def look(self, task: Task, store: Store, batch: Batch, answers: Answers) -> None:
        """What `task`, the one that serves, answered of a batch that is about to be committed."""
        if self.serves and task is not self.candidate:
            # It failed in this batch, which is counted already.
            self._coming = self.progress
            return
        self._coming = msgspec.structs.replace(self.progress, batches=self.progress.batches + 1)
        if self.serves:
            self._time(answers.seconds)

    def failed(self, died: ModelDied) -> None:
        """The candidate gave no answers to a batch. One that crashed or hung is not asked again."""
        counted = self.progress
        self.progress = msgspec.structs.replace(counted, batches=counted.batches + 1, errors=counted.errors + 1)
        self._coming = self.progress
        if died.kind != "error":
            self._against = Finding(died.kind, f"{died}", self._numbers())
        elif _low(self.progress.errors, self.progress.batches) > self.rules.errors or not self.rules.errors:
            share = f"{self.progress.errors} of {self.progress.batches} batches failed"
            why = f"{share}, {self.rules.errors:.1%} may: {died.sentence}"
            self._against = Finding("errors", why, self._numbers())

    def write(self, tx: Transaction, author: Author, now: Now) -> None:
        """In the commit of the batch that was looked at."""
        tx.keep(self.candidate.name, PROGRESS, msgspec.json.encode(self._coming))

    def committed(self) -> None:
        self.progress = self._coming

    def against(self) -> Finding | None:
        """What was found so far, if it is enough to take the bundle back."""
        if self._against is None and self.serves and self.rules.output_drift and _drifts(self.candidate.drift):
            why = "a drift alert of its answers is open, which those of the bundle before did not raise"
            self._against = Finding("output drift", why, self._numbers())
        return self._against

    def enough(self, hours: float) -> Finding | None:
        """That it was on probation for long enough."""
        rules, count = self.rules, self.progress.batches
        if count < rules.batches or hours < rules.hours:
            return None
        why = (
            f"{count} batches in {hours:.2f} h and nothing against it ({rules.batches} in {rules.hours:g} h were asked)"
        )
        return Finding("", why, {**self._numbers(), "hours": round(hours, 3)})

    def _time(self, seconds: float) -> None:
        if seconds > self.rules.batch_s:
            why = f"a batch took {seconds:.1f} s in the model, {self.rules.batch_s:g} s are allowed"
            numbers = {**self._numbers(), "seconds": round(seconds, 3), "allowed_s": self.rules.batch_s}
            reason: Reason = "batch time"
            self._against = self._against or Finding(reason, why, numbers)

    def _numbers(self) -> dict[str, object]:
        return {"batches": self.progress.batches, "errors": self.progress.errors}


def _restored(store: Store, task: str, one: Standing) -> Progress:
    fresh = Progress(one.wanted.rollout, one.wanted.digest, one.phase)
    try:
        found = msgspec.json.decode(store.state(task, PROGRESS) or b"null", type=Progress | None)
    except msgspec.MsgspecError:
        return fresh
    same = found is not None and (found.rollout, found.digest, found.phase) == (
        fresh.rollout,
        fresh.digest,
        fresh.phase,
    )
    return found if same and found is not None else fresh


def _drifts(state: State | None) -> bool:
    return state is not None and bool(state.detectors.open_subjects[_OUTPUTS].any())


def _low(errors: int, batches: int) -> float:
    """The lower end of Wilson's interval around the share of errors."""
    if not batches:
        return 0.0
    share, z2 = errors / batches, _Z * _Z
    centre = share + z2 / (2 * batches)
    half = _Z * math.sqrt(share * (1 - share) / batches + z2 / (4 * batches * batches))
    return (centre - half) / (1 + z2 / batches)
