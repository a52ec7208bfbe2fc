"""Parsed drift messages, for readers of many.

A message comes from a device that may have another version, or be an impostor: one that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation import decoders
from outstation.foundation.arrays import Ints
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.numeric import divergence
from outstation.ml.drift.outputs.reference import MAX_OUTPUTS
from outstation.protocol.alerts.alert import OUTPUT_PREFIX
from outstation.protocol.wire import runs
from outstation.protocol.wire.desired_state import Name
from outstation.protocol.wire.runs import MAX_QUIET_WINDOWS, EpochMicroseconds, JitteredTimes, TimeRun

MAX_FIELDS = 256
UNTESTED = "untested"
MEMBERS = ("features", "output", "joint", "estimate", "windows")
# No window holds as many rows; a sum over a few million windows is still exact.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
# Far beyond any sensor, and far from where their squares and sums overflow.
Value = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]
Squares = Annotated[float, msgspec.Meta(ge=0, le=1e200)]
CusumValue = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
ErrorValue = Annotated[float, msgspec.Meta(ge=0, le=1e100)]
CusumSides = Annotated[list[CusumValue], msgspec.Meta(max_length=2)]


class FieldCusum(msgspec.Struct, frozen=True, gc=False):
    mean: CusumSides = []
    spread: CusumSides = []
    limit: CusumValue | None = None


class FieldReport(msgspec.Struct, frozen=True, gc=False):
    """One field in one drift window. Too few readings are `withheld`, with their moments."""

    counts: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=256)]
    missing: Count
    below: Count
    above: Count
    mean: Value | None
    m2: Squares | None
    state: str
    cusum: FieldCusum = FieldCusum()
    withheld: Count = 0

    @property
    def n(self) -> int:
        return sum(self.counts) + self.below + self.above

    def histogram(self) -> Ints:
        """Return the counts below, in the bins and above."""
        return np.array([self.below, *self.counts, self.above], np.int64)


class _Score(msgspec.Struct, frozen=True):
    state: str = "insufficient"
    cusum: CusumSides = []
    limit: CusumValue | None = None


class _Joint(msgspec.Struct, frozen=True):
    state: str = "insufficient"
    cusum: CusumValue | None = None
    limit: CusumValue | None = None


class _Estimate(msgspec.Struct, frozen=True):
    """Estimate; one of another kind has neither accuracy nor error."""

    low: Share = 0.0
    high: Share = 1.0
    accuracy: Share | None = None
    mae: ErrorValue | None = None
    mae_low: ErrorValue = 0.0
    mae_high: ErrorValue = 0.0
    outside: bool = False

    def to_performance(self) -> ExpectedPerformance | None:
        if self.accuracy is not None:
            return ExpectedPerformance(self.accuracy, self.low, self.high, is_contradicted=self.outside)
        if self.mae is not None:
            return ExpectedPerformance(self.mae, self.mae_low, self.mae_high, True, self.outside)
        return None


class _FurtherOutput(_Score, frozen=True):
    estimate: _Estimate | None = None


class _Output(msgspec.Struct, frozen=True):
    state: str = "insufficient"
    score: _Score | None = None
    further: Annotated[dict[Name, _FurtherOutput], msgspec.Meta(max_length=MAX_OUTPUTS)] = {}


class ExpectedPerformance(msgspec.Struct, frozen=True):
    """Accuracy, or mean absolute error, that is expected without labels, and its interval.

    `is_contradicted`: labels show that it is wrong.
    """

    value: float
    low: float
    high: float
    is_error: bool = False
    is_contradicted: bool = False

    @property
    def name(self) -> str:
        return "mae" if self.is_error else "accuracy"

    def find_worse(self, other: ExpectedPerformance | None) -> ExpectedPerformance:
        if other is None:
            return self
        return max(self, other, key=lambda part: part.value if part.is_error else -part.value)


class SubjectReport(msgspec.Struct, frozen=True, gc=False):
    """Report of a field, the predictions ("output"), a further output ("output.NAME"), the certainty ("score") or all
    fields together ("joint").

    `state`: ok, drift, fault, insufficient (nothing to compare with yet), or untested (another field had a fault).
    """

    state: str
    mean: float  # the larger of the two one-sided sums
    spread: float
    limit: float | None


class WindowReport(msgspec.Struct, frozen=True):
    """One drift window, or a run of quiet ones; times are epoch µs.

    Fields cover the whole run, subjects tell the state after it. `ends` and `nearest` have an entry for each window:
    when it ended, and the largest sum of a test then as a share of its limit, None while there are no limits.
    `further_expected` is of the further outputs that have it.
    """

    t: tuple[int, int]
    state: str
    fields: dict[str, FieldReport]
    subjects: dict[str, SubjectReport]
    expected: ExpectedPerformance | None
    ends: Sequence[int]
    nearest: Sequence[float | None]
    further_expected: Mapping[str, ExpectedPerformance] = {}

    @property
    def windows(self) -> int:
        return len(self.ends)


class _QuietEnds(msgspec.Struct, frozen=True, gc=False):
    """Ends of a run of quiet windows; a device's message was checked in full when it arrived."""

    to: list[EpochMicroseconds | TimeRun] | JitteredTimes
    nearest: Annotated[list[Share | None], msgspec.Meta(min_length=2, max_length=MAX_QUIET_WINDOWS)]

    def __post_init__(self) -> None:
        if (length := runs.count_entries(self.to)) != len(self.nearest):
            raise ValueError(f"column to has {length} entries, nearest has {len(self.nearest)}")
        runs.check_range(self.to, -(2**63), 2**63 - 1)


