"""Predictions of a bundle for rows, equal to those of a device, alone or paired with labels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints
from outstation.ml.model.bundle.manifest import Manifest
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.ml.model.inference.joins import JoinedRows
from outstation.ml.performance.metrics import LabelledPredictions


class StreamingPredictor:
    """Predictions for rows that come in blocks; holds the rows of an unfinished window, and the history before it."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self.rows: Float32s = np.empty((0, len(inference.fields)), np.float32)
        self.t: Ints = np.empty(0, np.int64)
        self.row_numbers: Ints = np.empty(0, np.int64)
        self.history_rows = 0

    def feed(
        self, rows: Float32s, t: Ints, row_numbers: Ints, joined: Mapping[str, JoinedRows], *, raw: bool
    ) -> tuple[Ints, InferenceResult]:
        """Return (number of each window's last row, result) of all windows that are complete now."""
        if len(self.rows):
            rows, t = np.concatenate([self.rows, rows]), np.concatenate([self.t, t])
            row_numbers = np.concatenate([self.row_numbers, row_numbers])
        result = self._inference.run(rows, t, history_rows=self.history_rows, with_outputs=raw, joined=joined)
        last = row_numbers[self.history_rows + result.cut.starts + self._inference.rows - 1]
        done = self.history_rows + result.cut.consumed
        start = max(0, done - self._inference.history_rows)
        self.history_rows = done - start
        self.rows, self.t, self.row_numbers = rows[start:].copy(), t[start:], row_numbers[start:]
        return last, result


def evaluation_kind(manifest: Manifest) -> str:
    """Return classify, regress or anomaly; predictions of a multi-label model are right or wrong as a whole."""
    return "classify" if manifest.label_kind == "several" else manifest.label_kind


def pair_with_truth(
    manifest: Manifest, result: InferenceResult, truth: Float64s, label_sets: Bools | None
) -> LabelledPredictions:
    """Pair predictions with labels.

    For a multi-label model `truth` indexes the rows of `label_sets` (U, K). A prediction of it is class 0 if all its
    labels are right, else class 1; the true class is 0. Class probabilities need raw outputs.
    """
    scored = result.scores
    if scored.predicted is not None and label_sets is not None:
        true = label_sets[truth.astype(np.int64)]
        wrong = (scored.predicted != true).any(axis=1).astype(np.int64)
        both = np.stack([true, scored.predicted], axis=1)
        return LabelledPredictions(np.zeros(len(truth)), wrong, scored.score, label_sets=both)
    predicted = scored.label if scored.anomaly is None else scored.anomaly.astype(np.int64)
    probabilities = None
    if manifest.kind == "classify" and result.outputs is not None:
        probabilities = scores.compute_probabilities(scores.split_outputs(result.outputs, manifest)[0], manifest.output)
    return LabelledPredictions(truth, predicted, scored.score, scored.value, probabilities)
