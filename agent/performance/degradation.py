"""Silent decay: labels, as they come, against what was promised. Tests in sequence, looked at as often as one likes.

Results that were labelled are taken in groups of GROUP, in the order their labels came. A group's mean loss (1 where
the answer was wrong, or how far off a number was) is compared with three things, each by a one-sided CUSUM (Page 1954):

- decay: the first BASELINE labels of this device
- evaluation: how often the bundle's own evaluation was right
- certainty: how often answers this sure were right there; labels that say less than that mean concept drift

A label that is put right after it was taken is as if it had been right from the start: `redo` takes all again.

A difference that matters to nobody (MARGINS) is allowed. An alert also needs the interval of the loss since the CUSUM
left zero to lie wholly above what it is compared with. Neighbours that are alike count for less (`intervals.design`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Floats
from agent.drift.reporting.alert_text import Alert
from agent.performance import intervals

GROUP, BASELINE = 25, 200
DECAY, EVALUATION, CERTAINTY = KINDS = ("decay", "evaluation", "certainty")
MARGINS = {DECAY: 0.02, EVALUATION: 0.05, CERTAINTY: 0.05}
# Of numbers: a share of the usual error.
_MARGIN_NUMBERS = 0.1
SLACK, LIMIT = 0.5, 6.0
# Groups in a row without a loss above what is allowed clear an alert.
CALM, _CALM_Z = 6, 1.0
# A model that was never wrong yet will be: pseudo-counts of one wrong and one right answer.
_PRIOR = 1.0
_ALIKE_MEMORY = 400


class Track(msgspec.Struct):
    """One comparison. `n` and `off`: labels since its CUSUM left zero, and the sum of their losses."""

    cusum: float = 0.0
    n: int = 0
    off: float = 0.0
    open: bool = False
    calm: int = 0
    raised: int = 0


class State(msgspec.Struct):
    """What is remembered of one bundle's labels; of constant size. `number` of the last label taken."""

    bundle: str
    number: int = 0
    first: int = 0  # number that the first label taken had when it came; 0 before any
    at_s: float = 0.0  # uptime of the last message
    rest: list[tuple[float, float | None]] = []  # losses of an open group, and what was expected of them
    recent: list[float] = []  # newest losses, for how alike neighbours are
    n: int = 0  # of the baseline
    off: float = 0.0
    square: float = 0.0
    tracks: dict[str, Track] = {}
    feedback: bool = False
    feedbacks: int = 0

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """Raises ValueError."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise ValueError(str(error)) from None


class Promise(msgspec.Struct, frozen=True):
    """Of a bundle's evaluation: how often it was right, of how many answers; None where that is not known."""

    accuracy: float | None = None
    n: int = 0


class Finding(msgspec.Struct, frozen=True):
    """A comparison that changed its mind, in numbers. `before` is the loss it is compared with."""

    kind: str
    state: str  # raised | cleared | corrected, which clears because labels were put right
    count: int
    loss: float
    low: float
    high: float
    before: float
    n: int


def take(
    state: State, losses: Sequence[float], expected: Sequence[float | None], promise: Promise, *, shares: bool
) -> list[Finding]:
    """Add labelled results to `state`, in the order their labels came; what that changed.

    `expected` is the loss that the model's certainty tells; `shares` where a loss is 0 or 1.
    """
    found: list[Finding] = []
    for loss, told in zip(losses, expected, strict=True):
        state.rest.append((float(loss), told))
        if len(state.rest) == GROUP:
            found += _group(state, promise, shares=shares)
            state.rest = []
    return found


def redo(
    state: State,
    losses: Sequence[float],
    expected: Sequence[float | None],
    promise: Promise,
    *,
    shares: bool,
    whole: bool,
) -> list[Finding]:
    """Take all labels that are kept anew, in the order they first came, since some were put right; what that changed.

    Where they are no longer the `whole` of what was taken, the baseline stays as it is.
    """
    fresh = State(state.bundle)
    if not whole and state.n >= BASELINE:
        fresh.n, fresh.off, fresh.square = state.n, state.off, state.square
    told = {(one.kind, one.state): one for one in take(fresh, losses, expected, promise, shares=shares)}
    found = []
    for kind, old in state.tracks.items():
        track = fresh.tracks.setdefault(kind, Track())
        # Ids go on counting: what was raised before stays known by its own.
        track.raised = old.raised
        if old.open and not track.open:
            loss = sum(losses) / max(1, len(losses))
            found.append(Finding(kind, "corrected", old.raised, loss, loss, loss, loss, len(losses)))
    for kind, track in fresh.tracks.items():
        old = state.tracks.get(kind, Track())
        if track.open and not old.open:
            track.raised = old.raised + 1
            found.append(replace(told[kind, "raised"], count=track.raised))
    state.rest, state.recent, state.tracks = fresh.rest, fresh.recent, fresh.tracks
    state.n, state.off, state.square = fresh.n, fresh.off, fresh.square
    return found


