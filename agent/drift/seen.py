"""What drift windows say by themselves, whatever was before, and what a message says of them then."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.arrays import Floats, Ints
from agent.drift import sampling_rate_watch
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.summary import Summary
from agent.drift.faults import faults
from agent.drift.faults.faults import Signs
from agent.drift.reporting import drift_message
from agent.drift.reporting.drift_message import Told
from agent.drift.sampling_rate_watch import Tick, Watch
from agent.drift.testing.test_suite import Evidence, Tester


class Seen(msgspec.Struct, frozen=True):
    """Of W drift windows."""

    stack: Summary
    features: list[dict[str, Any]]
    output: list[dict[str, Any]]
    accuracy: list[dict[str, Any] | None]
    signs: Signs
    ticks: list[Tick]
    evidence: Evidence | None  # against the site's reference

    @classmethod
    def of(cls, stack: Summary, middle: Ints, shipped: Reference, tester: Tester | None, least: int) -> Seen:
        """Of stacked summaries in the `middle` of times (W,), epoch µs; `tester` is that of the site's reference."""
        return cls(
            stack,
            drift_message.features(stack, shipped, least),
            drift_message.output(stack, shipped, least),
            drift_message.accuracy(stack, shipped),
            faults.signs(stack, shipped, tester.site if tester else None),
            sampling_rate_watch.ticks(stack, middle, tester),
            tester.evidence(stack, middle) if tester else None,
        )

    def reported(
        self, some: slice, told: Told, now: Watch, paces: Floats, tester: Tester | None
    ) -> list[dict[str, Any]]:
        """The members of these windows' messages: see `describe.with_states` and `watch.with_rate`."""
        numbers = [
            {"features": features, "output": output, "estimate": accuracy}
            for features, output, accuracy in zip(
                self.features[some], self.output[some], self.accuracy[some], strict=True
            )
        ]
        return sampling_rate_watch.with_rate(
            drift_message.with_states(numbers, told, tester), now, paces, self.ticks[some], tester
        )
