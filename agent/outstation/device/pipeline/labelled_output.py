"""Labelled output: one output of a task, with what its labels may be and how good its scores promised to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.store.label_store import StoredLabel
from outstation.device.store.predictions import output_key
from outstation.foundation.arrays import Float64s, Ints
from outstation.foundation.indices import bincount
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.performance import cbpe
from outstation.ml.performance.expected_error import BINS, ErrorReference
from outstation.ml.performance.labels import NO_TRUTH, LabelSchema, LabelTarget

if TYPE_CHECKING:
    from outstation.ml.performance.metrics import LabelledPredictions


class HeldOutScores(msgspec.Struct, frozen=True, eq=False):
    """Scores of held-out data by bin: `edges` (B - 1,), `n` (B,), and `correct` (B,), the answers that were right."""

    edges: Float64s
    n: Ints
    correct: Ints


class LabelledOutput(msgspec.Struct, frozen=True, eq=False):
    """Output of a task: the first one with the name "", or a further one."""

    task: str
    name: str
    model: Mapping[str, Any]
    schema: LabelSchema
    held_out: HeldOutScores | None = None
    error: ErrorReference | None = None  # held-out errors, of an output that is a number

    @property
    def key(self) -> str:
        """Key of its predictions, labels and states in the store."""
        return output_key(self.task, self.name)

    @property
    def digest(self) -> str:
        return str(self.model["digest"])

    def filter_valid(self, samples: Sequence[StoredLabel]) -> list[StoredLabel]:
        """Return the samples whose label the current bundle knows."""

        def is_valid(sample: StoredLabel) -> bool:
            try:
                self.schema.parse(sample.label)
            except ValueError:
                return False
            return True

        return [sample for sample in samples if is_valid(sample)]

    def filter_evaluable(self, samples: Sequence[StoredLabel]) -> list[StoredLabel]:
        """Return the samples with ground truth, whose result is a number."""
        is_classified = self.schema.kind in ("classify", "several")
        has_scores = any(sample.prediction.score is not None for sample in samples)

        def is_complete(sample: StoredLabel) -> bool:
            result = sample.prediction
            if not is_classified:
                return result.value is not None
            # A model without any scores is evaluated by its classes alone.
            return result.predicted_class is not None and (result.score is not None or not has_scores)

        return [sample for sample in samples if sample.source not in NO_TRUTH and is_complete(sample)]

    def to_labelled_predictions(self, samples: Sequence[StoredLabel]) -> LabelledPredictions:
        from outstation.ml.performance.metrics import LabelledPredictions

        results = [sample.prediction for sample in samples]
        has_classes = all(result.predicted_class is not None for result in results)
        classes = np.array([result.predicted_class for result in results], np.int64) if has_classes else None
        score = np.array([np.nan if r.score is None else r.score for r in results]) if has_classes else None
        value = None if any(r.value is None for r in results) else np.array([r.value for r in results])
        truth = np.array([self.schema.parse(sample.label) for sample in samples])
        return LabelledPredictions(truth, classes, score, value)

    def estimate_error_chances(self, samples: Sequence[StoredLabel]) -> list[float | None]:
        """Return each result's probability of being wrong, by its score; None where that is not known."""
        held_out = self.held_out
        scores = [sample.prediction.score for sample in samples]
        if held_out is None or not len(held_out.edges):
            return [None] * len(samples)
        known = np.array([0.0 if score is None else score for score in scores])
        chances = cbpe.correctness_probabilities(held_out.n, held_out.correct, held_out.edges, known)
        return [None if score is None else 1 - float(chance) for score, chance in zip(scores, chances, strict=True)]

    def estimate_performance(self, samples: Sequence[StoredLabel]) -> Mapping[str, Any] | None:
        """Return the accuracy (CBPE) or error (DLE) expected without labels of samples from `filter_evaluable`.

        `outside` says that the measured one of the same samples is outside its interval. None unless all have one.
        """
        return self._estimate_accuracy(samples) if self.error is None else self._estimate_error(samples, self.error)

    def _estimate_error(self, samples: Sequence[StoredLabel], error: ErrorReference) -> Mapping[str, Any] | None:
        # Predictions of earlier versions have no bin.
        bins = [at for sample in samples if (at := sample.prediction.expected_bin) is not None and at < BINS]
        if not samples or len(bins) < len(samples):
            return None
        estimate = error.estimate(bincount(np.array(bins, np.int64), minlength=BINS))
        if estimate is None:
            return None
        mae = float(np.abs(self.to_labelled_predictions(samples).errors).mean())
        return {**estimate, "outside": not estimate["mae_low"] <= mae <= estimate["mae_high"]}

    def _estimate_accuracy(self, samples: Sequence[StoredLabel]) -> Mapping[str, Any] | None:
        held_out = self.held_out
        scores = [sample.prediction.score for sample in samples]
        if held_out is None or not samples or any(score is None for score in scores):
            return None
        bins = np.searchsorted(held_out.edges, np.array(scores, np.float64), side="right")
        estimate = cbpe.estimate_accuracy(held_out.n, held_out.correct, bincount(bins, minlength=len(held_out.n)))
        predictions = self.to_labelled_predictions(samples)
        if estimate is None or predictions.predicted is None:
            return None
        accuracy = float(predictions.right.mean())
        return {**estimate, "outside": not estimate["low"] <= accuracy <= estimate["high"]}


def list_outputs(task: LoadedTask) -> list[LabelledOutput]:
    """Return the outputs of a task: the first one, then the further ones by name."""
    shipped = task.drift.monitor.shipped if task.drift else None
    held_out = {} if shipped is None else list_held_out_scores(shipped)
    errors = {} if shipped is None else shipped.error_references
    return [
        LabelledOutput(task.name, name, task.bundle_ref, schema, held_out.get(name), errors.get(name))
        for name, schema in task.bundle.manifest.label_schemas.items()
    ]


def build_label_targets(tasks: Sequence[LoadedTask]) -> dict[str, LabelTarget]:
    """Return what intake needs to check labels of these tasks."""
    return {task.name: LabelTarget(task.config.stream, task.bundle.manifest.label_schemas) for task in tasks}


def list_held_out_scores(shipped: Reference) -> dict[str, HeldOutScores]:
    """Return the held-out scores of each output in a shipped reference that has them."""
    known = {
        each.output.name: HeldOutScores(each.edges[0], *each.held_out)
        for each in shipped.further
        if each.held_out is not None
    }
    if shipped.score_correct is not None and len(shipped.score_edges):
        known[""] = HeldOutScores(shipped.score_edges, shipped.score_n, shipped.score_correct)
    return known
