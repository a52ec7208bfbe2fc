"""Performance degradation: sequential tests of labels, as they arrive, against what accuracy was promised.

Labelled results are grouped, GROUP_SIZE in each, in the order their labels arrived. A group's mean loss (1 for a wrong
answer, or the absolute error of a number) is compared with three references, each by a one-sided CUSUM (Page 1954):

- decay: the first BASELINE_SIZE labels of this device
- evaluation: the accuracy in the bundle's own evaluation
- certainty: how often answers with these scores were right there; a larger loss means concept drift

A difference within MARGINS does not matter. An alert also needs the interval of the loss since the CUSUM left zero to
lie wholly above the reference. Neighbours that are alike count for less (`intervals.estimate_design_effect`).
A label that is corrected later counts as if it had been right from the start: `recompute` runs all tests again.

The share of labels that are the model's own answers is watched, too: they say nothing about it, and training on them
would repeat its mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent import alerts
from agent.alerts import OWN_LABELS, Alert
from agent.arrays import Float64s
from agent.performance import intervals

GROUP_SIZE, BASELINE_SIZE = 25, 200
DECAY, EVALUATION, CERTAINTY = KINDS = ("decay", "evaluation", "certainty")
ALERT_KINDS = {DECAY: alerts.DECAY, EVALUATION: alerts.BELOW_EVALUATION, CERTAINTY: alerts.OVERCONFIDENT}
MARGINS = {DECAY: 0.02, EVALUATION: 0.05, CERTAINTY: 0.05}
# Margin of numbers, as a share of the reference error.
_REGRESSION_MARGIN = 0.1
SLACK, LIMIT = 0.5, 6.0
# Groups in a row, each below this z, clear an alert.
GROUPS_TO_CLEAR, _CLEAR_Z = 6, 1.0
# Pseudo-counts of one wrong and one right answer, because a model that was never wrong yet will be.
_PRIOR = 1.0
_AUTOCORRELATION_MEMORY = 400
# Share of labels that are the model's own answers.
MAX_OWN_SHARE = 0.2


class CusumTrack(msgspec.Struct):
    """CUSUM of one comparison; `n` labels with `loss_sum` since it left zero."""

    cusum: float = 0.0
    n: int = 0
    loss_sum: float = 0.0
    is_open: bool = False
    clear_count: int = 0
    raised_count: int = 0


class DegradationState(msgspec.Struct):
    """State of one bundle's tests, of constant size; `last_number` is that of the last label."""

    bundle: str
    last_number: int = 0
    first_number: int = 0  # number of the first label when it arrived; 0 before any
    last_message_s: float = 0.0  # uptime of the last message
    pending: list[tuple[float, float | None]] = []  # losses of an unfinished group, with the expected ones
    recent_losses: list[float] = []  # for the autocorrelation
    baseline_n: int = 0
    baseline_loss_sum: float = 0.0
    baseline_square_sum: float = 0.0
    tracks: dict[str, CusumTrack] = {}
    feedback_open: bool = False
    feedback_count: int = 0

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> DegradationState:
        """Raise ValueError."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise ValueError(str(error)) from None


class PromisedAccuracy(msgspec.Struct, frozen=True):
    """Accuracy of `n` answers in a bundle's evaluation; None if unknown."""

    accuracy: float | None = None
    n: int = 0


class DegradationEvent(msgspec.Struct, frozen=True):
    """Alert that a comparison raised or cleared; `before` is the reference loss."""

    kind: str
    state: str  # raised | cleared | corrected, if corrected labels clear it
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
    """Add labelled results as their labels arrived; `expected` is the loss by the model's scores. Return events."""
    events: list[DegradationEvent] = []
    for loss, expected_loss in zip(losses, expected, strict=True):
        state.pending.append((float(loss), expected_loss))
        if len(state.pending) == GROUP_SIZE:
            events += _add_group(state, promise, binary_loss=binary_loss)
            state.pending = []
    return events


def recompute(
    state: DegradationState,
    losses: Sequence[float],
    expected: Sequence[float | None],
    promise: PromisedAccuracy,
    *,
    binary_loss: bool,
    complete: bool,
) -> list[DegradationEvent]:
    """Run the tests again over all stored labels; unless they are `complete` the baseline stays."""
    fresh = DegradationState(state.bundle)
    if not complete and state.baseline_n >= BASELINE_SIZE:
        _copy_baseline(state, fresh)
    fresh_events = add_losses(fresh, losses, expected, promise, binary_loss=binary_loss)
    last_events = {(event.kind, event.state): event for event in fresh_events}
    events = []
    for kind, old in state.tracks.items():
        track = fresh.tracks.setdefault(kind, CusumTrack())
        # Ids go on counting, so that an earlier alert keeps its own.
        track.raised_count = old.raised_count
        if old.is_open and not track.is_open:
            loss = sum(losses) / max(1, len(losses))
            events.append(DegradationEvent(kind, "corrected", old.raised_count, loss, loss, loss, loss, len(losses)))
    for kind, track in fresh.tracks.items():
        old = state.tracks.get(kind, CusumTrack())
        if track.is_open and not old.is_open:
            track.raised_count = old.raised_count + 1
            events.append(replace(last_events[kind, "raised"], count=track.raised_count))
    state.pending, state.recent_losses, state.tracks = fresh.pending, fresh.recent_losses, fresh.tracks
    _copy_baseline(fresh, state)
    return events


