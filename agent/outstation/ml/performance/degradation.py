"""Performance degradation: sequential tests of labels, as they arrive, against what accuracy was promised.

Labelled results are grouped, GROUP_SIZE in each, in the order their labels arrived. A group's mean loss (1 for a wrong
answer, or the absolute error of a number) is compared with three references, each by a one-sided CUSUM (Page 1954):

- decay: the first BASELINE_SIZE labels of this device
- evaluation: the accuracy in the bundle's own evaluation
- certainty: how often answers with these scores were right there; a larger loss means concept drift

A difference within MARGINS does not matter. An alert also needs the interval of the loss since the CUSUM left zero to
lie wholly above the reference. Neighbours that are alike count for less (`intervals.estimate_design_effect`), and so do
groups that differ by more than chance (`intervals.estimate_group_effect`).
An open alert clears by the opposite CUSUM: log-likelihood ratios of the reference against the alert's own loss.
It needs CLEAR_SIZE labels whose mean is within the margin and whose interval lies wholly below the alert's loss.
A label that is corrected later counts as if it had been right from the start: `recompute` runs all tests again.
Where earlier labels are deleted by then, an open alert stays open until those that are left meet its recovery test.

From the first label of an authenticated author on, only such labels count: nobody else can raise or clear an alert.

The share of labels that are the model's own answers is watched, too: they say nothing about it, and training on them
would repeat its mistakes. So are labels that agree with the answers more often than the scores let expect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation import clock, decoders
from outstation.ml.performance import intervals
from outstation.protocol.alerts import kinds as alert_kinds
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.alerts.kinds import OWN_LABELS

GROUP_SIZE, BASELINE_SIZE = 25, 200
DECAY, EVALUATION, CERTAINTY = KINDS = ("decay", "evaluation", "certainty")
ALERT_KINDS = {DECAY: alert_kinds.DECAY, EVALUATION: alert_kinds.BELOW_EVALUATION, CERTAINTY: alert_kinds.OVERCONFIDENT}
MARGINS = {DECAY: 0.02, EVALUATION: 0.05, CERTAINTY: 0.05}
# Margin of numbers, as a share of the reference error.
_REGRESSION_MARGIN = 0.1
SLACK, LIMIT = 0.5, 6.0
# An alert clears after at least CLEAR_SIZE labels and at this log-likelihood ratio, to which one group adds a bounded
# step.
CLEAR_SIZE, CLEAR_LIMIT, _MAX_RECOVERY_STEP = 150, 11.0, 2.0
_REFERENCES = {DECAY: "the first labels", EVALUATION: "the bundle's evaluation", CERTAINTY: "the model's scores"}
# Pseudo-counts of one wrong and one right answer, because a model that was never wrong yet will be.
_PRIOR = 1.0
_AUTOCORRELATION_MEMORY, _GROUP_MEMORY = 400, 40
# Share of labels that are the model's own answers.
MAX_OWN_SHARE = 0.2
# Labels repeat the answers if, from this number on, chance gives as few disagreements in one of a million windows only.
MIN_AGREEMENT_LABELS, MAX_AGREEMENT_NATS = 100, math.log(1e6)


class Run(msgspec.Struct):
    """Labels since a CUSUM left zero: `n` with `loss_sum`, and the bounds of their results' rows and times in µs."""

    n: int = 0
    loss_sum: float = 0.0
    rows: tuple[int, int] | None = None
    times_us: tuple[int, int] | None = None

    @property
    def loss(self) -> float:
        return self.loss_sum / self.n

    def add(self, other: Run) -> Run:
        rows, times_us = _join(self.rows, other.rows), _join(self.times_us, other.times_us)
        return Run(self.n + other.n, self.loss_sum + other.loss_sum, rows, times_us)


def _join(left: tuple[int, int] | None, right: tuple[int, int] | None) -> tuple[int, int] | None:
    if left is None or right is None:
        return left or right
    return min(left[0], right[0]), max(left[1], right[1])


class CusumTrack(msgspec.Struct):
    """CUSUM of one comparison with its run; while its alert is open, `recovery` is the opposite CUSUM."""

    cusum: float = 0.0
    run: Run = msgspec.field(default_factory=Run)
    is_open: bool = False
    recovery: float = 0.0
    recovery_run: Run = msgspec.field(default_factory=Run)
    raised_count: int = 0


