"""Canary run: a bundle that is tried, as a shadow of the active bundle or in its place. Progress and failures.

Batches are counted in their own commit, so neither a restart nor a crash forgets one or counts it twice. `shadow`
compares the predictions of the two bundles and reports them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import msgspec

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.bundles.rollout_state import Reason, RolloutState
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.rollout.shadow import ANSWER_TIMEOUT_S, ShadowRunner
from outstation.device.rollout.state_machine import BundleAssessment
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import ModelProcessFailed
from outstation.ml.comparison import rules
from outstation.ml.comparison.rules import RuleResult
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.ml.performance.intervals import wilson
from outstation.protocol.wire.desired_state import CanaryRules


class CanaryProgress(msgspec.Struct, frozen=True):
    """Batches of one phase of one roll-out, and how many of them failed."""

    rollout: str
    digest: str
    phase: str
    batches: int = 0
    errors: int = 0


class CanaryRun(BatchPart):
    """Run of `candidate`, a part of the batches of the task that answers.

    With `is_serving` the candidate's predictions are the task's results, and `incumbent`, the bundle that runs
    otherwise, is its shadow; else the candidate is the shadow. `incumbent` is None if nothing else runs.
    """

    def __init__(self, candidate: LoadedTask, incumbent: LoadedTask | None, state: RolloutState, store: Store) -> None:
        self.candidate, self.incumbent, self.is_serving = candidate, incumbent, state.phase == "canary"
        self.rules: CanaryRules = state.desired.rules
        self.progress = _load_progress(store, candidate.name, state)
        self._next_progress = self.progress
        self._failure: BundleAssessment | None = None
        self._rule_results: list[RuleResult] = []
        self._rollout = state.desired.rollout
        self._shadow = self._start_shadow(store)
        self._evaluate_rules()

    def compute(self, batch: Batch, results: InferenceResult) -> Iterable[PendingMessage]:
        """Count a batch that is about to be committed."""
        if self.is_serving and batch.plan is not self.candidate:
            # The candidate failed in this batch, which is counted already.
            self._next_progress = self.progress
            return ()
        self._next_progress = msgspec.structs.replace(self.progress, batches=self.progress.batches + 1)
        if self.is_serving:
            limit_s = self.rules.batch_timeout_s
            if results.seconds > limit_s:
                detail = f"the inference of a batch took {results.seconds:.1f} s, {limit_s:g} s are allowed"
                numbers = {**self._collect_numbers(), "seconds": round(results.seconds, 3), "allowed_s": limit_s}
                self._failure = self._failure or BundleAssessment("batch_timeout", detail, numbers)
        return ()

    def record_failure(self, failure: ModelProcessFailed) -> None:
        """Count a batch that the candidate failed to answer. A crash or a hang ends the run."""
        batches, errors = self.progress.batches + 1, self.progress.errors + 1
        self.progress = msgspec.structs.replace(self.progress, batches=batches, errors=errors)
        self._next_progress = self.progress
        limit = self.rules.max_error_rate
        if failure.kind != "error":
            self._failure = BundleAssessment(failure.kind, f"{failure}", self._collect_numbers())
        elif not limit or wilson(errors / batches, batches)[0] > limit:
            detail = f"{errors} of {batches} batches failed, {limit:.1%} allowed: {failure.detail}"
            self._failure = BundleAssessment("error_rate", detail, self._collect_numbers())

    def save(self, tx: Transaction, batch: Batch) -> None:
        tx.save_state(self.candidate.name, task_keys.CANARY_PROGRESS, msgspec.json.encode(self._next_progress))

    def confirm(self, batch: Batch) -> None:
        self.progress = self._next_progress

    def follow(self, batch: Batch, results: InferenceResult) -> None:
        """Pass the committed batch to the shadow. Raises StorageError."""
        if self._shadow is not None and self._shadow.task is batch.plan:
            self._shadow.submit_batch(batch.store, batch.rows, results)

    def tick(self, store: Store, message_log: MessageLog, now: ClockReading) -> bool:
        """Report the comparison if it is due; return True if a message was written. Raises StorageError."""
        if self._shadow is None or not self._shadow.tick(store, message_log, now):
            return False
        self._evaluate_rules()
        return True

    def flush(self, store: Store, message_log: MessageLog, now: ClockReading) -> bool:
        """Report the rest of the comparison at once; return True if there was any. Raises StorageError."""
        if self._shadow is None or not self._shadow.report(store, message_log, now):
            return False
        self._evaluate_rules()
        return True

    def finish(self, store: Store, message_log: MessageLog, now: ClockReading, *, final: bool) -> None:
        """Report the rest without waiting; unless `final` the comparison continues later. Raises StorageError."""
        if self._shadow is not None:
            is_idle = self._shadow.poll(ANSWER_TIMEOUT_S)
            self._shadow.finish(store, message_log, now, final=final)
            if not is_idle and isinstance(self.candidate.model, SubprocessModel):
                # It still works on a batch; the next request starts it anew.
                self.candidate.model.close()

    def replace_incumbent(self, incumbent: LoadedTask, store: Store) -> None:
        """Compare with another bundle, which answers now."""
        self.incumbent = incumbent
        self._shadow = self._start_shadow(store)

    def check_failure(self) -> BundleAssessment | None:
        """Return the evidence that is enough to end the run, if there is any."""
        if self._failure is None and (drifting := self._list_drifting_outputs()) and self._is_disagreeing(drifting):
            detail = "a drift alert on its predictions is open, and the previous bundle predicts otherwise"
            self._failure = BundleAssessment("output_drift", detail, self._collect_numbers())
        if self._failure is None and (failed := self._find_failed_rule()) is not None:
            numbers = {**self._collect_numbers(), **failed.numbers}
            self._failure = BundleAssessment(cast(Reason, failed.rule), failed.summary, numbers)
        return self._failure

    def check_completion(self, hours: float) -> BundleAssessment | None:
        """Return an assessment once the canary ran long enough without a failure."""
        limits, batches = self.rules, self.progress.batches
        if not self.is_serving or batches < limits.min_batches or hours < limits.min_hours:
            return None
        if (drifting := self._list_drifting_outputs()) and self._is_disagreeing(drifting) is None:
            return None
        required = f"{limits.min_batches} in {limits.min_hours:g} h required"
        passed = " ".join(result.summary for result in self._rule_results if result.state == "passed")
        detail = f"{batches} batches in {hours:.2f} h ({required}) without a failure. {passed}"
        return BundleAssessment("", detail.strip(), {**self._collect_numbers(), "hours": round(hours, 3)})

    def _list_drifting_outputs(self) -> list[str]:
        """Return the outputs whose drift alerts count, "" the first one."""
        drift = self.candidate.drift
        if not self.is_serving or not self.rules.output_drift or drift is None:
            return []
        state = drift.state
        answers, score, *further = state.suite.open_subjects[state.suite.task.answers].tolist()
        known = [("", answers or score), *zip((each.name for each in state.suite.task.further), further, strict=True)]
        return [name for name, is_open in known if is_open and not rules.is_ignored(self.rules, name)]

    def _is_disagreeing(self, drifting: Sequence[str]) -> bool | None:
        """Return True if the previous bundle predicts otherwise; else the site changed, and a rollback would not help.

        None while too few predictions were compared. If they cannot be compared, the alert alone counts.
        """
        if self._shadow is None:
            return True
        return rules.is_disagreeing(self.rules, self._shadow.blocks, drifting, not self.is_serving)

    def _start_shadow(self, store: Store) -> ShadowRunner | None:
        if self.incumbent is None:
            return None
        pair = (self.candidate, self.incumbent) if self.is_serving else (self.incumbent, self.candidate)
        return ShadowRunner(*pair, self._rollout, store, self.rules.min_batches)

    def _evaluate_rules(self) -> None:
        if self._shadow is not None:
            self._rule_results = rules.evaluate_rules(self.rules, self._shadow.blocks, new_is_other=not self.is_serving)

    def _find_failed_rule(self) -> RuleResult | None:
        """Return the first failed rule. A shadow can only fail by its error rate: the fleet judges the rest."""
        # Before `min_batches`, a burst in which two good bundles disagree could be all that was compared.
        is_long_enough = self.is_serving and self.progress.batches >= self.rules.min_batches
        for result in self._rule_results:
            if result.state == "failed" and (is_long_enough or result.rule == rules.ERROR_RATE):
                return result
        return None

    def _collect_numbers(self) -> dict[str, object]:
        values = {result.name: result.numbers["value"] for result in self._rule_results if "value" in result.numbers}
        return {**values, "batches": self.progress.batches, "errors": self.progress.errors}


def _load_progress(store: Store, task: str, state: RolloutState) -> CanaryProgress:
    fresh = CanaryProgress(state.desired.rollout, state.desired.digest, state.phase)
    try:
        saved = decoders.from_json(store.load_state(task, task_keys.CANARY_PROGRESS) or b"null", CanaryProgress | None)
    except msgspec.MsgspecError:
        return fresh
    key = (fresh.rollout, fresh.digest, fresh.phase)
    return saved if saved is not None and (saved.rollout, saved.digest, saved.phase) == key else fresh
