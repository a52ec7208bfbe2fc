"""What a `quality` message says of labelled results.

Labels that are the model's own answers, and results that are no number, are counted and left out of every metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from agent import clock
from agent.arrays import Floats
from agent.device.pipeline.batch import Task
from agent.device.store import labels
from agent.device.store.labels import Labelled
from agent.device.store.transaction import Transaction
from agent.drift.baseline.reference import Reference
from agent.performance import cbpe, degradation, metrics, slices
from agent.performance.labels import MODEL, Truth, told
from agent.performance.metrics import Metric, Pairs
from agent.wire.messages import encode

_MOST_CLASSES = 40
# Room for the head that every message has, and for labels and estimate.
_HEAD_BYTES = 1_500


class Taken(msgspec.Struct, frozen=True):
    """Labelled results in the order of their labels; `fresh` are those that no message has told of.

    `corrected` of these took the place of a label that one has told of.
    """

    window: list[Labelled]
    fresh: list[Labelled]
    corrected: int

    @classmethod
    def of(cls, task: Task, window: Sequence[Labelled], state: degradation.State) -> Taken:
        understood = known(task, window)
        fresh = [one for one in understood if one.number > state.number]
        return cls(understood, fresh, sum(one.first <= state.number for one in fresh))


def truth_of(task: Task) -> Truth:
    manifest = task.bundle.manifest
    return Truth(manifest.truth, tuple(manifest.output.labels))


def known(task: Task, some: Sequence[Labelled]) -> list[Labelled]:
    """Those whose label this bundle understands."""
    truth = truth_of(task)
    return [one for one in some if _read(truth, one) is not None]


def judged(task: Task, some: Sequence[Labelled]) -> list[Labelled]:
    """Those that somebody else labelled, and whose result is a number."""
    named = truth_of(task).kind in ("classify", "several")
    scored = any(one.result.score is not None for one in some)

    def whole(one: Labelled) -> bool:
        if not named:
            return one.result.value is not None
        # A model without any scores is judged by its answers alone.
        return one.result.said is not None and (one.result.score is not None or not scored)

    return [one for one in some if one.source != MODEL and whole(one)]


def _read(truth: Truth, one: Labelled) -> float | None:
    try:
        return truth.read(one.label)
    except ValueError:
        return None


def pairs(task: Task, some: Sequence[Labelled]) -> Pairs:
    """Of `judged` ones, in the order given."""
    results = [one.result for one in some]
    truth = truth_of(task)
    said = None if any(r.said is None for r in results) else np.array([r.said for r in results], np.int64)
    score = np.array([np.nan if r.score is None else r.score for r in results]) if said is not None else None
    value = None if any(r.value is None for r in results) else np.array([r.value for r in results])
    return Pairs(np.array([truth.read(one.label) for one in some]), said, score, value)


def expected(task: Task, some: Sequence[Labelled]) -> list[float | None]:
    """The chance of a mistake that the score of each result tells."""
    shipped = task.judge.shipped if task.judge else None
    scores = [one.result.score for one in some]
    if shipped is None or shipped.score_correct is None or not len(shipped.score_edges):
        return [None] * len(some)
    known = np.array([0.0 if score is None else score for score in scores])
    found = cbpe.chances(shipped.score_n, shipped.score_correct, shipped.score_edges, known)
    return [None if score is None else 1 - float(chance) for score, chance in zip(scores, found, strict=True)]


def _bins(shipped: Reference, scores: Floats) -> Any:
    return np.searchsorted(shipped.score_edges, scores, side="right")


def body(task: Task, tx: Transaction, most: int, taken: Taken) -> dict[str, Any]:
    """The message's members; `most` bytes, with its head."""
    ordered = sorted(taken.window, key=lambda one: one.result.row)
    some = judged(task, ordered)
    rows, times = [one.result.row for one in ordered], [one.result.t for one in ordered]
    window = {
        "rows": [rows[0], rows[-1]],
        "from": clock.rfc3339(min(times)),
        "to": clock.rfc3339(max(times)),
        "n": len(some),
        "new": len(taken.fresh),
        "corrected": taken.corrected,
        "no_result": sum(one.source != MODEL for one in ordered) - len(some),
    }
    head = {"model": task.reference, "window": window, "labels": _labels(task, tx, ordered)}
    whole = {**head, "estimate": _estimate(task, some)}
    found = _metrics(task, some)
    while found and len(encode({**whole, "metrics": [one.told() for one in found]})) > most - _HEAD_BYTES:
        # Slices and rare classes come last.
        found = found[: len(found) * 3 // 4]
    return {**whole, "metrics": [one.told() for one in found]}


def _metrics(task: Task, some: Sequence[Labelled]) -> list[Metric]:
    if not some:
        return []
    truth, given = truth_of(task), pairs(task, some)
    names = sorted(set.intersection(*(set(one.result.slices) for one in some)))
    sliced = {name: [one.result.slices[name] for one in some] for name in names}
    return [*metrics.measure(truth.kind, truth.labels, given), *slices.measure(truth.kind, given, sliced)]


def _labels(task: Task, tx: Transaction, ordered: Sequence[Labelled]) -> dict[str, Any]:
    """Where the labels come from: how late, how many of each class, how much of the results they cover."""
    delay = np.array([max(0, one.received - one.result.t) / 1e6 for one in ordered])
    results = labels.count_results(tx.connection, task.name, ordered[0].result.row, ordered[-1].result.row)
    counters = {name: tx.counter(f"labels {name}.{task.name}") for name in ("replaced", "late", "unmatched")}
    found: dict[str, Any] = {
        "n": len(ordered),
        "delay_s": {"median": round(float(np.median(delay)), 3), "p90": round(float(np.quantile(delay, 0.9)), 3)},
        "coverage": round(min(1.0, len(ordered) / results), 4) if results else None,
        "sources": told([one.source for one in ordered]),
        **counters,
    }
    return found | _classes(truth_of(task), [one.label for one in ordered])


def _classes(truth: Truth, texts: Sequence[str]) -> dict[str, Any]:
    """How many labels of each class there is, whatever words they came in; a class without any counts as one."""
    if not truth.names:
        return {}
    counts = dict.fromkeys(truth.names, 0)
    for text in texts:
        for name in truth.meant(text):
            counts[name] += 1
    most = sorted(counts, key=lambda name: -counts[name])[:_MOST_CLASSES]
    imbalance = max(counts.values()) / max(1, min(counts.values()))
    return {"classes": {name: counts[name] for name in most}, "imbalance": round(imbalance, 2)}


def _estimate(task: Task, some: Sequence[Labelled]) -> dict[str, Any] | None:
    """Expected accuracy of the same results without labels, and whether what labels say lies outside its interval."""
    shipped = task.judge.shipped if task.judge else None
    scores = [one.result.score for one in some]
    if shipped is None or shipped.score_correct is None or not some or any(score is None for score in scores):
        return None
    counts = np.bincount(_bins(shipped, np.array(scores, np.float64)), minlength=len(shipped.score_n))
    found = cbpe.cbpe(shipped.score_n, shipped.score_correct, counts)
    off = pairs(task, some).losses
    if found is None or off is None:
        return None
    right = 1 - float(off.mean())
    return {**found, "outside": not found["low"] <= right <= found["high"]}