class LabelledLoss(msgspec.Struct, frozen=True, array_like=True):
    """Loss of a labelled result, the loss that its score implies (None if unknown), its row and its time in µs."""

    loss: float
    expected: float | None = None
    row: int | None = None
    t_us: int | None = None


class ReferenceLoss(msgspec.Struct, frozen=True):
    """Loss to compare with: the variance of one loss, and that of the reference itself."""

    loss: float
    variance: float
    error_variance: float
    is_binary: bool

    def margin(self, kind: str, design_effect: float) -> float:
        """Return the difference that does not matter; the error of the reference is the same in every group."""
        margin = MARGINS[kind] if self.is_binary else _REGRESSION_MARGIN * self.loss
        return margin + math.sqrt(design_effect * self.error_variance)

    def interval(self, run: Run, design_effect: float) -> tuple[float, float]:
        """Return the interval of the run's loss."""
        if self.is_binary:
            return intervals.wilson(run.loss, run.n / design_effect)
        half = intervals.Z * math.sqrt(self.variance * design_effect / run.n)
        return run.loss - half, run.loss + half


class DegradationState(msgspec.Struct):
    """State of one bundle's tests, of constant size; `last_number` is that of the last label."""

    bundle: str
    last_number: int = 0
    first_number: int = 0  # number of the first label when it arrived; 0 before any
    last_message_s: float = 0.0  # uptime of the last message
    pending: list[LabelledLoss] = []  # of an unfinished group
    recent_losses: list[float] = []  # for the autocorrelation
    recent_groups: list[tuple[float, float]] = []  # sums and sums of squares, for the variation between groups
    baseline_n: int = 0
    baseline_loss_sum: float = 0.0
    baseline_square_sum: float = 0.0
    tracks: dict[str, CusumTrack] = {}
    feedback_open: bool = False
    feedback_count: int = 0
    is_estimate_wrong: bool = False  # the accuracy of the last report and the estimated one exclude each other
    is_authenticated: bool = False  # only labels whose author is authenticated count

    def require_authenticated(self) -> None:
        """Count authenticated labels only from now on; what others raised stays open until these clear it."""
        self.is_authenticated, self.first_number = True, 0
        self.pending, self.recent_losses, self.recent_groups = [], [], []
        self.baseline_n, self.baseline_loss_sum, self.baseline_square_sum = 0, 0.0, 0.0
        self.tracks = {
            kind: CusumTrack(run=track.run if track.is_open else Run(), is_open=track.is_open,
                             raised_count=track.raised_count)
            for kind, track in self.tracks.items()
        }  # fmt: skip

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> DegradationState:
        """Raise ValueError."""
        try:
            return decoders.from_json(data, cls)
        except msgspec.MsgspecError as error:
            raise ValueError(str(error)) from None


class _OpenTrack(msgspec.Struct):
    is_open: bool = False


class _OpenTracks(msgspec.Struct):
    """Part of a state that each batch reads; the rest of it is skipped."""

    bundle: str
    tracks: dict[str, _OpenTrack] = {}
    is_estimate_wrong: bool = False


_OPEN_TRACKS = decoders.json_decoder(_OpenTracks)


def contradict_certainty(stored: bytes, bundle: str) -> bool:
    """Return True if labels contradict the accuracy that the certainty of this `bundle` lets expect.

    Either an alert is open, as the certainty promises too much, or the last report contradicts it, in any direction. A
    damaged state says nothing.
    """
    try:
        state = _OPEN_TRACKS.decode(stored)
    except msgspec.MsgspecError:
        return False
    is_open = state.tracks.get(CERTAINTY, _OpenTrack()).is_open
    return state.bundle == bundle and (is_open or state.is_estimate_wrong)


class PromisedAccuracy(msgspec.Struct, frozen=True):
    """Accuracy of `n` answers in a bundle's evaluation; None if unknown."""

    accuracy: float | None = None
    n: int = 0


class DegradationEvent(msgspec.Struct, frozen=True):
    """Alert that a comparison raised or cleared; `before` is the reference loss, `run` the labels that decided."""

    kind: str
    state: str  # raised | cleared | corrected, if corrected labels clear it
    count: int
    loss: float
    low: float
    high: float
    before: float
    run: Run


