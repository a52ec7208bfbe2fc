"""A bundle that is tried, beside the one that runs or in its place: how far it got, and what speaks against it.

Batches are counted in the commit of each, so that neither a restart nor a crash forgets one or counts it twice. What
the two bundles said of the same windows is compared, and told, by `beside`.
"""

from __future__ import annotations

import math
from typing import cast

import msgspec

from agent.clock import ClockReading
from agent.comparison import paired_intervals
from agent.comparison import rules as verdict
from agent.device.bundles.rollout_state import Reason, RolloutState
from agent.device.pipeline.loaded_task import LoadedTask
from agent.device.rollout.shadow import ANSWER_TIMEOUT_S, ShadowRunner
from agent.device.rollout.state_machine import BundleAssessment
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.store import RowBatch, Store
from agent.device.store.transaction import Transaction
from agent.drift.state import DriftState
from agent.errors import ModelProcessFailed
from agent.model.inference.inference import InferenceResult
from agent.model.sandbox.subprocess_model import SubprocessModel
from agent.wire.desired_state import CanaryRules

# Subjects of drift that are about answers and not about what was read: the third and second from the end.
_OUTPUT_SUBJECTS = slice(-3, -1)
# Share of windows that two bundles answer alike at least, where a drift of answers is the site's and not the bundle's.
_MIN_AGREEMENT = 0.9
# Of the lower end of an interval around a share, two-sided 95 %.
_WILSON_Z = 1.96


class CanaryProgress(msgspec.Struct, frozen=True):
    """Batches that a bundle was tried in, of them such as it failed in; of one phase of one roll-out."""

    rollout: str
    digest: str
    phase: str
    batches: int = 0
    errors: int = 0


