"""Rows to answers, block by block: what a device computes of the same rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agent.model.bundle.manifest import Manifest
from agent.model.inference import scores
from agent.model.inference.features import Cut, Floats, Ints
from agent.model.inference.inference import Answers, Inference
from agent.performance.metrics import Pairs

Doubles = NDArray[np.float64]


class Stream:
    """Rows that come in blocks; kept are those that wait for more of their window, and the history before them."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self.rows: Floats = np.empty((0, len(inference.fields)), np.float32)
        self.t: Ints = np.empty(0, np.int64)
        self.number: Ints = np.empty(0, np.int64)
        self.before = 0

    def feed(self, rows: Floats, t: Ints, number: Ints, *, raw: bool) -> tuple[Ints, Answers]:
        """(number of each window's last row, answers) of all windows that are whole now."""
        if len(self.rows):
            rows, t = np.concatenate([self.rows, rows]), np.concatenate([self.t, t])
            number = np.concatenate([self.number, number])
        answers = self._inference.run(rows, t, before=self.before, raw=raw)
        last = number[self.before + answers.cut.starts + self._inference.rows - 1]
        done = self.before + answers.cut.consumed
        kept = max(0, done - self._inference.history)
        self.before = done - kept
        self.rows, self.t, self.number = rows[kept:].copy(), t[kept:], number[kept:]
        return last, answers


def kind_of(manifest: Manifest) -> str:
    """classify, regress or anomaly: how answers are judged. Several labels are right or wrong as a whole."""
    return "classify" if manifest.truth == "several" else manifest.truth


class Judge:
    """Answers for windows anywhere in rows that are held in memory, as pairs with what was true."""

    def __init__(self, inference: Inference) -> None:
        self.inference, self.manifest = inference, inference.manifest

    def pairs(self, rows: Floats, t: Ints, starts: Ints, truth: Doubles, sets: NDArray[np.bool_] | None) -> Pairs:
        answers = self.inference.answer(rows, t, Cut(starts, len(rows)))
        return pairs(self.manifest, answers, truth, sets)


def pairs(manifest: Manifest, answers: Answers, truth: Doubles, sets: NDArray[np.bool_] | None) -> Pairs:
    """What was answered beside what was true.

    Of a multi-label model, whose `truth` counts the rows of `sets` (U, K), an answer is right as a whole: it becomes
    class 0 where all its labels are right, and 1 elsewhere, and 0 is what was true. `full` comes with raw outputs.
    """
    found = answers.scores
    if found.said is not None and sets is not None:
        right = (found.said == sets[truth.astype(np.int64)]).all(axis=1)
        return Pairs(np.zeros(len(truth)), said=np.where(right, 0, 1), score=found.score)
    said = found.label if found.anomaly is None else found.anomaly.astype(np.int64)
    return Pairs(truth, said=said, score=found.score, value=found.value, full=probabilities(manifest, answers))


def probabilities(manifest: Manifest, answers: Answers) -> Doubles | None:
    """(w, C) of every class, where the answers came with raw outputs."""
    if manifest.kind != "classify" or answers.outputs is None:
        return None
    return scores.probabilities(answers.outputs, manifest.output)
