"""What drift windows say by themselves, whatever was before, and what a message says of them then."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.arrays import Float64s, Ints
from agent.drift import sampling_rate_watch
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.summary import Summary
from agent.drift.faults import faults
from agent.drift.faults.faults import FaultIndicators
from agent.drift.reporting import drift_message
from agent.drift.reporting.drift_message import SuiteStatus
from agent.drift.sampling_rate_watch import RateObservation, SamplingRateWatch
from agent.drift.testing.test_suite import DriftTester, Evidence


class WindowAnalysis(msgspec.Struct, frozen=True):
    """Of W drift windows."""

    summaries: Summary
    features: list[dict[str, Any]]
    output: list[dict[str, Any]]
    accuracy: list[dict[str, Any] | None]
    indicators: FaultIndicators
    rate_observations: list[RateObservation]
    evidence: Evidence | None  # against the site's reference

    @classmethod
    def from_summaries(
        cls, summaries: Summary, midpoints: Ints, shipped: Reference, tester: DriftTester | None, min_bin_rows: int
    ) -> WindowAnalysis:
        """Of stacked summaries in the `middle` of times (W,), epoch µs; `tester` is that of the site's reference."""
        return cls(
            summaries,
            drift_message.build_features(summaries, shipped, min_bin_rows),
            drift_message.build_output(summaries, shipped, min_bin_rows),
            drift_message.build_estimates(summaries, shipped),
            faults.compute_indicators(summaries, shipped, tester.reference if tester else None),
            sampling_rate_watch.observe_rate(summaries, midpoints, tester),
            tester.compute_evidence(summaries, midpoints) if tester else None,
        )

    def build_members(
        self,
        index: slice,
        status: SuiteStatus,
        rate_watch: SamplingRateWatch,
        speed_sums: Float64s,
        tester: DriftTester | None,
    ) -> list[dict[str, Any]]:
        """The members of these windows' messages: see `describe.with_states` and `watch.with_rate`."""
        numbers = [
            {"features": features, "output": output, "estimate": accuracy}
            for features, output, accuracy in zip(
                self.features[index], self.output[index], self.accuracy[index], strict=True
            )
        ]
        return sampling_rate_watch.add_rate(
            drift_message.add_states(numbers, status, tester),
            rate_watch,
            speed_sums,
            self.rate_observations[index],
            tester,
        )
