"""When a task's labels are looked at: a `quality` message for every so many of them, and alerts.

A message is about the newest labelled results of the bundle that runs, at most MOST; `new` of them were not in one
before, or with another label. What a message says is in `measured`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from agent import clock
from agent.clock import Now
from agent.device.intake import labels
from agent.device.intake.labels import Asked
from agent.device.pipeline import measured
from agent.device.pipeline.batch import Task
from agent.device.pipeline.measured import Taken, truth_of
from agent.device.store import labels as labelled
from agent.device.store.labels import MOST_LABELS, Labelled
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.drift.reporting.alert_text import Alert
from agent.performance import degradation, feedback
from agent.performance.degradation import Finding, Promise
from agent.performance.labels import MODEL
from agent.wire.messages import encode

STATE, SHOWN = "quality", "quality shown"
EACH, MOST, DAILY_S = 50, 500, 86_400.0
_EARLY = 200


def asked(tasks: Sequence[Task]) -> dict[str, Asked]:
    """What the intake must know to take labels of these tasks."""
    return {task.name: Asked(task.config.stream, truth_of(task)) for task in tasks}


def turn(task: Task, store: Store, author: Author, now: Now, keep_s: float) -> int:
    """Join labels that waited, and report where it is time to; how many alerts. Raises StorageError."""
    _settle(task, store, now, keep_s)
    alerts = 0
    while (found := _due(task, store, now)) is not None:
        alerts += _report(task, store, author, found, now)
    return alerts


def _settle(task: Task, store: Store, now: Now, keep_s: float) -> None:
    span = store.ask(labelled.span, task.name)
    if span is None:
        return
    while True:
        with store.transaction() as tx:
            waiting = labelled.early(tx.connection, task.name, span, tx.uptime_s(now) - keep_s, _EARLY)
            labels.settle_early(tx, task.name, waiting)
        if len(waiting) < _EARLY:
            return


def _due(task: Task, store: Store, now: Now) -> degradation.State | None:
    """The task's state where a message is due."""
    state = _state(task, store)
    waiting = store.ask(labelled.after, task.name, state.number, EACH)
    if len(waiting) >= EACH:
        return state
    if not waiting:
        return None
    with store.transaction() as tx:
        at_s = tx.uptime_s(now)
        if not state.at_s:
            # The day begins with the first label.
            state.at_s = max(at_s, 1.0)
            tx.keep(task.name, STATE, state.to_bytes())
    return state if at_s >= state.at_s + DAILY_S else None


def _state(task: Task, store: Store) -> degradation.State:
    kept = store.state(task.name, STATE)
    digest = task.bundle.digest
    if kept is not None:
        try:
            state = degradation.State.from_bytes(kept)
        except ValueError:
            return degradation.State(digest)
        if state.bundle == digest:
            return state
        # Of another bundle: what was open against it says nothing about this one.
        return degradation.State(digest, number=state.number, at_s=state.at_s)
    return degradation.State(digest)


def _report(task: Task, store: Store, author: Author, state: degradation.State, now: Now) -> int:
    """One message; labels and state are as they were until all of it is committed."""
    numbers = store.ask(labelled.after, task.name, state.number, MOST // 2)
    window = store.ask(labelled.labelled, task.name, state.bundle, numbers[-1], MOST)
    taken = Taken.of(task, window, state)
    alerts = [*_cleared(task, store, state), *_judge(task, store, state, taken, numbers[-1])]
    state.number = numbers[-1]
    with store.transaction() as tx:
        state.at_s = max(tx.uptime_s(now), 1.0)
        if taken.window:
            body = measured.body(task, tx, author.max_bytes, taken)
            author.write(tx, "quality", task.name, body, now)
            tx.keep(task.name, SHOWN, encode({**body, "time": clock.rfc3339(now.wall_us)}))
        for alert in alerts:
            author.write(tx, "alerts", task.name, alert.body(task.name), now)
        tx.keep(task.name, STATE, state.to_bytes())
    return len(alerts)


def _cleared(task: Task, store: Store, state: degradation.State) -> list[Alert]:
    """Alerts about a bundle that runs no more."""
    kept = store.state(task.name, STATE)
    try:
        old = degradation.State.from_bytes(kept) if kept else state
    except ValueError:
        return []
    if old.bundle == state.bundle:
        return []
    text = "another bundle runs now; its labels are judged anew."
    found = [
        Alert("quality", kind, "cleared", "info", f"quality/{kind}/{track.raised}", text, {})
        for kind, track in old.tracks.items()
        if track.open
    ]
    # Ids go on counting, so that an alert of this bundle is another one.
    state.tracks = {kind: degradation.Track(raised=track.raised) for kind, track in old.tracks.items()}
    state.feedback, state.feedbacks = old.feedback, old.feedbacks
    return found


# --- what the labels say ---


def _judge(task: Task, store: Store, state: degradation.State, taken: Taken, through: int) -> Iterator[Alert]:
    own = sum(one.source == MODEL for one in taken.window)
    if (grown := feedback.grown(state, own, len(taken.window))) is not None:
        yield grown
    state.first = min([one.first for one in taken.fresh] + ([state.first] if state.first else []), default=0)
    shares = truth_of(task).kind != "regress"
    for finding in _findings(task, store, state, taken, through, shares=shares):
        yield degradation.alert(finding, shares=shares)


def _findings(
    task: Task, store: Store, state: degradation.State, taken: Taken, through: int, *, shares: bool
) -> list[Finding]:
    promise = _promise(task)
    if not taken.corrected:
        return degradation.take(state, *_losses(task, taken.fresh), promise, shares=shares)
    # Among the newest only, the first labels would be missing.
    kept = store.ask(labelled.labelled, task.name, state.bundle, through, MOST_LABELS)
    known = sorted((one for one in measured.known(task, kept) if one.first >= state.first), key=lambda one: one.first)
    whole = bool(known) and known[0].first == state.first
    return degradation.redo(state, *_losses(task, known), promise, shares=shares, whole=whole)


def _losses(task: Task, some: Sequence[Labelled]) -> tuple[list[float], list[float | None]]:
    """Of those that say something, and what the model's certainty tells of each."""
    judged = measured.judged(task, some)
    off = measured.pairs(task, judged).off(truth_of(task).kind) if judged else None
    if off is None:
        return [], []
    return off.tolist(), measured.expected(task, judged)


def _promise(task: Task) -> Promise:
    shipped = task.judge.shipped if task.judge else None
    if truth_of(task).kind != "classify" or shipped is None or shipped.score_correct is None:
        return Promise()
    n = int(shipped.score_n.sum())
    return Promise(float(shipped.score_correct.sum()) / n, n) if n else Promise()
