"""What labels say of two bundles that answered the same windows. Each label counts once, and a corrected one as it came
first."""

from __future__ import annotations

import numpy as np

from agent.comparison import tally
from agent.comparison.tally import Tally
from agent.device.pipeline import measured
from agent.device.pipeline.batch import Task
from agent.device.store import labels
from agent.device.store.given import Result
from agent.device.store.labels import Labelled
from agent.device.store.transaction import Transaction
from agent.performance.labels import Truth

# Labels of one message: many that come at once are neighbours, and make several blocks.
MOST = 50


def count(tx: Transaction, task: Task, other: Task, number: int) -> tuple[Tally, int]:
    """Of labels after `number` whose results both bundles have; and the number of the last label looked at."""
    numbers = labels.after(tx.connection, task.name, number, MOST)
    if not numbers:
        return Tally(), number
    found = labels.labelled(tx.connection, task.name, task.bundle.digest, numbers[-1], MOST)
    fresh = [one for one in measured.judged(task, found) if one.number > number and one.first > number]
    pairs = [(one, there) for one in fresh if (there := _beside(tx, task, other, one)) is not None]
    return _outcomes(measured.truth_of(task), measured.truth_of(other), pairs), numbers[-1]


def _beside(tx: Transaction, task: Task, other: Task, one: Labelled) -> Result | None:
    found = tx.labels.at(labels.beside(task.name), one.result.row)
    return found if found is not None and found.bundle == other.bundle.digest else None


def _outcomes(ours: Truth, theirs: Truth, pairs: list[tuple[Labelled, Result]]) -> Tally:
    if ours.kind == "regress":
        off = [(_off(ours, one, one.result), _off(theirs, one, there)) for one, there in pairs]
        return tally.off(np.array([a for a, _ in off]), np.array([b for _, b in off]))
    right = [(_right(ours, one, one.result), _right(theirs, one, there)) for one, there in pairs]
    known = [(a, b) for a, b in right if a is not None and b is not None]
    return tally.labelled([a for a, _ in known], [b for _, b in known])


def _right(truth: Truth, one: Labelled, said: Result) -> bool | None:
    """None where the bundle does not understand the label, or said nothing that could be right."""
    if said.said is None:
        return None
    try:
        return truth.read(one.label) == said.said
    except ValueError:
        return None


def _off(truth: Truth, one: Labelled, said: Result) -> float:
    try:
        return float("nan") if said.value is None else abs(said.value - truth.read(one.label))
    except ValueError:
        return float("nan")