def add_losses(
    state: DegradationState,
    losses: Sequence[LabelledLoss],
    promise: PromisedAccuracy,
    *,
    binary_loss: bool,
) -> list[DegradationEvent]:
    """Add labelled results in the order in which their labels arrived. Return events."""
    events: list[DegradationEvent] = []
    for loss in losses:
        state.pending.append(loss)
        if len(state.pending) == GROUP_SIZE:
            events += _add_group(state, promise, binary_loss=binary_loss)
            state.pending = []
    return events


def recompute(
    state: DegradationState,
    losses: Sequence[LabelledLoss],
    promise: PromisedAccuracy,
    *,
    binary_loss: bool,
    complete: bool,
) -> list[DegradationEvent]:
    """Run the tests again over all stored labels.

    Unless they are `complete`, the baseline stays, and an open alert clears only if they pass its recovery test.
    """
    fresh = DegradationState(state.bundle)
    if not complete:
        fresh.tracks = {
            kind: CusumTrack(run=track.run, is_open=True) for kind, track in state.tracks.items() if track.is_open
        }
        if state.baseline_n >= BASELINE_SIZE:
            _copy_baseline(state, fresh)
    fresh_events = add_losses(fresh, losses, promise, binary_loss=binary_loss)
    last_events = {(event.kind, event.state): event for event in fresh_events}
    events = []
    for kind, old in state.tracks.items():
        track = fresh.tracks.setdefault(kind, CusumTrack())
        # Ids continue to count, so that an earlier alert keeps its own.
        track.raised_count = old.raised_count
        if old.is_open and not track.is_open and not complete:
            events.append(replace(last_events[kind, "cleared"], count=old.raised_count))
        elif old.is_open and not track.is_open:
            run = _to_run(losses)
            loss = run.loss if run.n else 0.0
            events.append(DegradationEvent(kind, "corrected", old.raised_count, loss, loss, loss, loss, run))
    for kind, track in fresh.tracks.items():
        old = state.tracks.get(kind, CusumTrack())
        if track.is_open and not old.is_open:
            track.raised_count = old.raised_count + 1
            events.append(replace(last_events[kind, "raised"], count=track.raised_count))
    state.pending, state.tracks = fresh.pending, fresh.tracks
    state.recent_losses, state.recent_groups = fresh.recent_losses, fresh.recent_groups
    _copy_baseline(fresh, state)
    return events


def _copy_baseline(source: DegradationState, target: DegradationState) -> None:
    target.baseline_n, target.baseline_loss_sum = source.baseline_n, source.baseline_loss_sum
    target.baseline_square_sum = source.baseline_square_sum


def _to_run(losses: Sequence[LabelledLoss]) -> Run:
    rows = [item.row for item in losses if item.row is not None]
    times = [item.t_us for item in losses if item.t_us is not None]
    return Run(
        len(losses),
        math.fsum(item.loss for item in losses),
        (min(rows), max(rows)) if rows else None,
        (min(times), max(times)) if times else None,
    )


def _add_group(state: DegradationState, promise: PromisedAccuracy, *, binary_loss: bool) -> list[DegradationEvent]:
    group = _to_run(state.pending)
    losses = [item.loss for item in state.pending]
    square_sum = math.fsum(loss**2 for loss in losses)
    state.recent_losses = [*state.recent_losses, *losses][-_AUTOCORRELATION_MEMORY:]
    state.recent_groups = [*state.recent_groups, (group.loss_sum, square_sum)][-_GROUP_MEMORY:]
    design_effect = _estimate_design_effect(state)
    events = []
    for kind in KINDS:
        reference = _reference_loss(kind, state, promise, binary_loss=binary_loss)
        if reference is not None:
            track = state.tracks.setdefault(kind, CusumTrack())
            update = _update_recovery if track.is_open else _update_cusum
            event = update(track, kind, group, reference, design_effect)
            events += [] if event is None else [event]
    if state.baseline_n < BASELINE_SIZE:
        state.baseline_n += GROUP_SIZE
        state.baseline_loss_sum += group.loss_sum
        state.baseline_square_sum += square_sum
    return events


