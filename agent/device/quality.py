"""How good a task's results were, once labels came: a `quality` message for every so many, and alerts.

A message is about the newest labelled results of the bundle that runs, at most MOST; `new` of them were not in one
before. Labels that are the model's own answers are counted and left out of every metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent import clock
from agent.clock import Now
from agent.device.author import Author
from agent.device.batch import Task
from agent.device.incoming import labels
from agent.device.incoming.labels import Asked
from agent.device.storage import labelled
from agent.device.storage.labelled import Labelled
from agent.device.storage.store import Store
from agent.device.storage.transaction import Transaction
from agent.drift import decay, estimate, quality, slices
from agent.drift.alerts import Alert
from agent.drift.codec import Floats
from agent.drift.decay import Promise
from agent.drift.quality import Metric, Pairs
from agent.drift.reference import Reference
from agent.drift.truth import MODEL, Truth, told
from agent.wire.messages import encode

STATE, SHOWN = "quality", "quality shown"
EACH, MOST, DAILY_S = 50, 500, 86_400.0
_EARLY = 200
# Room for the head that every message has, and for labels and estimate.
_HEAD_BYTES = 1_500


@dataclass(frozen=True, slots=True)
class _Taken:
    """Labelled results in the order of their labels; `fresh` are those that no message has told of."""

    window: list[Labelled]
    fresh: list[Labelled]


def asked(tasks: Sequence[Task]) -> dict[str, Asked]:
    """What the intake must know to take labels of these tasks."""
    return {task.name: Asked(task.config.stream, truth_of(task)) for task in tasks}


def truth_of(task: Task) -> Truth:
    manifest = task.bundle.manifest
    return Truth(manifest.truth, tuple(manifest.output.labels))


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


def _due(task: Task, store: Store, now: Now) -> decay.State | None:
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


def _state(task: Task, store: Store) -> decay.State:
    kept = store.state(task.name, STATE)
    digest = task.bundle.digest
    if kept is not None:
        try:
            state = decay.State.from_bytes(kept)
        except ValueError:
            return decay.State(digest)
        if state.bundle == digest:
            return state
        # Of another bundle: what was open against it says nothing about this one.
        return decay.State(digest, number=state.number, at_s=state.at_s)
    return decay.State(digest)


def _report(task: Task, store: Store, author: Author, state: decay.State, now: Now) -> int:
    numbers = store.ask(labelled.after, task.name, state.number, MOST // 2)
    window = store.ask(labelled.labelled, task.name, state.bundle, numbers[-1], MOST)
    known = [one for one in window if _read(task, one) is not None]
    taken = _Taken(known, [one for one in known if one.number > state.number])
    cleared = _cleared(task, store, state)
    alerts = [*cleared, *_judge(task, state, taken)]
    state.number = numbers[-1]
    with store.transaction() as tx:
        state.at_s = max(tx.uptime_s(now), 1.0)
        if taken.window:
            body = _body(task, tx, author.max_bytes, taken)
            author.write(tx, "quality", task.name, body, now)
            tx.keep(task.name, SHOWN, encode({**body, "time": clock.rfc3339(now.wall_us)}))
        for alert in alerts:
            author.write(tx, "alerts", task.name, alert.body(task.name), now)
        tx.keep(task.name, STATE, state.to_bytes())
    return len(alerts)


def _cleared(task: Task, store: Store, state: decay.State) -> list[Alert]:
    """Alerts about a bundle that runs no more."""
    kept = store.state(task.name, STATE)
    try:
        old = decay.State.from_bytes(kept) if kept else state
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
    state.tracks = {kind: decay.Track(raised=track.raised) for kind, track in old.tracks.items()}
    state.feedback, state.feedbacks = old.feedback, old.feedbacks
    return found


# --- what the labels say ---


def _read(task: Task, one: Labelled) -> float | None:
    """None for a label that this bundle does not know."""
    try:
        return truth_of(task).read(one.label)
    except ValueError:
        return None


def _judge(task: Task, state: decay.State, taken: _Taken) -> Iterator[Alert]:
    own = sum(one.source == MODEL for one in taken.window)
    if (grown := decay.feedback(state, own, len(taken.window))) is not None:
        yield grown
    fresh = [one for one in taken.fresh if one.source != MODEL]
    kind = task.bundle.manifest.truth
    losses = _pairs(task, fresh).off(kind) if fresh else None
    if losses is None:
        return
    told = _expected(task.judge.shipped if task.judge else None, fresh)
    for finding in decay.take(state, losses.tolist(), told, _promise(task), shares=kind != "regress"):
        yield decay.alert(finding, shares=kind != "regress")


def _promise(task: Task) -> Promise:
    shipped = task.judge.shipped if task.judge else None
    if task.bundle.manifest.truth != "classify" or shipped is None or shipped.score_correct is None:
        return Promise()
    n = int(shipped.score_n.sum())
    return Promise(float(shipped.score_correct.sum()) / n, n) if n else Promise()


def _expected(shipped: Reference | None, some: Sequence[Labelled]) -> list[float | None]:
    """The chance of a mistake that the score of each result tells."""
    scores = [one.result.score for one in some]
    if shipped is None or shipped.score_correct is None or not len(shipped.score_edges):
        return [None] * len(some)
    n, right = shipped.score_n, shipped.score_correct
    overall = float(right.sum()) / max(1, int(n.sum()))
    chance = (right + estimate.PRIOR * overall) / (n + estimate.PRIOR)
    at = _bins(shipped, np.array([0.0 if score is None else score for score in scores]))
    return [None if score is None else 1 - float(chance[i]) for score, i in zip(scores, at, strict=True)]


def _bins(shipped: Reference, scores: Floats) -> Any:
    return np.searchsorted(shipped.score_edges, scores, side="right")


def _pairs(task: Task, some: Sequence[Labelled]) -> Pairs:
    """In the order given."""
    results = [one.result for one in some]
    truth = truth_of(task)
    said = None if any(r.said is None for r in results) else np.array([r.said for r in results], np.int64)
    score = np.array([np.nan if r.score is None else r.score for r in results]) if said is not None else None
    value = None if any(r.value is None for r in results) else np.array([r.value for r in results])
    return Pairs(np.array([truth.read(one.label) for one in some]), said, score, value)


# --- the message ---


def _body(task: Task, tx: Transaction, most: int, taken: _Taken) -> dict[str, Any]:
    ordered = sorted(taken.window, key=lambda one: one.result.row)
    judged = [one for one in ordered if one.source != MODEL]
    rows, times = [one.result.row for one in ordered], [one.result.t for one in ordered]
    window = {
        "rows": [rows[0], rows[-1]],
        "from": clock.rfc3339(min(times)),
        "to": clock.rfc3339(max(times)),
        "n": len(judged),
        "new": len(taken.fresh),
    }
    head = {"model": task.reference, "window": window, "labels": _labels(task, tx, ordered)}
    body = {**head, "estimate": _estimate(task, judged)}
    found = _metrics(task, judged)
    while found and len(encode({**body, "metrics": [one.told() for one in found]})) > most - _HEAD_BYTES:
        # Slices and rare classes come last.
        found = found[: len(found) * 3 // 4]
    return {**body, "metrics": [one.told() for one in found]}


def _metrics(task: Task, judged: Sequence[Labelled]) -> list[Metric]:
    if not judged:
        return []
    manifest, pairs = task.bundle.manifest, _pairs(task, judged)
    names = sorted(set.intersection(*(set(one.result.slices) for one in judged)))
    sliced = {name: [one.result.slices[name] for one in judged] for name in names}
    whole = quality.measure(manifest.truth, manifest.output.labels, pairs)
    return [*whole, *slices.measure(manifest.truth, pairs, sliced)]


def _labels(task: Task, tx: Transaction, ordered: Sequence[Labelled]) -> dict[str, Any]:
    """Where the labels come from: how late, how many of each class, how much of the results they cover."""
    delay = np.array([max(0, one.received - one.result.t) / 1e6 for one in ordered])
    results = labelled.count_results(tx.connection, task.name, ordered[0].result.row, ordered[-1].result.row)
    counters = {name: tx.counter(f"labels {name}.{task.name}") for name in ("replaced", "late", "unmatched")}
    found: dict[str, Any] = {
        "n": len(ordered),
        "delay_s": {"median": round(float(np.median(delay)), 3), "p90": round(float(np.quantile(delay, 0.9)), 3)},
        "coverage": round(min(1.0, len(ordered) / results), 4) if results else None,
        "sources": told([one.source for one in ordered]),
        **counters,
    }
    if task.bundle.manifest.truth != "regress":
        counts: dict[str, int] = {}
        for one in ordered:
            counts[one.label] = counts.get(one.label, 0) + 1
        most = sorted(counts, key=lambda label: (-counts[label], label))[:40]
        found["classes"] = {label: counts[label] for label in most}
        found["imbalance"] = round(max(counts.values()) / min(counts.values()), 2)
    return found


def _estimate(task: Task, judged: Sequence[Labelled]) -> dict[str, Any] | None:
    """Expected accuracy of the same results without labels, and whether what labels say lies outside its interval."""
    shipped = task.judge.shipped if task.judge else None
    scores = [one.result.score for one in judged]
    if shipped is None or shipped.score_correct is None or not judged or any(score is None for score in scores):
        return None
    counts = np.bincount(_bins(shipped, np.array(scores, np.float64)), minlength=len(shipped.score_n))
    found = estimate.cbpe(shipped.score_n, shipped.score_correct, counts)
    off = _pairs(task, judged).losses
    if found is None or off is None:
        return None
    right = 1 - float(off.mean())
    return {**found, "outside": not found["low"] <= right <= found["high"]}
