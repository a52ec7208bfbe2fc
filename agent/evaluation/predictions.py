"""Rows to answers, block by block: what a device computes of the same rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agent.model.bundle.manifest import Manifest
from agent.model.inference import scores
from agent.model.inference.features import Floats, Ints, WindowCut
from agent.model.inference.inference import Inference, InferenceResult
from agent.performance.metrics import LabelledPredictions

Doubles = NDArray[np.float64]


class StreamingPredictor:
    """Rows that come in blocks; kept are those that wait for more of their window, and the history before them."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self.rows: Floats = np.empty((0, len(inference.fields)), np.float32)
        self.t: Ints = np.empty(0, np.int64)
        self.row_numbers: Ints = np.empty(0, np.int64)
        self.history_rows = 0

    def feed(self, rows: Floats, t: Ints, row_numbers: Ints, *, raw: bool) -> tuple[Ints, InferenceResult]:
        """(number of each window's last row, answers) of all windows that are whole now."""
        if len(self.rows):
            rows, t = np.concatenate([self.rows, rows]), np.concatenate([self.t, t])
            row_numbers = np.concatenate([self.row_numbers, row_numbers])
        answers = self._inference.run(rows, t, history_rows=self.history_rows, with_outputs=raw)
        last = row_numbers[self.history_rows + answers.cut.starts + self._inference.rows - 1]
        done = self.history_rows + answers.cut.consumed
        kept = max(0, done - self._inference.history_rows)
        self.history_rows = done - kept
        self.rows, self.t, self.row_numbers = rows[kept:].copy(), t[kept:], row_numbers[kept:]
        return last, answers


def evaluation_kind(manifest: Manifest) -> str:
    """classify, regress or anomaly: how answers are judged. Several labels are right or wrong as a whole."""
    return "classify" if manifest.label_kind == "several" else manifest.label_kind


class LabelledPredictor:
    """Answers for windows anywhere in rows that are held in memory, as pairs with what was true."""

    def __init__(self, inference: Inference) -> None:
        self.inference, self.manifest = inference, inference.manifest

    def predict(
        self, rows: Floats, t: Ints, starts: Ints, truth: Doubles, label_sets: NDArray[np.bool_] | None
    ) -> LabelledPredictions:
        answers = self.inference.run_windows(rows, t, WindowCut(starts, len(rows)))
        return pair_with_truth(self.manifest, answers, truth, label_sets)


def pair_with_truth(
    manifest: Manifest, answers: InferenceResult, truth: Doubles, label_sets: NDArray[np.bool_] | None
) -> LabelledPredictions:
    """What was answered beside what was true.

    Of a multi-label model, whose `truth` counts the rows of `sets` (U, K), an answer is right as a whole: it becomes
    class 0 where all its labels are right, and 1 elsewhere, and 0 is what was true. `full` comes with raw outputs.
    """
    found = answers.scores
    if found.predicted is not None and label_sets is not None:
        right = (found.predicted == label_sets[truth.astype(np.int64)]).all(axis=1)
        return LabelledPredictions(np.zeros(len(truth)), predicted=np.where(right, 0, 1), score=found.score)
    said = found.label if found.anomaly is None else found.anomaly.astype(np.int64)
    return LabelledPredictions(
        truth,
        predicted=said,
        score=found.score,
        value=found.value,
        probabilities=class_probabilities(manifest, answers),
    )


def class_probabilities(manifest: Manifest, answers: InferenceResult) -> Doubles | None:
    """(w, C) of every class, where the answers came with raw outputs."""
    if manifest.kind != "classify" or answers.outputs is None:
        return None
    return scores.compute_probabilities(answers.outputs, manifest.output)