def _estimate_design_effect(state: DegradationState) -> float:
    sums, squares = np.array(state.recent_groups).T
    neighbours = intervals.estimate_design_effect(np.array(state.recent_losses))
    return max(neighbours, intervals.estimate_group_effect(sums, squares, GROUP_SIZE))


def _reference_loss(
    kind: str, state: DegradationState, promise: PromisedAccuracy, *, binary_loss: bool
) -> ReferenceLoss | None:
    """Return None if the reference is unknown."""
    if kind == DECAY:
        if state.baseline_n < BASELINE_SIZE:
            return None
        if binary_loss:
            mean = (state.baseline_loss_sum + _PRIOR) / (state.baseline_n + 2 * _PRIOR)
            variance = mean * (1 - mean)
        else:
            mean = state.baseline_loss_sum / state.baseline_n
            variance = max(state.baseline_square_sum / state.baseline_n - mean**2, 1e-12)
        return ReferenceLoss(mean, variance, variance / state.baseline_n, binary_loss)
    if not binary_loss:
        return None
    if kind == EVALUATION:
        if promise.accuracy is None:
            return None
        mean = 1 - (promise.accuracy * promise.n + _PRIOR) / (promise.n + 2 * _PRIOR)
        return ReferenceLoss(mean, mean * (1 - mean), mean * (1 - mean) / max(1, promise.n), binary_loss)
    expected = np.array([item.expected for item in state.pending if item.expected is not None])
    if len(expected) < len(state.pending):
        return None
    return ReferenceLoss(float(expected.mean()), float((expected * (1 - expected)).mean()), 0.0, binary_loss)


def _update_cusum(
    track: CusumTrack, kind: str, group: Run, reference: ReferenceLoss, design_effect: float
) -> DegradationEvent | None:
    difference = group.loss - reference.loss - reference.margin(kind, design_effect)
    z = difference / math.sqrt(max(design_effect * reference.variance / group.n, 1e-12))
    track.cusum = max(0.0, track.cusum + z - SLACK)
    if track.cusum == 0.0:
        track.run = Run()
        return None
    track.run = run = track.run.add(group)
    low, high = reference.interval(run, design_effect)
    # One group may be one session.
    if track.cusum <= LIMIT or low <= reference.loss or run.n <= GROUP_SIZE:
        return None
    track.is_open, track.raised_count = True, track.raised_count + 1
    return DegradationEvent(kind, "raised", track.raised_count, run.loss, low, high, reference.loss, run)


def _update_recovery(
    track: CusumTrack, kind: str, group: Run, reference: ReferenceLoss, design_effect: float
) -> DegradationEvent | None:
    accepted = reference.loss + reference.margin(kind, design_effect)
    # Labels of the recovery so far say nothing about the loss that raised the alert.
    degraded = max(track.run.loss, 2 * accepted - reference.loss)
    middle = (reference.loss + degraded) / 2
    variance = middle * (1 - middle) if reference.is_binary else reference.variance
    step = (degraded - reference.loss) * (middle - group.loss) * group.n / max(design_effect * variance, 1e-12)
    # One group alone must not decide.
    track.recovery = max(0.0, track.recovery + min(step, _MAX_RECOVERY_STEP))
    track.recovery_run = run = track.recovery_run.add(group)
    if track.recovery == 0.0:
        track.run, track.recovery_run = track.run.add(run), Run()
        return None
    low, high = reference.interval(run, design_effect)
    if track.recovery <= CLEAR_LIMIT or run.n < CLEAR_SIZE or run.loss > accepted or high >= degraded:
        return None
    track.is_open, track.cusum, track.recovery = False, 0.0, 0.0
    track.run, track.recovery_run = Run(), Run()
    return DegradationEvent(kind, "cleared", track.raised_count, run.loss, low, high, reference.loss, run)