_FIELDS = decoders.json_decoder(dict[str, FieldReport])
_OUTPUT = decoders.json_decoder(_Output)
_JOINT = decoders.json_decoder(_Joint | None)
_ESTIMATE = decoders.json_decoder(_Estimate | None)
_WINDOWS = decoders.json_decoder(_QuietEnds | None)


def parse_members(
    t: tuple[int, int],
    state: str,
    features: str | bytes,
    output: str | bytes,
    joint: str | bytes,
    estimate: str | bytes,
    windows: str | bytes,
) -> WindowReport:
    """Parse a message's members given as JSON, `null` for none. Raises ValueError."""
    try:
        fields = _FIELDS.decode(features)
        decoded = (_OUTPUT.decode(output), _JOINT.decode(joint), _ESTIMATE.decode(estimate))
        run = _WINDOWS.decode(windows)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(str(error)) from error
    if not 0 < len(fields) <= MAX_FIELDS:
        raise ValueError(f"{len(fields)} fields")
    predictions, all_fields, estimated = decoded
    expected = None if estimated is None else estimated.to_performance()
    further = {
        name: known
        for name, output in predictions.further.items()
        if output.estimate is not None and (known := output.estimate.to_performance()) is not None
    }
    subjects = dict(_subject_reports(fields, predictions, all_fields))
    if state == "fault":
        subjects = {name: _mark_untested(subject) for name, subject in subjects.items()}
    if run is not None:
        return WindowReport(t, state, fields, subjects, expected, runs.expand_integers(run.to), run.nearest, further)
    shares = [max(s.mean, s.spread) / s.limit for s in subjects.values() if s.limit]
    return WindowReport(t, state, fields, subjects, expected, [t[1]], [max(shares, default=None)], further)


def from_message(body: dict[str, Any], t: tuple[int, int]) -> WindowReport:
    """Parse a whole message. Raises ValueError."""
    members = [msgspec.json.encode(body.get(name)) for name in MEMBERS]
    return parse_members(t, str(body.get("state")), *members)


def _subject_reports(
    fields: dict[str, FieldReport], output: _Output, joint: _Joint | None
) -> Iterator[tuple[str, SubjectReport]]:
    for name, field in fields.items():
        yield name, SubjectReport(field.state, *_largest_sums(field.cusum), field.cusum.limit)
    yield "output", SubjectReport(output.state, 0.0, 0.0, None)
    for name, further in output.further.items():
        yield OUTPUT_PREFIX + name, SubjectReport(further.state, max(further.cusum, default=0.0), 0.0, further.limit)
    if output.score is not None:
        yield "score", SubjectReport(output.score.state, max(output.score.cusum, default=0.0), 0.0, output.score.limit)
    if joint is not None:
        yield "joint", SubjectReport(joint.state, joint.cusum or 0.0, 0.0, joint.limit)


def _mark_untested(subject: SubjectReport) -> SubjectReport:
    """Mark a subject beside a field with a fault as untested, which is not the same as still being learned."""
    return replace(subject, state=UNTESTED) if subject.state == "insufficient" else subject


def _largest_sums(cusum: FieldCusum) -> tuple[float, float]:
    return max(cusum.mean, default=0.0), max(cusum.spread, default=0.0)


def effect_sizes_to_reference(reference: Reference, name: str, counts: Ints) -> dict[str, float] | None:
    """Return divergences between a reference's rows of a field and a histogram (34,) on its bins, to 4 decimals.

    None if the histogram does not fit.
    """
    if name not in reference.fields:
        return None
    field = reference.fields.index(name)
    if counts.shape != reference.counts[field].shape:
        return None
    sized = divergence.compute_all(
        reference.bin_shares[field],
        divergence.shares(divergence.fold_outer_bins(counts)),
        reference.bounds[field],
        reference.sd[field],
    )
    return dict(zip(("psi", "js", "ks", "w1"), np.round(sized, 4).tolist(), strict=True))


def effect_sizes(reference_counts: Ints, counts: Ints) -> dict[str, float]:
    """Return divergences between two histograms (34,), named as in drift messages, to 4 decimals."""
    p, q = divergence.fold_outer_bins(reference_counts), divergence.fold_outer_bins(counts)
    return {
        name: round(float(size(p, q)), 4)
        for name, size in (("psi", divergence.psi), ("js", divergence.js), ("ks", divergence.ks))
    }
