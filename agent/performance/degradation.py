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

from agent import alerts
from agent.alerts import Alert
from agent.arrays import Float64s
from agent.performance import intervals

GROUP_SIZE, BASELINE_SIZE = 25, 200
DECAY, EVALUATION, CERTAINTY = KINDS = ("decay", "evaluation", "certainty")
ALERT_KINDS = {DECAY: alerts.DECAY, EVALUATION: alerts.BELOW_EVALUATION, CERTAINTY: alerts.OVERCONFIDENT}
MARGINS = {DECAY: 0.02, EVALUATION: 0.05, CERTAINTY: 0.05}
# Of numbers: a share of the usual error.
_REGRESSION_MARGIN = 0.1
SLACK, LIMIT = 0.5, 6.0
# Groups in a row without a loss above what is allowed clear an alert.
GROUPS_TO_CLEAR, _CLEAR_Z = 6, 1.0
# A model that was never wrong yet will be: pseudo-counts of one wrong and one right answer.
_PRIOR = 1.0
_AUTOCORRELATION_MEMORY = 400


class CusumTrack(msgspec.Struct):
    """One comparison. `n` and `off`: labels since its CUSUM left zero, and the sum of their losses."""

    cusum: float = 0.0
    n: int = 0
    loss_sum: float = 0.0
    is_open: bool = False
    clear_count: int = 0
    raised_count: int = 0


class DegradationState(msgspec.Struct):
    """What is remembered of one bundle's labels; of constant size. `number` of the last label taken."""

    bundle: str
    last_number: int = 0
    first_number: int = 0  # number that the first label taken had when it came; 0 before any
    last_message_s: float = 0.0  # uptime of the last message
    pending: list[tuple[float, float | None]] = []  # losses of an open group, and what was expected of them
    recent_losses: list[float] = []  # newest losses, for how alike neighbours are
    baseline_n: int = 0  # of the baseline
    baseline_loss_sum: float = 0.0
    baseline_square_sum: float = 0.0
    tracks: dict[str, CusumTrack] = {}
    feedback_open: bool = False
    feedback_count: int = 0

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> DegradationState:
        """Raises ValueError."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise ValueError(str(error)) from None


class PromisedAccuracy(msgspec.Struct, frozen=True):
    """Of a bundle's evaluation: how often it was right, of how many answers; None where that is not known."""

    accuracy: float | None = None
    n: int = 0


class DegradationEvent(msgspec.Struct, frozen=True):
    """A comparison that changed its mind, in numbers. `before` is the loss it is compared with."""

    kind: str
    state: str  # raised | cleared | corrected, which clears because labels were put right
    count: int
    loss: float
    low: float
    high: float
    before: float
    n: int


def add_losses(
    state: DegradationState,
    losses: Sequence[float],
    expected: Sequence[float | None],
    promise: PromisedAccuracy,
    *,
    binary_loss: bool,
) -> list[DegradationEvent]:
    """Add labelled results to `state`, in the order their labels came; what that changed.

    `expected` is the loss that the model's certainty tells; `shares` where a loss is 0 or 1.
    """
    found: list[DegradationEvent] = []
    for loss, told in zip(losses, expected, strict=True):
        state.pending.append((float(loss), told))
        if len(state.pending) == GROUP_SIZE:
            found += _add_group(state, promise, binary_loss=binary_loss)
            state.pending = []
    return found


def recompute(
    state: DegradationState,
    losses: Sequence[float],
    expected: Sequence[float | None],
    promise: PromisedAccuracy,
    *,
    binary_loss: bool,
    complete: bool,
) -> list[DegradationEvent]:
    """Take all labels that are kept anew, in the order they first came, since some were put right; what that changed.

    Where they are no longer the `whole` of what was taken, the baseline stays as it is.
    """
    fresh = DegradationState(state.bundle)
    if not complete and state.baseline_n >= BASELINE_SIZE:
        fresh.baseline_n, fresh.baseline_loss_sum, fresh.baseline_square_sum = (
            state.baseline_n,
            state.baseline_loss_sum,
            state.baseline_square_sum,
        )
    told = {(one.kind, one.state): one for one in add_losses(fresh, losses, expected, promise, binary_loss=binary_loss)}
    found = []
    for kind, old in state.tracks.items():
        track = fresh.tracks.setdefault(kind, CusumTrack())
        # Ids go on counting: what was raised before stays known by its own.
        track.raised_count = old.raised_count
        if old.is_open and not track.is_open:
            loss = sum(losses) / max(1, len(losses))
            found.append(DegradationEvent(kind, "corrected", old.raised_count, loss, loss, loss, loss, len(losses)))
    for kind, track in fresh.tracks.items():
        old = state.tracks.get(kind, CusumTrack())
        if track.is_open and not old.is_open:
            track.raised_count = old.raised_count + 1
            found.append(replace(told[kind, "raised"], count=track.raised_count))
    state.pending, state.recent_losses, state.tracks = fresh.pending, fresh.recent_losses, fresh.tracks
    state.baseline_n, state.baseline_loss_sum, state.baseline_square_sum = (
        fresh.baseline_n,
        fresh.baseline_loss_sum,
        fresh.baseline_square_sum,
    )
    return found


def _add_group(state: DegradationState, promise: PromisedAccuracy, *, binary_loss: bool) -> list[DegradationEvent]:
    losses = np.array([loss for loss, _ in state.pending])
    state.recent_losses = [*state.recent_losses, *losses.tolist()][-_AUTOCORRELATION_MEMORY:]
    alike = intervals.estimate_design_effect(np.array(state.recent_losses))
    found = []
    for kind in KINDS:
        against = _reference_loss(kind, state, promise, losses, binary_loss=binary_loss)
        if against is not None:
            found += _update_track(
                state.tracks.setdefault(kind, CusumTrack()), kind, losses, *against, alike, binary_loss=binary_loss
            )
    if state.baseline_n < BASELINE_SIZE:
        state.baseline_n += GROUP_SIZE
        state.baseline_loss_sum += float(losses.sum())
        state.baseline_square_sum += float((losses**2).sum())
    return found


