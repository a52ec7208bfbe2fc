"""A bundle that is tried, beside the one that runs or in its place: how far it got, and what speaks against it.

Batches are counted in the commit of each, so that neither a restart nor a crash forgets one or counts it twice. What
the two bundles said of the same windows is compared, and told, by `beside`.
"""

from __future__ import annotations

import math
from typing import cast

import msgspec

from agent.clock import Now
from agent.comparison import paired_intervals
from agent.comparison import rules as verdict
from agent.device.bundles.rollout_state import Reason, Standing
from agent.device.pipeline.batch import Task
from agent.device.rollout.shadow import PATIENCE_S, Beside
from agent.device.rollout.state_machine import Finding
from agent.device.store.message_log import Author
from agent.device.store.store import Batch, Store
from agent.device.store.transaction import Transaction
from agent.drift.state import State
from agent.errors import ModelDied
from agent.model.inference.inference import Answers
from agent.model.sandbox.subprocess_model import Apart
from agent.wire.desired_state import Rules

PROGRESS = "rollout progress"
# Subjects of drift that are about answers and not about what was read: the third and second from the end.
_OUTPUTS = slice(-3, -1)
# Share of windows that two bundles answer alike at least, where a drift of answers is the site's and not the bundle's.
_ALIKE = 0.9
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

    `steady` runs otherwise, None where nothing does. Hung on to the task that serves, as `Task.trying`.
    """

    def __init__(self, candidate: Task, steady: Task | None, one: Standing, store: Store) -> None:
        self.candidate, self.steady, self.serves = candidate, steady, one.phase == "probation"
        self.rules: Rules = one.wanted.rules
        self.progress = _restored(store, candidate.name, one)
        self._coming = self.progress
        self._against: Finding | None = None
        self._judged: list[verdict.Finding] = []
        self._rollout = one.wanted.rollout
        self._beside = self._compare(store)
        self._judge()

    def look(self, task: Task, answers: Answers) -> None:
        """What `task` answered of a batch that is about to be committed."""
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

    def write(self, tx: Transaction) -> None:
        """In the commit of the batch that was looked at."""
        tx.keep(self.candidate.name, PROGRESS, msgspec.json.encode(self._coming))

    def committed(self, task: Task, store: Store, batch: Batch, answers: Answers) -> None:
        """The other of the two is asked about the same rows."""
        self.progress = self._coming
        if self._beside is not None and self._beside.task is task:
            self._beside.offer(store, batch, answers)

    def turn(self, store: Store, author: Author, now: Now) -> bool:
        """Tell what was compared, where it is time to; whether a message was written. Raises StorageError."""
        if self._beside is None or not self._beside.turn(store, author, now):
            return False
        self._judge()
        return True

    def conclude(self, store: Store, author: Author, now: Now) -> bool:
        """Tell what was not told yet, and judge that too; whether there was any. Raises StorageError."""
        if self._beside is None or not self._beside.tell(store, author, now):
            return False
        self._judge()
        return True

    def finish(self, store: Store, author: Author, now: Now, *, over: bool) -> None:
        """Tell the rest, and wait for no answer any more; `over`: nor go on after a restart. Raises StorageError."""
        if self._beside is not None:
            answered = self._beside.listen(PATIENCE_S)
            self._beside.finish(store, author, now, over=over)
            if not answered and isinstance(self.candidate.model, Apart):
                # It is still at work on a question; it starts anew with the next.
                self.candidate.model.close()

    def stand_beside(self, steady: Task, store: Store) -> None:
        """Another bundle runs now, and the candidate answers beside that."""
        self.steady = steady
        self._beside = self._compare(store)

    def against(self) -> Finding | None:
        """What was found so far, if it is enough to take the bundle back."""
        if self._against is None and self._drifts() and self._answers_otherwise():
            why = "a drift alert of its answers is open, and the bundle before does not answer like that"
            self._against = Finding("output drift", why, self._numbers())
        if self._against is None and (bad := self._bad()) is not None:
            self._against = Finding(cast(Reason, bad.rule), bad.summary, {**self._numbers(), **bad.numbers})
        return self._against

    def enough(self, hours: float) -> Finding | None:
        """That it was on probation for long enough."""
        rules, count = self.rules, self.progress.batches
        if not self.serves or count < rules.batches or hours < rules.hours:
            return None
        if self._drifts() and self._answers_otherwise() is None:
            return None
        asked = f"{rules.batches} in {rules.hours:g} h were asked"
        why = f"{count} batches in {hours:.2f} h ({asked}), and nothing against it. {self._said()}"
        return Finding("", why.strip(), {**self._numbers(), "hours": round(hours, 3)})

    def _drifts(self) -> bool:
        """Whether that is asked, and an alert of the drift of its answers is open."""
        return self.serves and self.rules.output_drift and _drifts(self.candidate.drift)

    def _answers_otherwise(self) -> bool | None:
        """Whether the bundle before says otherwise: if not, what moved is the site, and going back changes nothing.

        None while too few answers were compared to tell; where nothing can be compared, the alert alone counts.
        """
        if self._beside is None:
            return True
        alike = paired_intervals.agreement(self._beside.blocks)
        if alike is None:
            return None if len(self._beside.blocks) < paired_intervals.FEWEST_BLOCKS else True
        return alike.low < _ALIKE

    def _compare(self, store: Store) -> Beside | None:
        if self.steady is None:
            return None
        pair = (self.candidate, self.steady) if self.serves else (self.steady, self.candidate)
        return Beside(*pair, self._rollout, store, self.rules.batches)

    def _judge(self) -> None:
        """By intervals over all that was told."""
        if self._beside is None:
            return
        self._judged = verdict.judge(self.rules, self._beside.blocks, new_is_beside=not self.serves)

    def _bad(self) -> verdict.Finding | None:
        """What is bad by that. A shadow serves nobody: the fleet says what becomes of one that runs."""
        # Earlier, a burst in which two good bundles disagree would fill all that was compared.
        long = self.serves and self.progress.batches >= self.rules.batches
        some = (one for one in self._judged if one.state == "bad" and (long or one.rule == verdict.ERRORS))
        return next(some, None)

    def _said(self) -> str:
        return " ".join(one.summary for one in self._judged if one.state == "good")

    def _time(self, seconds: float) -> None:
        if seconds > self.rules.batch_s:
            why = f"a batch took {seconds:.1f} s in the model, {self.rules.batch_s:g} s are allowed"
            numbers = {**self._numbers(), "seconds": round(seconds, 3), "allowed_s": self.rules.batch_s}
            reason: Reason = "batch time"
            self._against = self._against or Finding(reason, why, numbers)

    def _numbers(self) -> dict[str, object]:
        known = {one.rule: one.numbers["value"] for one in self._judged if "value" in one.numbers}
        return {**known, "batches": self.progress.batches, "errors": self.progress.errors}


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
