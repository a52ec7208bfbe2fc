"""Drift message: counts, moments and divergences of a drift window against the shipped reference.

It holds no value of a row and no extreme of the data. Moments are exact, as rounding would be lost to every merge;
divergences are for people and have 3 digits. `outstation.protocol.wire.privacy.least_count` limits what of it leaves
the device.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import astuple

from outstation.foundation.arrays import Float64s, Ints, any_true
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.sampling import SamplingIntervals
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.detectors.detector import JOINT, SCORE, SUBJECTS
from outstation.ml.drift.detectors.registry import ScoreLayout
from outstation.ml.drift.numeric import divergence
from outstation.ml.drift.numeric.sums import GroupSums
from outstation.ml.drift.outputs import reference as further_outputs
from outstation.ml.drift.sequential.test_suite import DriftTester
from outstation.ml.performance import cbpe

STATES_BY_SEVERITY = ("fault", "drift", "insufficient", "ok")


class MessageSums(msgspec.Struct, frozen=True, eq=False):
    """Sums over the drift windows of a message; with M in front of all shapes for M messages."""

    counts: Ints  # (F, 34)
    missing: Ints  # (F,)
    row_n: Ints  # (1, F)
    row_total: Float64s
    row_squares: Float64s
    output: Ints  # (C,)
    scores: Ints  # (32,)
    interval_steps: Ints  # (48,)
    interval_total_us: Ints
    repeated: Ints  # (1,)
    further: Ints  # (X,)
    errors: Ints  # (E,)

    @classmethod
    def from_summaries(cls, windows: Summary, index: slice) -> MessageSums:
        """Add up these windows of a stack."""
        rows, sampling = windows.row_sums, windows.sampling
        parts: tuple[Any, ...] = (
            *(windows.counts, windows.missing, rows.n, rows.total, rows.squares, windows.output, windows.scores),
            *(sampling.steps, sampling.total_us, sampling.repeated, windows.further, windows.errors),
        )
        return cls(*(part[index].sum(0) for part in parts))

    @classmethod
    def stack(cls, sums: Sequence[MessageSums]) -> MessageSums:
        return cls(*(np.array(parts) for parts in zip(*map(astuple, sums), strict=True)))

    def __add__(self, other: MessageSums) -> MessageSums:
        return MessageSums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def row_sums(self) -> GroupSums:
        return GroupSums(self.row_n, self.row_total, self.row_squares)

    @property
    def mean_step_us(self) -> Float64s:
        """(M,) mean interval of rows, NaN if unknown."""
        return SamplingIntervals(self.interval_steps, self.interval_total_us, self.repeated).mean_step_us()

    @property
    def repeated_share(self) -> Float64s:
        """(M,) share of rows that repeat the row before."""
        rows = self.counts[:, 0].sum(-1) + self.missing[:, 0]
        return np.asarray(self.repeated[:, 0] / np.maximum(1, rows))


def build_features(sums: MessageSums, shipped: Reference) -> list[dict[str, Any]]:
    """Return each field's numbers, per message of a stack."""
    moments = sums.row_sums.moments(shipped.origin[: len(shipped.fields)])
    sizes = divergence.compare_counts(sums.counts, shipped.bin_shares, shipped.bounds, shipped.sd)
    sized = round_effect_size(sizes).tolist()
    columns = (
        sums.counts.tolist(),
        sums.missing.tolist(),
        to_compact_numbers(moments.mean[:, 0]),
        to_compact_numbers(moments.m2[:, 0]),
        sized,
    )
    return [
        {
            name: {
                "counts": bins[1:-1],
                "missing": missing,
                "below": bins[0],
                "above": bins[-1],
                "mean": mean,
                "m2": m2,
                "psi": psi,
                "js": js,
                "ks": ks,
                "w1": w1,
            }
            for name, bins, missing, mean, m2, (psi, js, ks, w1) in zip(shipped.fields, *numbers, strict=True)
        }
        for numbers in zip(*columns, strict=True)
    ]


def build_output(sums: MessageSums, shipped: Reference) -> list[dict[str, Any]]:
    """Return the predictions of each class, or by their certainty, and further outputs, per message of a stack."""
    members = _build_main_output(sums, shipped)
    if shipped.further:
        further = [further_outputs.build_members(shipped.further, counts) for counts in sums.further]
        members = [own | {"further": more} for own, more in zip(members, further, strict=True)]
    return members


def _build_main_output(sums: MessageSums, shipped: Reference) -> list[dict[str, Any]]:
    if not shipped.labels:
        psi = round_effect_size(divergence.psi(shipped.score_n, sums.scores))
        return [{"counts": n, "psi": far} for n, far in zip(sums.scores.tolist(), psi.tolist(), strict=True)]
    psi = round_effect_size(divergence.psi(shipped.output, sums.output))
    named = [
        {label: n for label, n in zip(shipped.labels, counts, strict=True) if n} for counts in sums.output.tolist()
    ]
    return [{"counts": n, "psi": far} for n, far in zip(named, psi.tolist(), strict=True)]


def build_estimates(sums: MessageSums, shipped: Reference) -> list[dict[str, Any] | None]:
    """Return the expected accuracy or error per message of a stack; None if the reference knows no held-out labels."""
    if shipped.error is not None:
        return [shipped.error.estimate(errors) for errors in sums.errors]
    if shipped.score_correct is None:
        return [None] * len(sums.scores)
    right = shipped.bin_accuracy
    return [cbpe.estimate_accuracy(shipped.score_n, shipped.score_correct, scores, right) for scores in sums.scores]