def _group(state: State, promise: Promise, *, shares: bool) -> list[Finding]:
    losses = np.array([loss for loss, _ in state.rest])
    state.recent = [*state.recent, *losses.tolist()][-_ALIKE_MEMORY:]
    alike = intervals.design(np.array(state.recent))
    found = []
    for kind in KINDS:
        against = _against(kind, state, promise, losses, shares=shares)
        if against is not None:
            found += _step(state.tracks.setdefault(kind, Track()), kind, losses, *against, alike, shares=shares)
    if state.n < BASELINE:
        state.n += GROUP
        state.off += float(losses.sum())
        state.square += float((losses**2).sum())
    return found


def _against(
    kind: str, state: State, promise: Promise, losses: Floats, *, shares: bool
) -> tuple[float, float, float] | None:
    """(loss that is compared with, variance of one loss, variance of the first); None where it is not known."""
    if kind == DECAY:
        if state.n < BASELINE:
            return None
        mean, variance = _baseline(state, shares=shares)
        return mean, variance, variance / state.n
    if not shares:
        return None
    if kind == EVALUATION:
        if promise.accuracy is None:
            return None
        mean = 1 - (promise.accuracy * promise.n + _PRIOR) / (promise.n + 2 * _PRIOR)
        return mean, mean * (1 - mean), mean * (1 - mean) / max(1, promise.n)
    told = [one for _, one in state.rest if one is not None]
    if len(told) < len(losses):
        return None
    return float(np.mean(told)), float(np.mean([one * (1 - one) for one in told])), 0.0


def _baseline(state: State, *, shares: bool) -> tuple[float, float]:
    if shares:
        mean = (state.off + _PRIOR) / (state.n + 2 * _PRIOR)
        return mean, mean * (1 - mean)
    mean = state.off / state.n
    return mean, max(state.square / state.n - mean**2, 1e-12)


def _step(
    track: Track, kind: str, losses: Floats, before: float, one: float, base: float, alike: float, *, shares: bool
) -> list[Finding]:
    # What is compared with is known from so many results only, and that error is in every group.
    margin = (MARGINS[kind] if shares else _MARGIN_NUMBERS * before) + math.sqrt(alike * base)
    z = (float(losses.mean()) - before - margin) / math.sqrt(max(alike * one / len(losses), 1e-12))
    track.cusum = max(0.0, track.cusum + z - SLACK)
    if track.cusum == 0.0 and not track.open:
        track.n, track.off = 0, 0.0
        return []
    track.n += len(losses)
    track.off += float(losses.sum())
    loss = track.off / track.n
    low, high = _interval(loss, track.n, one, alike, shares=shares)
    if not track.open and track.cusum > LIMIT and low > before:
        track.open, track.calm, track.raised = True, 0, track.raised + 1
        return [Finding(kind, "raised", track.raised, loss, low, high, before, track.n)]
    if track.open:
        track.calm = track.calm + 1 if z < _CALM_Z else 0
        if track.calm == CALM:
            track.open, track.cusum, track.n, track.off = False, 0.0, 0, 0.0
            last = float(losses.mean())
            return [Finding(kind, "cleared", track.raised, last, last, last, before, len(losses))]
    return []


def _interval(loss: float, n: int, one: float, alike: float, *, shares: bool) -> tuple[float, float]:
    if shares:
        return intervals.wilson(loss, n / alike)
    half = intervals.Z * math.sqrt(one * alike / n)
    return loss - half, loss + half


def alert(finding: Finding, *, shares: bool) -> Alert:
    """Its message; `subject` is what was compared."""
    raised = finding.state == "raised"
    summary = _raised(finding, shares=shares) if raised else _cleared(finding)
    evidence: dict[str, Any] = {"n": finding.n}
    told = ("loss",) if finding.state == "corrected" else ("loss", "low", "high", "before")
    evidence |= {name: round(getattr(finding, name), 4) for name in told}
    state, severity = ("raised", "warning") if raised else ("cleared", "info")
    identity = f"quality/{finding.kind}/{finding.count}"
    return Alert("quality", finding.kind, state, severity, identity, summary, evidence)


def _raised(found: Finding, *, shares: bool) -> str:
    if not shares:
        return (
            f"error grew: labels of the last {found.n} results say {found.loss:.3g} on average "
            f"({found.low:.3g} to {found.high:.3g}), the first {BASELINE} said {found.before:.3g}."
        )
    said = (
        f"labels of the last {found.n} results say {1 - found.loss:.2f} ({1 - found.high:.2f} to {1 - found.low:.2f})"
    )
    if found.kind == CERTAINTY:
        return f"likely concept drift: {said}, the model's certainty says {1 - found.before:.2f}."
    if found.kind == EVALUATION:
        return f"accuracy is below what the bundle promises: {said}, its evaluation said {1 - found.before:.2f}."
    return f"accuracy fell: {said}, the first {BASELINE} said {1 - found.before:.2f}."


def _cleared(found: Finding) -> str:
    what = {DECAY: "the first labels", EVALUATION: "the bundle's evaluation", CERTAINTY: "the model's certainty"}
    if found.state == "corrected":
        return f"labels were put right; the {found.n} there are now agree with {what[found.kind]}."
    return f"{CALM * GROUP} labels in a row agree with {what[found.kind]} again."
