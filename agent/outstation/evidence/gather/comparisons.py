"""Comparisons of two bundles on the same windows: statistics with intervals, computed from signed `shadow` messages.

They are computed when a folder is written and again when it is verified, with the code that devices use for rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from outstation.evidence.format.contents import WRITE_LIMITS, BundleComparison, ComparisonMetric, MessageRef, ModelRef
from outstation.ml.comparison import paired_intervals, rules
from outstation.ml.comparison.paired_intervals import ComparisonBlock, ComparisonEstimate
from outstation.ml.comparison.tally import ComparisonStats, block_key
from outstation.protocol.wire.messages import ModelRef as ReportedModel
from outstation.protocol.wire.messages import ShadowPayload

# Roll-out, device, task, digest of `model`, digest of `other`.
_ComparisonKey = tuple[str, str, str, str, str]


class ComparisonCollector(msgspec.Struct):
    """Newest `shadow` messages of each roll-out, device, task and pair of bundles.

    Messages arrive ordered by device, log and seq.
    """

    omitted: int = 0
    _messages: dict[_ComparisonKey, list[ShadowPayload]] = msgspec.field(default_factory=dict)
    _dropped: Counter[_ComparisonKey] = msgspec.field(default_factory=Counter)

    def add(self, body: ShadowPayload) -> None:
        key = comparison_key(body)
        if key not in self._messages and len(self._messages) >= WRITE_LIMITS.comparisons:
            self.omitted += 1
            return
        messages = self._messages.setdefault(key, [])
        messages.append(body)
        if len(messages) > WRITE_LIMITS.messages_per_comparison:
            # The newest stay: the intervals need consecutive messages. The parts of a dropped one go with it.
            oldest = block_key(messages[0])
            while len(messages) > 1 and block_key(messages[0]) == oldest:
                del messages[0]
                self._dropped[key] += 1

    def build_comparisons(self, digests: Mapping[str, str]) -> list[BundleComparison]:
        """Return all comparisons. `digests`: roll-out → digest of its new bundle.

        For an unknown roll-out, the bundle in shadow counts as the new one.
        """
        return [
            compare_messages(messages, new_is_shadow=digests.get(key[0]) != key[3], omitted=self._dropped[key])
            for key, messages in sorted(self._messages.items())
        ]


def comparison_key(body: ShadowPayload) -> _ComparisonKey:
    """Return the key that messages of one comparison share."""
    return body.rollout, body.device, body.task, body.model.digest, body.other.digest


def compare_messages(messages: Sequence[ShadowPayload], *, new_is_shadow: bool, omitted: int = 0) -> BundleComparison:
    """Return the comparison of at least one message. All messages share one comparison key."""
    last = messages[-1]
    # Estimates skip blocks without data of their output, so the parts of a split comparison need no joining.
    blocks = [ComparisonBlock(ComparisonStats.from_message(body)) for body in messages]
    total = sum((block.stats for block in blocks), ComparisonStats())
    return BundleComparison(
        rollout=last.rollout,
        device=last.device,
        task=last.task,
        new=_to_model_ref(last.other if new_is_shadow else last.model),
        old=_to_model_ref(last.model if new_is_shadow else last.other),
        new_is_shadow=new_is_shadow,
        batches=total.batches,
        errors=total.errors,
        windows=total.n,
        agreeing=total.agreeing,
        labelled=sum(total.labelled),
        metrics=list(_compute_all_metrics(blocks, new_is_shadow)),
        messages=[MessageRef(body.device, body.log, body.seq) for body in messages],
        omitted=omitted,
    )


def _compute_all_metrics(blocks: Sequence[ComparisonBlock], new_is_shadow: bool) -> Iterator[ComparisonMetric]:
    agreement, *others = _compute_metrics(blocks, new_is_shadow)
    yield agreement
    yield _build_metric("latency_ratio", paired_intervals.latency_ratio(blocks, new_is_other=new_is_shadow))
    yield from others
    for name in rules.list_outputs(blocks, new_is_shadow):
        for metric in _compute_metrics(rules.select_output(blocks, name), new_is_shadow):
            yield replace(metric, name=rules.name_rule(metric.name, name))


def _compute_metrics(blocks: Sequence[ComparisonBlock], new_is_shadow: bool) -> Iterator[ComparisonMetric]:
    yield _build_metric("agreement", paired_intervals.agreement(blocks))
    stats = [block.stats for block in blocks]
    if any(sum(block.labelled) for block in stats):
        gain = paired_intervals.labelled_accuracy_gain(blocks, new_is_other=new_is_shadow)
        yield _build_metric("accuracy_gain", gain)
    if any(block.model.expected_accuracy.n and block.other.expected_accuracy.n for block in stats):
        gain = paired_intervals.expected_accuracy_gain(blocks, new_is_other=new_is_shadow)
        yield _build_metric("estimated_accuracy_gain", gain)
    if any(block.model.abs_error.n and block.other.abs_error.n for block in stats):
        yield _build_metric("error_ratio", paired_intervals.error_ratio(blocks, new_is_other=new_is_shadow))
    if any(block.model.expected_error.n and block.other.expected_error.n for block in stats):
        ratio = paired_intervals.expected_error_ratio(blocks, new_is_other=new_is_shadow)
        yield _build_metric("estimated_error_ratio", ratio)


def _build_metric(name: str, estimate: ComparisonEstimate | None) -> ComparisonMetric:
    if estimate is None:
        return ComparisonMetric(name)
    # The last digits of a sum can differ between machines.
    return ComparisonMetric(name, round(estimate.value, 6), round(estimate.low, 6), round(estimate.high, 6), estimate.n)


def _to_model_ref(model: ReportedModel) -> ModelRef:
    return ModelRef(model.name, model.version, model.digest)
