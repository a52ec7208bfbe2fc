"""What drift windows say by themselves, whatever was before, and what a message says of them then."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.drift import describe, faults, watch
from agent.drift.codec import Floats, Ints
from agent.drift.describe import Told
from agent.drift.detectors import Evidence, Tester
from agent.drift.faults import Signs
from agent.drift.reference import Reference
from agent.drift.summary import Summary
from agent.drift.watch import Tick, Watch


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
            describe.features(stack, shipped, least),
            describe.output(stack, shipped, least),
            describe.accuracy(stack, shipped),
            faults.signs(stack, shipped, tester.site if tester else None),
            watch.ticks(stack, middle, tester),
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
        return watch.with_rate(describe.with_states(numbers, told, tester), now, paces, self.ticks[some], tester)
