"""Rule part of a batch: the alerts that a task's rules raise and clear for its results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.rules import batch_rules, rule_store
from outstation.device.rules.batch_results import BatchResults
from outstation.device.rules.batch_rules import RuleContext, TaskRuleStates
from outstation.device.rules.compiler import CompiledRule
from outstation.device.store.message_log import PendingMessage
from outstation.device.store.transaction import Transaction
from outstation.ml.model.inference.inference import InferenceResult


class RulePart(BatchPart):
    """Alert rules of one task, as the config has them."""

    def __init__(self, plan: TaskPlan, rules: Sequence[CompiledRule]) -> None:
        self._plan, self._rules = plan, rules
        self._before = self._after = TaskRuleStates()

    def read(self, batch: Batch) -> None:
        self._before = self._after = rule_store.load(batch.store, self._plan.name)

    def compute(self, batch: Batch, results: InferenceResult) -> Iterable[PendingMessage]:
        """Return the alerts about results of earlier batches; the others go behind the message of their result."""
        task, model_scores = self._plan.name, results.scores
        if not len(model_scores):
            return ()
        is_complete = results.missing_share <= self._plan.bundle.manifest.input.max_missing
        texts = None if batch.labels is None else batch.labels.to_list()
        rows, t = batch.ends + batch.rows.first, batch.rows.t[batch.ends]
        answers = BatchResults(model_scores, texts, rows, t, is_complete)
        context = RuleContext(
            batch.message_log.device, task, self._plan.bundle.digest, batch.drift, batch.drift_windows
        )
        self._after, batch.result_alerts = batch_rules.evaluate(self._rules, self._before, context, answers)
        return [PendingMessage.from_alert(change.alert, task) for change in batch.result_alerts if change.index < 0]

    def save(self, tx: Transaction, batch: Batch) -> None:
        if self._after is not self._before:
            rule_store.save(tx, self._plan.name, self._after)