def _copy_baseline(source: DegradationState, target: DegradationState) -> None:
    target.baseline_n, target.baseline_loss_sum = source.baseline_n, source.baseline_loss_sum
    target.baseline_square_sum = source.baseline_square_sum


def _add_group(state: DegradationState, promise: PromisedAccuracy, *, binary_loss: bool) -> list[DegradationEvent]:
    losses = np.array([loss for loss, _ in state.pending])
    state.recent_losses = [*state.recent_losses, *losses.tolist()][-_AUTOCORRELATION_MEMORY:]
    design_effect = intervals.estimate_design_effect(np.array(state.recent_losses))
    events = []
    for kind in KINDS:
        reference = _reference_loss(kind, state, promise, losses, binary_loss=binary_loss)
        if reference is not None:
            track = state.tracks.setdefault(kind, CusumTrack())
            events += _update_track(track, kind, losses, *reference, design_effect, binary_loss=binary_loss)
    if state.baseline_n < BASELINE_SIZE:
        state.baseline_n += GROUP_SIZE
        state.baseline_loss_sum += float(losses.sum())
        state.baseline_square_sum += float((losses**2).sum())
    return events


def _reference_loss(
    kind: str, state: DegradationState, promise: PromisedAccuracy, losses: Float64s, *, binary_loss: bool
) -> tuple[float, float, float] | None:
    """Return (reference loss, variance of one loss, variance of the reference); None if it is unknown."""
    if kind == DECAY:
        if state.baseline_n < BASELINE_SIZE:
            return None
        if binary_loss:
            mean = (state.baseline_loss_sum + _PRIOR) / (state.baseline_n + 2 * _PRIOR)
            variance = mean * (1 - mean)
        else:
            mean = state.baseline_loss_sum / state.baseline_n
            variance = max(state.baseline_square_sum / state.baseline_n - mean**2, 1e-12)
        return mean, variance, variance / state.baseline_n
    if not binary_loss:
        return None
    if kind == EVALUATION:
        if promise.accuracy is None:
            return None
        mean = 1 - (promise.accuracy * promise.n + _PRIOR) / (promise.n + 2 * _PRIOR)
        return mean, mean * (1 - mean), mean * (1 - mean) / max(1, promise.n)
    expected = np.array([loss for _, loss in state.pending if loss is not None])
    if len(expected) < len(losses):
        return None
    return float(expected.mean()), float((expected * (1 - expected)).mean()), 0.0


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
    # The error of the reference is the same in every group.
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
    half = intervals.Z * math.sqrt(variance * design_effect / track.n)
    low, high = intervals.wilson(loss, track.n / design_effect) if binary_loss else (loss - half, loss + half)
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


def build_alert(event: DegradationEvent, *, binary_loss: bool) -> Alert:
    raised = event.state == "raised"
    references = {DECAY: "the first labels", EVALUATION: "the bundle's evaluation", CERTAINTY: "the model's scores"}
    if raised:
        summary = _raised_sentence(event, binary_loss=binary_loss)
    elif event.state == "corrected":
        summary = f"labels were corrected; all {event.n} now agree with {references[event.kind]}."
    else:
        summary = f"{GROUPS_TO_CLEAR * GROUP_SIZE} labels in a row agree with {references[event.kind]} again."
    evidence: dict[str, Any] = {"n": event.n}
    members = ("loss",) if event.state == "corrected" else ("loss", "low", "high", "before")
    evidence |= {name: round(getattr(event, name), 4) for name in members}
    kind = ALERT_KINDS[event.kind]
    return (kind.raised if raised else kind.cleared)(summary, evidence, count=event.count)


def _raised_sentence(event: DegradationEvent, *, binary_loss: bool) -> str:
    if not binary_loss:
        return (
            f"the error grew: it is {event.loss:.3g} ({event.low:.3g} to {event.high:.3g}) for the last {event.n} "
            f"labelled results, and was {event.before:.3g} for the first {BASELINE_SIZE}."
        )
    accuracy = f"{1 - event.loss:.2f} ({1 - event.high:.2f} to {1 - event.low:.2f})"
    observed = f"the accuracy of the last {event.n} labelled results is {accuracy}"
    if event.kind == CERTAINTY:
        return f"likely concept drift: {observed}, the model's scores promise {1 - event.before:.2f}."
    if event.kind == EVALUATION:
        return f"accuracy below the bundle's evaluation: {observed}, the evaluation measured {1 - event.before:.2f}."
    return f"accuracy fell: {observed}, that of the first {BASELINE_SIZE} was {1 - event.before:.2f}."


def check_feedback(state: DegradationState, own: int, n: int) -> Alert | None:
    """Return an alert if too many of the newest `n` labels, `own`, are the model's answers, or no longer are."""
    share = own / n if n else 0.0
    too_many = share > MAX_OWN_SHARE
    if too_many == state.feedback_open or (state.feedback_open and share > MAX_OWN_SHARE / 2):
        return None
    state.feedback_open = too_many
    state.feedback_count += too_many
    summary = (
        f"{share:.0%} of the last {n} labels are the model's own answers: they say nothing about it, and training on "
        "them would repeat its mistakes. They are left out of every metric; let people label some."
        if too_many
        else f"most labels are not the model's own answers any more ({share:.0%} of the last {n} are)."
    )
    build = OWN_LABELS.raised if too_many else OWN_LABELS.cleared
    return build(summary, {"own": own, "n": n}, count=state.feedback_count)
