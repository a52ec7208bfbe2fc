"""What the members of a drift message say, read back: by who looks at many of them.

They come from a device that may be of another version, or not itself: what does not fit is refused as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Ints
from agent.drift.baseline.reference import Reference
from agent.drift.numeric import divergence

MOST_FIELDS = 256
UNTESTED = "untested"
# No window holds so many rows; a sum over a few million windows is still exact.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
# Far beyond what a sensor says, and far from where squares and sums of them overflow.
Value = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]
Squares = Annotated[float, msgspec.Meta(ge=0, le=1e200)]
Evidence = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Sums = Annotated[list[Evidence], msgspec.Meta(max_length=2)]


class FieldCusum(msgspec.Struct, frozen=True):
    mean: Sums = []
    spread: Sums = []
    limit: Evidence | None = None


class Field(msgspec.Struct, frozen=True):
    """Of one field in one drift window."""

    counts: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=256)]
    missing: Count
    below: Count
    above: Count
    mean: Value
    m2: Squares
    state: str
    cusum: FieldCusum = FieldCusum()

    @property
    def n(self) -> int:
        return sum(self.counts) + self.below + self.above

    def histogram(self) -> Ints:
        """Below, bins, above."""
        return np.array([self.below, *self.counts, self.above], np.int64)


class _Score(msgspec.Struct, frozen=True):
    state: str = "insufficient"
    cusum: Sums = []
    limit: Evidence | None = None


class _Output(msgspec.Struct, frozen=True):
    state: str = "insufficient"
    score: _Score | None = None


class _Joint(msgspec.Struct, frozen=True):
    state: str = "insufficient"
    cusum: Evidence = 0.0
    limit: Evidence | None = None


class _Estimate(msgspec.Struct, frozen=True):
    """One of another kind has no accuracy."""

    low: Share = 0.0
    high: Share = 1.0
    accuracy: Share | None = None


class Subject(msgspec.Struct, frozen=True):
    """What is told of a field, of the answers ("output", "score") or of all fields together ("joint").

    `state`: ok, drift, fault, insufficient (nothing to compare with yet), or untested (another field had a fault).
    """

    state: str
    mean: float  # the larger of the two one-sided sums
    spread: float
    limit: float | None


class Reported(msgspec.Struct, frozen=True):
    """One drift window; times are epoch µs. `accuracy` is the estimate with its interval."""

    t: tuple[int, int]
    state: str
    fields: dict[str, Field]
    subjects: dict[str, Subject]
    accuracy: tuple[float, float, float] | None


_FIELDS = msgspec.json.Decoder(dict[str, Field])
_OUTPUT = msgspec.json.Decoder(_Output)
_JOINT = msgspec.json.Decoder(_Joint | None)
_ESTIMATE = msgspec.json.Decoder(_Estimate | None)


def read(
    t: tuple[int, int],
    state: str,
    features: str | bytes,
    output: str | bytes,
    joint: str | bytes,
    estimate: str | bytes,
) -> Reported:
    """Of the message's members as JSON, `null` for none. Raises ValueError."""
    try:
        fields = _FIELDS.decode(features)
        found = (_OUTPUT.decode(output), _JOINT.decode(joint), _ESTIMATE.decode(estimate))
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(str(error)) from error
    if not 0 < len(fields) <= MOST_FIELDS:
        raise ValueError(f"{len(fields)} fields")
    answers, together, expected = found
    accuracy = None
    if expected is not None and expected.accuracy is not None:
        accuracy = (expected.accuracy, expected.low, expected.high)
    subjects = dict(_subjects(fields, answers, together))
    if state == "fault":
        subjects = {name: _kept_out(subject) for name, subject in subjects.items()}
    return Reported(t, state, fields, subjects, accuracy)


def from_message(body: dict[str, Any], t: tuple[int, int]) -> Reported:
    """Of a whole message. Raises ValueError."""
    members = [msgspec.json.encode(body.get(name)) for name in ("features", "output", "joint", "estimate")]
    return read(t, str(body.get("state")), *members)


def _subjects(fields: dict[str, Field], output: _Output, joint: _Joint | None) -> Iterator[tuple[str, Subject]]:
    for name, field in fields.items():
        yield name, Subject(field.state, *_largest(field.cusum), field.cusum.limit)
    yield "output", Subject(output.state, 0.0, 0.0, None)
    if output.score is not None:
        yield "score", Subject(output.score.state, max(output.score.cusum, default=0.0), 0.0, output.score.limit)
    if joint is not None:
        yield "joint", Subject(joint.state, joint.cusum, 0.0, joint.limit)


def _kept_out(subject: Subject) -> Subject:
    """Beside a field with a fault the others are not tested: that is another thing than to be still learned."""
    return replace(subject, state=UNTESTED) if subject.state == "insufficient" else subject


def _largest(cusum: FieldCusum) -> tuple[float, float]:
    return max(cusum.mean, default=0.0), max(cusum.spread, default=0.0)


def from_reference(reference: Reference, name: str, counts: Ints) -> dict[str, float] | None:
    """Effect sizes between a reference's rows of a field and those of a histogram (34,) on its bins, to 4 decimals.

    None where it is no such histogram.
    """
    if name not in reference.fields:
        return None
    field = reference.fields.index(name)
    if counts.shape != reference.counts[field].shape:
        return None
    sized = divergence.four(
        reference.shares[field],
        divergence.shares(divergence.folded(counts)),
        reference.bounds[field],
        reference.sd[field],
    )
    return dict(zip(("psi", "js", "ks", "w1"), np.round(sized, 4).tolist(), strict=True))


def apart(usual: Ints, other: Ints) -> dict[str, float]:
    """Effect sizes between two histograms (34,), as drift messages name them, to 4 decimals."""
    p, q = divergence.folded(usual), divergence.folded(other)
    return {
        name: round(float(size(p, q)), 4)
        for name, size in (("psi", divergence.psi), ("js", divergence.js), ("ks", divergence.ks))
    }
