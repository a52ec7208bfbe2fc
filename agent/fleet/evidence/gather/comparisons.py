"""What devices told of two bundles on the same windows: figures with their intervals, counted from signed messages.

Counted once when a folder is made and again when it is verified, by the code that devices themselves judge by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from agent.comparison import paired_intervals
from agent.comparison.paired_intervals import ComparisonBlock, ComparisonEstimate
from agent.comparison.tally import ComparisonStats
from agent.fleet.evidence.format.contents import WRITE_LIMITS, BundleComparison, ComparisonMetric, MessageRef, ModelRef
from agent.wire.messages import ModelRef as Told
from agent.wire.messages import ShadowPayload

_ComparisonKey = tuple[str, str, str, str, str]


class ComparisonCollector(msgspec.Struct):
    """By roll-out, device, task and pair of bundles, messages as they come: by device, log and seq."""

    omitted: int = 0
    _messages: dict[_ComparisonKey, list[ShadowPayload]] = msgspec.field(default_factory=dict)
    _dropped: Counter[_ComparisonKey] = msgspec.field(default_factory=Counter)

    def add(self, body: ShadowPayload) -> None:
        key = (body.rollout, body.device, body.task, body.model.digest, body.other.digest)
        if key not in self._messages and len(self._messages) >= WRITE_LIMITS.comparisons:
            self.omitted += 1
            return
        of = self._messages.setdefault(key, [])
        of.append(body)
        if len(of) > WRITE_LIMITS.messages_per_comparison:
            # The newest stay: they lie beside one another, which intervals go by.
            del of[0]
            self._dropped[key] += 1

    def build_comparisons(self, digests: Mapping[str, str]) -> list[BundleComparison]:
        """`digests`: of the new bundle of each roll-out; the bundle beside is taken for it where that is not known."""
        return [
            compare_messages(told, new_is_shadow=digests.get(key[0]) != key[3], omitted=self._dropped[key])
            for key, told in sorted(self._messages.items())
        ]


def compare_messages(messages: Sequence[ShadowPayload], *, new_is_shadow: bool, omitted: int = 0) -> BundleComparison:
    """Of one device, roll-out, task and pair; `told` is not empty."""
    last = messages[-1]
    blocks = [ComparisonBlock(ComparisonStats.from_message(one)) for one in messages]
    total = sum((block.stats for block in blocks), ComparisonStats())
    return BundleComparison(
        rollout=last.rollout,
        device=last.device,
        task=last.task,
        new=_to_model_ref(last.other if new_is_shadow else last.model),
        old=_to_model_ref(last.model if new_is_shadow else last.other),
        new_is_beside=new_is_shadow,
        batches=total.batches,
        errors=total.errors,
        windows=total.n,
        same=total.agreeing,
        labelled=sum(total.labelled),
        figures=list(_compute_metrics(blocks, new_is_shadow)),
        places=[MessageRef(one.device, one.log, one.seq) for one in messages],
        left_out=omitted,
    )


def comparison_keys(messages: Iterable[ShadowPayload]) -> set[_ComparisonKey]:
    """What these are about: one of it, where they belong together."""
    return {(one.rollout, one.device, one.task, one.model.digest, one.other.digest) for one in messages}


def _compute_metrics(blocks: Sequence[ComparisonBlock], new_is_shadow: bool) -> Iterator[ComparisonMetric]:
    yield _build_metric("agreement", paired_intervals.agreement(blocks))
    yield _build_metric("time", paired_intervals.latency_ratio(blocks, new_is_other=new_is_shadow))
    if any(sum(one.stats.labelled) for one in blocks):
        yield _build_metric(
            "accuracy by labels", paired_intervals.labelled_accuracy_gain(blocks, new_is_other=new_is_shadow)
        )
    if any(one.stats.model.expected.n and one.stats.other.expected.n for one in blocks):
        yield _build_metric(
            "expected accuracy", paired_intervals.expected_accuracy_gain(blocks, new_is_other=new_is_shadow)
        )
    if any(one.stats.model.abs_error.n and one.stats.other.abs_error.n for one in blocks):
        yield _build_metric("error by labels", paired_intervals.error_ratio(blocks, new_is_other=new_is_shadow))


def _build_metric(name: str, estimate: ComparisonEstimate | None) -> ComparisonMetric:
    if estimate is None:
        return ComparisonMetric(name)
    # Sums of the same numbers can differ in the last digits from machine to machine.
    return ComparisonMetric(name, round(estimate.value, 6), round(estimate.low, 6), round(estimate.high, 6), estimate.n)


def _to_model_ref(model: Told) -> ModelRef:
    return ModelRef(model.name, model.version, model.digest)