def build_alert(event: DegradationEvent, *, binary_loss: bool) -> Alert:
    raised = event.state == "raised"
    if raised:
        summary = _raised_sentence(event, binary_loss=binary_loss)
    elif event.state == "corrected":
        summary = (
            f"labels were corrected; a new test of all {event.run.n} raises no alert against {_REFERENCES[event.kind]}."
        )
    else:
        summary = _cleared_sentence(event, binary_loss=binary_loss)
    evidence: dict[str, Any] = {"n": event.run.n}
    members = ("loss",) if event.state == "corrected" else ("loss", "low", "high", "before")
    evidence |= {name: round(getattr(event, name), 4) for name in members}
    if event.run.rows is not None and event.run.times_us is not None:
        first_us, last_us = event.run.times_us
        evidence |= {"rows": list(event.run.rows), "from": clock.to_rfc3339(first_us), "to": clock.to_rfc3339(last_us)}
    kind = ALERT_KINDS[event.kind]
    return (kind.raised if raised else kind.cleared)(summary, evidence, count=event.count)


def _cleared_sentence(event: DegradationEvent, *, binary_loss: bool) -> str:
    observed = (
        f"their accuracy is {1 - event.loss:.2f} ({1 - event.high:.2f} to {1 - event.low:.2f})"
        if binary_loss
        else f"their error is {event.loss:.3g} ({event.low:.3g} to {event.high:.3g})"
    )
    return f"the last {event.run.n} labels agree with {_REFERENCES[event.kind]} again: {observed}."


def _raised_sentence(event: DegradationEvent, *, binary_loss: bool) -> str:
    if not binary_loss:
        return (
            f"the error grew: it is {event.loss:.3g} ({event.low:.3g} to {event.high:.3g}) for the last {event.run.n} "
            f"labelled results, and was {event.before:.3g} for the first {BASELINE_SIZE}."
        )
    accuracy = f"{1 - event.loss:.2f} ({1 - event.high:.2f} to {1 - event.low:.2f})"
    observed = f"the accuracy of the last {event.run.n} labelled results is {accuracy}"
    if event.kind == CERTAINTY:
        return f"likely concept drift: {observed}, the model's scores promise {1 - event.before:.2f}."
    if event.kind == EVALUATION:
        return f"accuracy below the bundle's evaluation: {observed}, the evaluation measured {1 - event.before:.2f}."
    return f"accuracy fell: {observed}, that of the first {BASELINE_SIZE} was {1 - event.before:.2f}."


class Agreement(msgspec.Struct, frozen=True):
    """Labels of `n` answers, `wrong` of which disagree; the scores let expect `expected` wrong ones."""

    n: int = 0
    wrong: int = 0
    expected: float = 0.0

    @property
    def is_implausible(self) -> bool:
        """Return True if labels that were given without the answer hardly agree so often.

        By Chernoff's bound of a sum of independent outcomes; the model may be twice as good as its scores promise.
        """
        mean = self.expected / 2
        if self.n < MIN_AGREEMENT_LABELS or self.wrong >= mean:
            return False
        excess = self.wrong * math.log(self.wrong / mean) if self.wrong else 0.0
        return excess + mean - self.wrong > MAX_AGREEMENT_NATS


def check_feedback(state: DegradationState, own: int, n: int, agreement: Agreement = Agreement()) -> Alert | None:  # noqa: B008
    """Return an alert if too many of the newest `n` labels repeat the model's answers, or no longer do.

    `own` of them say that they are the model's.
    """
    share = own / n if n else 0.0
    too_many = share > MAX_OWN_SHARE or agreement.is_implausible
    if too_many == state.feedback_open or (state.feedback_open and share > MAX_OWN_SHARE / 2):
        return None
    state.feedback_open = too_many
    state.feedback_count += too_many
    evidence: dict[str, Any] = {"own": own, "n": n}
    if share > MAX_OWN_SHARE:
        summary = (
            f"{share:.0%} of the last {n} labels are the model's own answers: they say nothing about it, and training "
            "on them would repeat its mistakes. They are left out of every metric; let people label some."
        )
    elif too_many:
        expected = agreement.expected
        evidence |= {"compared": agreement.n, "wrong": agreement.wrong, "expected_wrong": round(expected, 2)}
        summary = (
            f"{agreement.wrong} of the last {agreement.n} labels disagree with the model, whose scores let expect "
            f"about {expected:.0f}: they seem to repeat its answers, so that metrics and training would only "
            "confirm it. Let people label some results without seeing the answer."
        )
    else:
        summary = f"most labels are not the model's own answers any more ({share:.0%} of the last {n} are)."
    build = OWN_LABELS.raised if too_many else OWN_LABELS.cleared
    return build(summary, evidence, count=state.feedback_count)
