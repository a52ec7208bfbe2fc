"""Shadow windows: align the windows of a second bundle with those of a batch, and compare predictions and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Float32s, Ints
from agent.comparison import tally
from agent.comparison.tally import ComparisonStats, OutputKind, Predictions
from agent.device.pipeline import batch
from agent.device.pipeline.labelled_output import list_outputs
from agent.device.pipeline.loaded_task import LoadedTask
from agent.device.store import labels, predictions
from agent.device.store.labels import StoredLabel
from agent.device.store.predictions import PredictionRow, StoredPredictions
from agent.device.store.row_batch import RowBatch
from agent.device.store.rows import concatenate
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.drift.baseline.reference import Reference
from agent.model.bundle.manifest import Manifest
from agent.model.inference import derived_features, features, scores
from agent.model.inference.features import WindowCut
from agent.model.inference.inference import MAX_VALUES
from agent.model.inference.scores import Scores
from agent.performance import cbpe
from agent.performance.labels import LabelSchema

# Labels of one message: many that arrive at once are neighbours, and make several blocks.
MAX_LABELS = 50


class AlignedWindows(msgspec.Struct, frozen=True):
    """Scaled `values` of w windows; `row` (w,) and `t` (w,) epoch µs of the rows they end at.

    `model_input` also has the values of joined inputs.
    """

    row: Ints
    t: Ints
    values: Float32s
    model_input: Float32s


def align_windows(task: LoadedTask, store: Store, source_batch: RowBatch, ends: Ints) -> AlignedWindows:
    """Return the windows of `task` that end at `ends` (w,), offsets into the rows of the batch.

    Windows that begin before the oldest stored row, or span a gap, are left out, and so are windows beyond the memory
    limit. Raises StorageError.
    """
    spec, length = task.inference.manifest.input, task.window_rows
    past = batch.load_history(task, store, source_batch.first - 1, task.inference.history_rows + length - 1)
    rows = concatenate([past, source_batch.rows]) if len(past) else source_batch.rows
    # Windows may begin before the batch, and features look back from there.
    before = max(0, len(past) - (length - 1))
    matrix = features.stack_columns([rows.columns[i] for i in task.input_columns])
    table = derived_features.compute(matrix, rows.t, spec, before)
    starts = ends + (len(past) - before) - length + 1
    window = task.inference.manifest.input.window
    every_start = features.cut_windows(rows.t[before:], None if window is None else replace(window, step=1)).starts
    is_whole = np.isin(starts, every_start)
    further = sum(joined.size for joined in task.inference.manifest.joined.values())
    limit = max(1, MAX_VALUES // (length * table.shape[1] + further))
    starts, ends = starts[is_whole][:limit], ends[is_whole][:limit]
    joined = None
    if task.joined_reader is not None:
        # The batch has waited for its own inputs; windows of this bundle are joined with what is there.
        before_batch = rows.t[before:]
        batch_join = task.joined_reader.join(store, WindowCut(starts, len(before_batch)), before_batch, 1)
        task.joined_reader.confirm(batch_join)
        starts, joined = batch_join.cut.starts, batch_join.cut.joined
        ends = ends[: len(starts)]
    values = model_input = features.build_windows(table, starts, spec)
    if joined is not None:
        model_input = np.concatenate([values.reshape(len(starts), math.prod(values.shape[1:])), joined.values], axis=1)
    t = source_batch.rows.t
    return AlignedWindows(source_batch.first + ends, t[ends], values, model_input)


def build_output_kind(manifest: Manifest) -> OutputKind:
    return OutputKind(manifest.label_kind, tuple(manifest.output.labels))


def build_predictions(row: Ints, model_scores: Scores, seconds: float, reference: Reference | None) -> Predictions:
    """Build predictions. `reference` maps a score to its accuracy; without it a score is its own probability."""
    probability = model_scores.score
    if model_scores.score is not None and reference is not None:
        assert reference.score_correct is not None
        probability = cbpe.correctness_probabilities(
            reference.score_n, reference.score_correct, reference.score_edges, model_scores.score
        )
    is_multi_label = model_scores.predicted is not None
    return Predictions(
        row,
        seconds,
        None if is_multi_label else model_scores.label,
        model_scores.predicted,
        model_scores.anomaly,
        model_scores.score,
        model_scores.value,
        probability,
    )


def select_score_references(references: Sequence[Reference | None]) -> list[Reference | None]:
    """Return the references if all of them map scores to accuracies, else none: mixed estimates do not compare."""
    known = [
        reference is not None and reference.score_correct is not None and len(reference.score_edges) > 0
        for reference in references
    ]
    return list(references) if all(known) else [None] * len(references)


def build_stored_predictions(digest: str, windows: AlignedWindows, model_scores: Scores) -> StoredPredictions:
    """Build the predictions to store for labels that arrive later."""
    return StoredPredictions(
        digest, windows.row, windows.t, scores.to_codes(model_scores), model_scores.score, model_scores.value, {}
    )


def concatenate_stored(parts: Sequence[StoredPredictions]) -> StoredPredictions:
    def join(columns: Sequence[Any]) -> Any:
        return None if columns[0] is None else np.concatenate(columns)

    return StoredPredictions(
        parts[0].bundle,
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.t for part in parts]),
        join([part.predicted_class for part in parts]),
        join([part.score for part in parts]),
        join([part.value for part in parts]),
        {},
    )


def count_outcomes(tx: Transaction, task: LoadedTask, other: LoadedTask, after: int) -> tuple[ComparisonStats, int]:
    """Compare both bundles' predictions with the labels after `after`.

    Each label counts once; one that is corrected later counts as it arrived first. Labels whose author is not
    authenticated count nowhere here: whoever may write rows must not be able to roll a bundle back, or let one pass.
    Return the statistics and the number of the last label read.
    """
    numbers = labels.next_numbers(tx.connection, task.name, after, MAX_LABELS)
    if not numbers:
        return ComparisonStats(), after
    first = list_outputs(task)[0]
    labelled = labels.load_labelled(tx.connection, task.name, task.bundle.digest, numbers[-1], MAX_LABELS)
    pairs = [
        (sample, prediction)
        for sample in first.filter_evaluable(labelled)
        if sample.by
        and sample.number > after
        and sample.first_number > after
        and (prediction := _find_other_prediction(tx, task, other, sample)) is not None
    ]
    stats = _build_outcome_stats(first.schema, list_outputs(other)[0].schema, pairs)
    return stats, numbers[-1]


def _find_other_prediction(
    tx: Transaction, task: LoadedTask, other: LoadedTask, sample: StoredLabel
) -> PredictionRow | None:
    prediction = tx.labels.find_by_row(predictions.shadow_key(task.name), sample.prediction.row)
    return prediction if prediction is not None and prediction.bundle == other.bundle.digest else None


def _build_outcome_stats(
    schema: LabelSchema, other_schema: LabelSchema, pairs: list[tuple[StoredLabel, PredictionRow]]
) -> ComparisonStats:
    if schema.kind == "regress":
        errors = [_absolute_error(schema, sample, sample.prediction) for sample, _ in pairs]
        other_errors = [_absolute_error(other_schema, sample, prediction) for sample, prediction in pairs]
        return tally.from_abs_errors(np.array(errors), np.array(other_errors))
    outcomes = [
        (_is_correct(schema, sample, sample.prediction), _is_correct(other_schema, sample, prediction))
        for sample, prediction in pairs
    ]
    known = [(ours, theirs) for ours, theirs in outcomes if ours is not None and theirs is not None]
    return tally.from_correctness([ours for ours, _ in known], [theirs for _, theirs in known])


def _is_correct(schema: LabelSchema, sample: StoredLabel, prediction: PredictionRow) -> bool | None:
    """Return None if the bundle does not know the label, or predicted nothing that could be correct."""
    if prediction.predicted_class is None:
        return None
    try:
        return schema.parse(sample.label) == prediction.predicted_class
    except ValueError:
        return None


def _absolute_error(schema: LabelSchema, sample: StoredLabel, prediction: PredictionRow) -> float:
    try:
        return float("nan") if prediction.value is None else abs(prediction.value - schema.parse(sample.label))
    except ValueError:
        return float("nan")
