"""Inspection of a labelled set for poisoned data: all checks, with what they measured. Deterministic and bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
import numpy as np

from outstation.ml.poisoning import copies, label_flips, labelled_windows, neighbours, providers, triggers
from outstation.ml.poisoning.findings import Finding
from outstation.ml.poisoning.labelled_windows import MAX_CLASSES, LabelledWindows
from outstation.ml.poisoning.providers import Provider

MIN_WINDOWS = 100
State = Literal["passed", "warning", "not checked"]


class PoisoningReport(msgspec.Struct, frozen=True):
    """`windows` were inspected; `contradicted` is the share whose labels contradict their surroundings.

    `reasons` say why a check, or all of them (state "not checked"), did not run.
    """

    state: State
    windows: int
    classes: int
    contradicted: float
    findings: list[Finding]
    providers: list[Provider]
    reasons: list[str]

    def describe(self, max_rows: int = 5) -> Iterator[str]:
        """Yield a line for each finding, or one that says that there is none, or why; then one for each omission."""
        if self.state == "not checked":
            yield f"not checked for poisoning: {self.reasons[0]}"
        elif self.state == "passed":
            yield (
                f"{self.windows} labelled windows checked for poisoning: nothing found "
                f"({self.contradicted:.1%} of the labels contradict their surroundings)"
            )
        for finding in self.findings:
            shown = ", ".join(map(str, finding.rows[:max_rows]))
            more = f" and {finding.n - max_rows} more" if finding.n > max_rows else ""
            rows = f"; look at rows {shown}{more}" if max_rows else ""
            yield f"{finding.check}: {finding.subject}: {finding.summary}{rows}"
        if self.state != "not checked":
            yield from self.reasons

    def without_small(self, min_count: int) -> PoisoningReport:
        """Return the report without findings and providers of fewer windows."""
        return msgspec.structs.replace(
            self,
            findings=[finding for finding in self.findings if finding.n >= min_count],
            providers=[provider for provider in self.providers if provider.n >= min_count],
        )


def not_checked(windows: int, classes: int, reason: str) -> PoisoningReport:
    return PoisoningReport("not checked", windows, classes, 0.0, [], [], [reason])


def inspect(given: LabelledWindows) -> PoisoningReport:
    """Run all checks that the set allows."""
    windows = given.thin()
    used, label = np.unique(windows.label, return_inverse=True)
    windows = msgspec.structs.replace(
        windows, label=label.astype(np.int64), labels=[windows.labels[i] for i in used.tolist()]
    )
    if reason := _find_obstacle(windows):
        return not_checked(len(windows), len(used), reason)
    summary = windows.summarize()
    features = neighbours.break_ties(labelled_windows.project(summary))
    candidates = neighbours.choose_candidates(windows.label, len(used))
    # A window is no neighbour of itself.
    shares = neighbours.estimate_shares(features, windows.label, np.arange(len(windows)), candidates, len(used))
    best, confident = neighbours.confident_classes(shares, windows.label, 0.5)
    findings = [
        *label_flips.find_flips(windows, shares),
        *triggers.find_triggers(windows, summary, candidates),
        *copies.find_copies(windows),
    ]
    measured: list[Provider] = []
    reasons = [*triggers.describe_omissions(windows)]
    if len(windows) < len(given):
        reasons.insert(0, f"{len(windows):,} of {len(given):,} windows were inspected, spread evenly")
    for kind in windows.providers:
        judged, departures = providers.measure(kind, windows, features, candidates)
        measured += judged
        findings += departures
        if reason := providers.explain_omission(kind, windows, judged):
            reasons.append(reason)
    contradicted = float((confident & (best != windows.label)).mean())
    state: State = "warning" if findings else "passed"
    return PoisoningReport(state, len(windows), len(used), contradicted, findings, measured, reasons)


def _find_obstacle(windows: LabelledWindows) -> str:
    if len(windows) < MIN_WINDOWS:
        return f"{len(windows)} labelled windows, the checks take {MIN_WINDOWS}"
    if not 2 <= len(windows.labels) <= MAX_CLASSES:
        return f"{len(windows.labels)} classes, the checks take 2 to {MAX_CLASSES}"
    return ""
