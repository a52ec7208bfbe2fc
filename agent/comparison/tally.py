"""What two bundles made of the same windows, added up: the body of a `shadow` message, and back.

Counts add, moments merge (Chan, Golub & LeVeque 1979), in any order and grouping; `why` is that of the later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.wire.messages import Answered, Moments, Shadow

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Squares of what is beyond are no numbers any more, or no sum of them is.
_LARGEST = 1e100
_MOST_WHY = 500
NONE, NOTHING = Moments(), Answered(0, 0.0)


class Kind(msgspec.Struct, frozen=True):
    """What a bundle answers: `truth` is classify, several, regress or anomaly; `labels` it names classes by."""

    truth: str
    labels: tuple[str, ...] = ()

    def differs(self, other: Kind) -> str:
        """Why answers of the two cannot agree, as a sentence; "" where they can."""
        if self.truth != other.truth:
            return f"one bundle answers as {self.truth}, the other as {other.truth}: their answers cannot agree"
        if self.labels and other.labels and not set(self.labels) & set(other.labels):
            ours, theirs = _listed(self.labels), _listed(other.labels)
            return f"one bundle names {ours}, the other {theirs}: they have no label in common and cannot agree"
        return ""


class Said(msgspec.Struct, frozen=True):
    """What a bundle said of w windows that end at `row` (w,), ascending, in `seconds` in the model.

    `label` (w,) index of the class, or `several` (w, K) which are said, or `verdict` (w,) whether it is an anomaly;
    `score` (w,), `value` (w,); `chance` (w,) that the answer is right, by its score. NaN where it is not known.
    """

    row: Ints
    seconds: float
    label: Ints | None = None
    several: Bools | None = None
    verdict: Bools | None = None
    score: Floats | None = None
    value: Floats | None = None
    chance: Floats | None = None

    @property
    def number(self) -> Floats | None:
        """The score, or what stands in its place."""
        return self.value if self.score is None else self.score


class Tally(msgspec.Struct, frozen=True):
    """See `Shadow`. The empty tally changes nothing that it is added to."""

    batches: int = 0
    n: int = 0
    same: int | None = None
    apart: Moments = NONE
    model: Answered = NOTHING
    beside: Answered = NOTHING
    labelled: tuple[int, int, int, int] = (0, 0, 0, 0)
    errors: int = 0
    why: str = ""

    @classmethod
    def of(cls, message: Shadow) -> Tally:
        return cls(
            message.batches,
            message.n,
            message.same,
            message.apart,
            message.answered,
            message.answered_beside,
            message.labelled,
            message.errors,
            message.why,
        )

    def body(self) -> dict[str, Any]:
        """The members of a `shadow` message that are not who, what and where."""
        return {
            "batches": self.batches,
            "n": self.n,
            "same": self.same,
            "apart": msgspec.to_builtins(self.apart),
            "answered": msgspec.to_builtins(self.model),
            "answered_beside": msgspec.to_builtins(self.beside),
            "labelled": list(self.labelled),
            "errors": self.errors,
            "why": self.why,
        }

    def __add__(self, other: Tally) -> Tally:
        both, model_only, beside_only, neither = (a + b for a, b in zip(self.labelled, other.labelled, strict=True))
        return Tally(
            self.batches + other.batches,
            self.n + other.n,
            _same(self, other),
            merged(self.apart, other.apart),
            _together(self.model, other.model),
            _together(self.beside, other.beside),
            (both, model_only, beside_only, neither),
            self.errors + other.errors,
            other.why or self.why,
        )


def compared(kind: Kind, model: Said, other: Kind, beside: Said) -> Tally:
    """Of one batch. Windows are matched by the row they end at; those of one bundle alone agree with nothing."""
    _, ours, theirs = np.intersect1d(model.row, beside.row, assume_unique=True, return_indices=True)
    why = kind.differs(other)
    agree = None if why else _agree(kind, model, ours, other, beside, theirs)
    numbers, others = model.number, beside.number
    apart = Moments() if why or numbers is None or others is None else moments(others[theirs] - numbers[ours])
    return Tally(
        batches=1,
        n=len(ours),
        same=None if agree is None else int(agree.sum()),
        apart=apart,
        model=_answered(model, ours),
        beside=_answered(beside, theirs),
        why=why[:_MOST_WHY],
    )


def failed(why: str) -> Tally:
    """Of one batch in which `beside` failed."""
    return Tally(batches=1, errors=1, why=" ".join(why.split())[:_MOST_WHY])


def labelled(model_right: Sequence[bool], beside_right: Sequence[bool]) -> Tally:
    """Of labelled windows: in which each of the two was right."""
    ours, theirs = np.asarray(model_right, bool), np.asarray(beside_right, bool)
    counts = [ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs]
    both, model_only, beside_only, neither = (int(one.sum()) for one in counts)
    return Tally(
        model=Answered(0, 0.0, right=both + model_only),
        beside=Answered(0, 0.0, right=both + beside_only),
        labelled=(both, model_only, beside_only, neither),
    )


def off(model_off: Floats, beside_off: Floats) -> Tally:
    """Of windows labelled with numbers: by how much, without sign, each of the two was off."""
    known = _known(model_off) & _known(beside_off)
    return Tally(
        model=Answered(0, 0.0, off=moments(model_off[known])), beside=Answered(0, 0.0, off=moments(beside_off[known]))
    )


def moments(values: Floats) -> Moments:
    """Of those that are numbers."""
    known = np.asarray(values, np.float64)
    known = known[_known(known)]
    if not len(known):
        return Moments()
    mean = float(known.mean())
    return Moments(len(known), mean, float(np.square(known - mean).sum()))


def merged(a: Moments, b: Moments) -> Moments:
    n = a.n + b.n
    if not a.n or not b.n:
        return a if a.n else b
    apart = b.mean - a.mean
    return Moments(n, a.mean + apart * (b.n / n), a.m2 + b.m2 + apart * apart * (a.n * b.n / n))


def _same(a: Tally, b: Tally) -> int | None:
    """Where one of the two had nothing to agree on, their sum would count windows that nobody compared."""
    if not a.n or not b.n:
        return a.same if a.n else b.same
    return None if a.same is None or b.same is None else a.same + b.same


def _together(a: Answered, b: Answered) -> Answered:
    return Answered(
        a.windows + b.windows,
        a.seconds + b.seconds,
        merged(a.scores, b.scores),
        merged(a.expected, b.expected),
        a.right + b.right,
        merged(a.off, b.off),
    )


def _answered(said: Said, matched: Ints) -> Answered:
    """What is expected is told of the same windows of both, so that it compares."""
    scores = Moments() if said.number is None else moments(said.number)
    expected = Moments() if said.chance is None else moments(said.chance[matched])
    return Answered(len(said.row), max(0.0, said.seconds), scores, expected)


def _agree(kind: Kind, model: Said, ours: Ints, other: Kind, beside: Said, theirs: Ints) -> Bools | None:
    """(n,) whether the matched windows were answered alike; None where answers are numbers."""
    if model.label is not None and beside.label is not None:
        # Labels by name: their order may be another one.
        names = {name: index for index, name in enumerate(kind.labels)}
        index = np.array([names.get(name, -1) for name in other.labels], np.int64)
        return np.asarray(model.label[ours] == index[beside.label[theirs]])
    if model.several is not None and beside.several is not None:
        union = sorted({*kind.labels, *other.labels})
        return np.asarray(
            (_spread(model.several[ours], kind, union) == _spread(beside.several[theirs], other, union)).all(axis=1)
        )
    if model.verdict is not None and beside.verdict is not None:
        return np.asarray(model.verdict[ours] == beside.verdict[theirs])
    return None


def _spread(said: Bools, kind: Kind, union: Sequence[str]) -> Bools:
    """Columns (n, K) of the kind's labels among those of all."""
    found = np.zeros((len(said), len(union)), bool)
    found[:, [union.index(name) for name in kind.labels]] = said
    return found


def _known(values: Floats) -> Bools:
    return np.asarray(np.abs(values) <= _LARGEST)


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (", …" if len(labels) > 4 else "")