class SuiteStatus(msgspec.Struct, frozen=True, eq=False):
    """State of the tests after the last drift window of a message."""

    cusum_sums: Float64s  # (2, T)
    caution: Float64s  # (T,) factor on their limits
    layout: ScoreLayout
    drifting: list[bool]  # of each subject
    faults: tuple[str | None, ...]  # the fault of each field
    tested: bool
    answers_tested: bool = True


def add_states(numbers: dict[str, Any], status: SuiteStatus, tester: DriftTester | None) -> dict[str, Any]:
    """Add sums, limits and states, of each field and overall, to the members of a message."""
    layout, faults, fields = status.layout, status.faults, len(status.faults)
    limit = tester.limits.limit * status.caution if tester else None
    certainty, pair = (_find_nearest_test(status, limit, fields + SUBJECTS.index(name)) for name in (SCORE, JOINT))
    tests = [*layout.field_tests.ravel().tolist(), *(test for test in (certainty, pair) if test is not None)]
    raw = status.cusum_sums
    if limit is not None:
        # A field has one limit, that of its mean; its spread's sums are scaled to it.
        mean, spread = layout.field_tests[:, 0], layout.field_tests[:, 1]
        raw = raw.copy()
        raw[:, spread] *= limit[mean] / limit[spread]
    rounded = to_compact_numbers(np.round(raw[:, tests].T, 2))
    limits = [None] * len(tests) if limit is None else limit[tests].round(2).tolist()
    sums = dict(zip(tests, zip(rounded, limits, strict=True), strict=True))
    score_sums, score_limit = ([0, 0], None) if certainty is None else sums[certainty]
    joint_sums, joint_limit = ([0], None) if pair is None else sums[pair]
    quiet = "ok" if status.tested else "insufficient"
    states = [
        "fault" if fault else "drift" if on else quiet
        for fault, on in zip(faults, status.drifting[:fields], strict=True)
    ]
    unknown = quiet if status.answers_tested else "insufficient"
    output, score, joint_state = (
        "drift" if on else usual for on, usual in zip(status.drifting[fields:], (unknown, unknown, quiet), strict=False)
    )
    further_states = ["drift" if on else unknown for on in status.drifting[fields + len(SUBJECTS) :]]
    more = _add_further_states(numbers["output"].get("further"), further_states, status, limit)
    return numbers | {
        "features": {
            name: feature | {"cusum": _field_sums(layout, tests, sums), "state": now, "fault": fault}
            for (name, feature), tests, now, fault in zip(
                numbers["features"].items(), layout.field_tests.tolist(), states, faults, strict=True
            )
        },
        "output": numbers["output"]
        | more
        | {"state": output, "score": {"cusum": score_sums, "limit": score_limit, "state": score}},
        "joint": {"cusum": max(joint_sums), "limit": joint_limit, "state": joint_state},
        "state": worst_state({*states, *further_states, output, score, joint_state}),
    }


def _add_further_states(
    further: dict[str, Any] | None, states: Sequence[str], status: SuiteStatus, limit: Float64s | None
) -> dict[str, Any]:
    """Add the sums nearest to their limits, and the states, of further outputs."""
    if further is None:
        return {}
    members: dict[str, Any] = {}
    first = len(status.faults) + len(SUBJECTS)
    for at, ((name, member), state) in enumerate(zip(further.items(), states, strict=True)):
        test = _find_nearest_test(status, limit, first + at)
        sums = [0, 0] if test is None else to_compact_numbers(status.cusum_sums[:, test].round(2))
        own_limit = None if test is None or limit is None else round(float(limit[test]), 2)
        members[name] = member | {"cusum": sums, "limit": own_limit, "state": state}
    return {"further": members}


def _find_nearest_test(status: SuiteStatus, limit: Float64s | None, subject: int) -> int | None:
    """Return the test of a subject whose sum is nearest to its `limit` (T,); None if the subject has no test."""
    tests = status.layout.tests[subject]
    if len(tests) < 2:
        return int(tests[0]) if len(tests) else None
    highest = status.cusum_sums[:, tests].max(0)
    return int(tests[(highest if limit is None else highest / limit[tests]).argmax()])


def _field_sums(layout: ScoreLayout, tests: list[int], sums: dict[int, tuple[Any, float | None]]) -> dict[str, Any]:
    """Return the sums of a field's mean and spread with the mean's limit, then those of other detectors of fields."""
    mean, spread, *others = layout.field_sums
    sums_of_mean, limit = sums[tests[0]]
    own = {mean: sums_of_mean, spread: sums[tests[1]][0], "limit": limit}
    for name, test in zip(others, tests[2:], strict=True):
        both, limit = sums[test]
        own[name] = {"cusum": both, "limit": limit}
    return own


def worst_state(states: Set[str]) -> str:
    return next(state for state in STATES_BY_SEVERITY if state in states)


def round_effect_size(size: Float64s) -> Float64s:
    """Round to 3 digits and at most 4 decimals."""
    out = size.round(4)
    for least, decimals in ((0.1, 3), (1.0, 2), (10.0, 1)):
        large = out >= least
        if not any_true(large):
            break
        out = np.where(large, size.round(decimals), out)
    return np.asarray(out)


def to_compact_numbers(values: Float64s) -> list[Any]:
    """Return values as lists of numbers in the fewest characters: JSON says 0 where a float would be 0.0."""
    near = (values == np.rint(values)) & (np.abs(values) < 1e6)
    if not any_true(near):
        return list(values.tolist())
    mixed = values.astype(object)
    mixed[near] = values[near].astype(np.int64).tolist()
    return list(mixed.tolist())