class CanaryRun:
    """Of `candidate`, as its task stands. `serves`: its answers are the task's results; else nothing of it counts.

    `steady` runs otherwise, None where nothing does. Hung on to the task that serves, as `Task.trying`.
    """

    def __init__(self, candidate: LoadedTask, incumbent: LoadedTask | None, state: RolloutState, store: Store) -> None:
        self.candidate, self.incumbent, self.is_serving = candidate, incumbent, state.phase == "probation"
        self.rules: CanaryRules = state.desired.rules
        self.progress = _load_progress(store, candidate.name, state)
        self._next_progress = self.progress
        self._failure: BundleAssessment | None = None
        self._rule_results: list[verdict.RuleResult] = []
        self._rollout = state.desired.rollout
        self._shadow = self._start_shadow(store)
        self._evaluate_rules()

    def before_commit(self, task: LoadedTask, answers: InferenceResult) -> None:
        """What `task` answered of a batch that is about to be committed."""
        if self.is_serving and task is not self.candidate:
            # It failed in this batch, which is counted already.
            self._next_progress = self.progress
            return
        self._next_progress = msgspec.structs.replace(self.progress, batches=self.progress.batches + 1)
        if self.is_serving:
            self._check_batch_time(answers.seconds)

    def record_failure(self, failure: ModelProcessFailed) -> None:
        """The candidate gave no answers to a batch. One that crashed or hung is not asked again."""
        counted = self.progress
        self.progress = msgspec.structs.replace(counted, batches=counted.batches + 1, errors=counted.errors + 1)
        self._next_progress = self.progress
        if failure.kind != "error":
            self._failure = BundleAssessment(failure.kind, f"{failure}", self._collect_numbers())
        elif (
            _wilson_lower_bound(self.progress.errors, self.progress.batches) > self.rules.errors
            or not self.rules.errors
        ):
            share = f"{self.progress.errors} of {self.progress.batches} batches failed"
            why = f"{share}, {self.rules.errors:.1%} may: {failure.detail}"
            self._failure = BundleAssessment("errors", why, self._collect_numbers())

    def save_progress(self, tx: Transaction) -> None:
        """In the commit of the batch that was looked at."""
        tx.save_state(self.candidate.name, task_keys.CANARY_PROGRESS, msgspec.json.encode(self._next_progress))

    def after_commit(self, task: LoadedTask, store: Store, batch: RowBatch, answers: InferenceResult) -> None:
        """The other of the two is asked about the same rows."""
        self.progress = self._next_progress
        if self._shadow is not None and self._shadow.task is task:
            self._shadow.submit_batch(store, batch, answers)

    def tick(self, store: Store, author: MessageLog, now: ClockReading) -> bool:
        """Tell what was compared, where it is time to; whether a message was written. Raises StorageError."""
        if self._shadow is None or not self._shadow.tick(store, author, now):
            return False
        self._evaluate_rules()
        return True

    def flush(self, store: Store, author: MessageLog, now: ClockReading) -> bool:
        """Tell what was not told yet, and judge that too; whether there was any. Raises StorageError."""
        if self._shadow is None or not self._shadow.report(store, author, now):
            return False
        self._evaluate_rules()
        return True

    def finish(self, store: Store, author: MessageLog, now: ClockReading, *, final: bool) -> None:
        """Tell the rest, and wait for no answer any more; `over`: nor go on after a restart. Raises StorageError."""
        if self._shadow is not None:
            answered = self._shadow.poll(ANSWER_TIMEOUT_S)
            self._shadow.finish(store, author, now, final=final)
            if not answered and isinstance(self.candidate.model, SubprocessModel):
                # It is still at work on a question; it starts anew with the next.
                self.candidate.model.close()

    def replace_incumbent(self, incumbent: LoadedTask, store: Store) -> None:
        """Another bundle runs now, and the candidate answers beside that."""
        self.incumbent = incumbent
        self._shadow = self._start_shadow(store)

    def check_failure(self) -> BundleAssessment | None:
        """What was found so far, if it is enough to take the bundle back."""
        if self._failure is None and self._has_output_drift() and self._is_disagreeing():
            why = "a drift alert of its answers is open, and the bundle before does not answer like that"
            self._failure = BundleAssessment("output drift", why, self._collect_numbers())
        if self._failure is None and (bad := self._find_broken_rule()) is not None:
            self._failure = BundleAssessment(
                cast(Reason, bad.rule), bad.summary, {**self._collect_numbers(), **bad.numbers}
            )
        return self._failure

    def check_completion(self, hours: float) -> BundleAssessment | None:
        """That it was on probation for long enough."""
        rules, count = self.rules, self.progress.batches
        if not self.is_serving or count < rules.batches or hours < rules.hours:
            return None
        if self._has_output_drift() and self._is_disagreeing() is None:
            return None
        asked = f"{rules.batches} in {rules.hours:g} h were asked"
        why = f"{count} batches in {hours:.2f} h ({asked}), and nothing against it. {self._summarize_passed_rules()}"
        return BundleAssessment("", why.strip(), {**self._collect_numbers(), "hours": round(hours, 3)})

    def _has_output_drift(self) -> bool:
        """Whether that is asked, and an alert of the drift of its answers is open."""
        return self.is_serving and self.rules.output_drift and _has_open_output_alert(self.candidate.drift_state)

    def _is_disagreeing(self) -> bool | None:
        """Whether the bundle before says otherwise: if not, what moved is the site, and going back changes nothing.

        None while too few answers were compared to tell; where nothing can be compared, the alert alone counts.
        """
        if self._shadow is None:
            return True
        alike = paired_intervals.agreement(self._shadow.blocks)
        if alike is None:
            return None if len(self._shadow.blocks) < paired_intervals.MIN_BLOCKS else True
        return alike.low < _MIN_AGREEMENT

    def _start_shadow(self, store: Store) -> ShadowRunner | None:
        if self.incumbent is None:
            return None
        pair = (self.candidate, self.incumbent) if self.is_serving else (self.incumbent, self.candidate)
        return ShadowRunner(*pair, self._rollout, store, self.rules.batches)

    def _evaluate_rules(self) -> None:
        """By intervals over all that was told."""
        if self._shadow is None:
            return
        self._rule_results = verdict.evaluate_rules(self.rules, self._shadow.blocks, new_is_other=not self.is_serving)

    def _find_broken_rule(self) -> verdict.RuleResult | None:
        """What is bad by that. A shadow serves nobody: the fleet says what becomes of one that runs."""
        # Earlier, a burst in which two good bundles disagree would fill all that was compared.
        long = self.is_serving and self.progress.batches >= self.rules.batches
        some = (one for one in self._rule_results if one.state == "bad" and (long or one.rule == verdict.ERRORS))
        return next(some, None)

    def _summarize_passed_rules(self) -> str:
        return " ".join(one.summary for one in self._rule_results if one.state == "good")

    def _check_batch_time(self, seconds: float) -> None:
        if seconds > self.rules.batch_s:
            why = f"a batch took {seconds:.1f} s in the model, {self.rules.batch_s:g} s are allowed"
            numbers = {**self._collect_numbers(), "seconds": round(seconds, 3), "allowed_s": self.rules.batch_s}
            reason: Reason = "batch time"
            self._failure = self._failure or BundleAssessment(reason, why, numbers)

    def _collect_numbers(self) -> dict[str, object]:
        known = {one.rule: one.numbers["value"] for one in self._rule_results if "value" in one.numbers}
        return {**known, "batches": self.progress.batches, "errors": self.progress.errors}


def _load_progress(store: Store, task: str, state: RolloutState) -> CanaryProgress:
    fresh = CanaryProgress(state.desired.rollout, state.desired.digest, state.phase)
    try:
        found = msgspec.json.decode(
            store.load_state(task, task_keys.CANARY_PROGRESS) or b"null", type=CanaryProgress | None
        )
    except msgspec.MsgspecError:
        return fresh
    same = found is not None and (found.rollout, found.digest, found.phase) == (
        fresh.rollout,
        fresh.digest,
        fresh.phase,
    )
    return found if same and found is not None else fresh


def _has_open_output_alert(state: DriftState | None) -> bool:
    return state is not None and bool(state.suite.open_subjects[_OUTPUT_SUBJECTS].any())


def _wilson_lower_bound(errors: int, batches: int) -> float:
    """The lower end of Wilson's interval around the share of errors."""
    if not batches:
        return 0.0
    share, z2 = errors / batches, _WILSON_Z * _WILSON_Z
    centre = share + z2 / (2 * batches)
    half = _WILSON_Z * math.sqrt(share * (1 - share) / batches + z2 / (4 * batches * batches))
    return (centre - half) / (1 + z2 / batches)