def _reference_loss(
    kind: str, state: DegradationState, promise: PromisedAccuracy, losses: Float64s, *, binary_loss: bool
) -> tuple[float, float, float] | None:
    """(loss that is compared with, variance of one loss, variance of the first); None where it is not known."""
    if kind == DECAY:
        if state.baseline_n < BASELINE_SIZE:
            return None
        mean, variance = _baseline_loss(state, binary_loss=binary_loss)
        return mean, variance, variance / state.baseline_n
    if not binary_loss:
        return None
    if kind == EVALUATION:
        if promise.accuracy is None:
            return None
        mean = 1 - (promise.accuracy * promise.n + _PRIOR) / (promise.n + 2 * _PRIOR)
        return mean, mean * (1 - mean), mean * (1 - mean) / max(1, promise.n)
    told = [one for _, one in state.pending if one is not None]
    if len(told) < len(losses):
        return None
    return float(np.mean(told)), float(np.mean([one * (1 - one) for one in told])), 0.0


def _baseline_loss(state: DegradationState, *, binary_loss: bool) -> tuple[float, float]:
    if binary_loss:
        mean = (state.baseline_loss_sum + _PRIOR) / (state.baseline_n + 2 * _PRIOR)
        return mean, mean * (1 - mean)
    mean = state.baseline_loss_sum / state.baseline_n
    return mean, max(state.baseline_square_sum / state.baseline_n - mean**2, 1e-12)


def _update_track(
    track: CusumTrack,
    kind: str,
    losses: Float64s,
    reference_loss: float,
    variance: float,
    reference_variance: float,
    design_effect: float,
    *,
    binary_loss: bool,
) -> list[DegradationEvent]:
    # What is compared with is known from so many results only, and that error is in every group.
    margin = (MARGINS[kind] if binary_loss else _REGRESSION_MARGIN * reference_loss) + math.sqrt(
        design_effect * reference_variance
    )
    z = (float(losses.mean()) - reference_loss - margin) / math.sqrt(max(design_effect * variance / len(losses), 1e-12))
    track.cusum = max(0.0, track.cusum + z - SLACK)
    if track.cusum == 0.0 and not track.is_open:
        track.n, track.loss_sum = 0, 0.0
        return []
    track.n += len(losses)
    track.loss_sum += float(losses.sum())
    loss = track.loss_sum / track.n
    low, high = _interval(loss, track.n, variance, design_effect, binary_loss=binary_loss)
    if not track.is_open and track.cusum > LIMIT and low > reference_loss:
        track.is_open, track.clear_count, track.raised_count = True, 0, track.raised_count + 1
        return [DegradationEvent(kind, "raised", track.raised_count, loss, low, high, reference_loss, track.n)]
    if track.is_open:
        track.clear_count = track.clear_count + 1 if z < _CLEAR_Z else 0
        if track.clear_count == GROUPS_TO_CLEAR:
            track.is_open, track.cusum, track.n, track.loss_sum = False, 0.0, 0, 0.0
            last = float(losses.mean())
            return [
                DegradationEvent(kind, "cleared", track.raised_count, last, last, last, reference_loss, len(losses))
            ]
    return []


def _interval(loss: float, n: int, variance: float, design_effect: float, *, binary_loss: bool) -> tuple[float, float]:
    if binary_loss:
        return intervals.wilson(loss, n / design_effect)
    half = intervals.Z * math.sqrt(variance * design_effect / n)
    return loss - half, loss + half


def build_alert(event: DegradationEvent, *, binary_loss: bool) -> Alert:
    """Its message; `subject` is what was compared."""
    raised = event.state == "raised"
    summary = _raised_sentence(event, binary_loss=binary_loss) if raised else _cleared_sentence(event)
    evidence: dict[str, Any] = {"n": event.n}
    members = ("loss",) if event.state == "corrected" else ("loss", "low", "high", "before")
    evidence |= {name: round(getattr(event, name), 4) for name in members}
    kind = ALERT_KINDS[event.kind]
    return (kind.raised if raised else kind.cleared)(summary, evidence, count=event.count)


def _raised_sentence(event: DegradationEvent, *, binary_loss: bool) -> str:
    if not binary_loss:
        return (
            f"error grew: labels of the last {event.n} results say {event.loss:.3g} on average "
            f"({event.low:.3g} to {event.high:.3g}), the first {BASELINE_SIZE} said {event.before:.3g}."
        )
    said = (
        f"labels of the last {event.n} results say {1 - event.loss:.2f} ({1 - event.high:.2f} to {1 - event.low:.2f})"
    )
    if event.kind == CERTAINTY:
        return f"likely concept drift: {said}, the model's certainty says {1 - event.before:.2f}."
    if event.kind == EVALUATION:
        return f"accuracy is below what the bundle promises: {said}, its evaluation said {1 - event.before:.2f}."
    return f"accuracy fell: {said}, the first {BASELINE_SIZE} said {1 - event.before:.2f}."


def _cleared_sentence(event: DegradationEvent) -> str:
    what = {DECAY: "the first labels", EVALUATION: "the bundle's evaluation", CERTAINTY: "the model's certainty"}
    if event.state == "corrected":
        return f"labels were put right; the {event.n} there are now agree with {what[event.kind]}."
    return f"{GROUPS_TO_CLEAR * GROUP_SIZE} labels in a row agree with {what[event.kind]} again."
