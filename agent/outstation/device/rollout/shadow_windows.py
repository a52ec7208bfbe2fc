"""Shadow windows: align the windows of a second bundle with those of a batch, and compare predictions and labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.device.pipeline import prepared_batch
from outstation.device.pipeline.labelled_output import HeldOutScores, LabelledOutput, list_held_out_scores, list_outputs
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.store import label_store, predictions
from outstation.device.store.label_store import StoredLabel
from outstation.device.store.predictions import PredictionRow, StoredPredictions, output_key
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.rows import concatenate
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.ml.comparison import tally
from outstation.ml.comparison.tally import ComparisonStats, Predictions
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.expected_errors import expect_errors
from outstation.ml.model.inference import derived_features, features, scores
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import MAX_VALUES
from outstation.ml.model.inference.scores import Scores
from outstation.ml.performance import cbpe
from outstation.ml.performance.labels import LabelSchema

# Labels of one message: many that arrive at once are neighbours, and make several blocks.
MAX_LABELS = 50


class AlignedWindows(msgspec.Struct, frozen=True):
    """Scaled `values` of w windows; `row` (w,) and `t` (w,) epoch µs of the rows they end at.

    `model_input` also has the values of joined inputs. `rows` (n, F) are in physical units, `starts` (w,) offsets into
    them.
    """

    row: Ints
    t: Ints
    values: Float32s
    model_input: Float32s
    rows: Float32s
    starts: Ints


class _CutWindows(msgspec.Struct, frozen=True):
    """Windows that begin at `starts` (w,) in the features `table` (n, C), and end at `ends` (w,) in a batch.

    `rows` (n, F) in physical units at `t` (n,) epoch µs.
    """

    table: Float32s
    rows: Float32s
    starts: Ints
    ends: Ints
    t: Ints


def _cut_windows(task: LoadedTask, store: Store, source_batch: RowBatch, ends: Ints) -> _CutWindows:
    """Return the windows of `task` that end at `ends` (w,), offsets into the rows of the batch, without joined inputs.

    Windows that begin before the oldest stored row, or span a gap, are left out, and so are windows beyond the memory
    limit. Raises StorageError.
    """
    spec, length = task.inference.manifest.input, task.window_rows
    past = prepared_batch.load_history(task, store, source_batch.first - 1, task.inference.history_rows + length - 1)
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
    return _CutWindows(table, matrix[before:], starts[is_whole][:limit], ends[is_whole][:limit], rows.t[before:])


def align_windows(task: LoadedTask, store: Store, source_batch: RowBatch, ends: Ints) -> AlignedWindows:
    """Return the windows of `task` that end at `ends` (w,), as `_cut_windows` does, with its joined inputs."""
    cut, joined = _cut_windows(task, store, source_batch, ends), None
    starts, ends = cut.starts, cut.ends
    if task.joined is not None:
        # The batch has waited for its own inputs; windows of this bundle are joined with what is there.
        batch_join = task.joined.reader.join(store, WindowCut(starts, len(cut.t)), cut.t, 1)
        task.joined.reader.confirm(batch_join)
        starts, joined = batch_join.cut.starts, batch_join.cut.joined
        ends = ends[: len(starts)]
    values = model_input = features.build_windows(cut.table, starts, task.inference.manifest.input)
    if joined is not None:
        model_input = np.concatenate([values.reshape(len(starts), math.prod(values.shape[1:])), joined.values], axis=1)
    t = source_batch.rows.t
    return AlignedWindows(source_batch.first + ends, t[ends], values, model_input, cut.rows, starts)


def expect_own_errors(
    task: LoadedTask, store: Store, source_batch: RowBatch, ends: Ints, model_scores: Scores, basis: EstimateBasis
) -> dict[str, Float64s]:
    """Return the errors (w,) to expect of what `task` answered itself for the windows that end at `ends` (w,)."""
    if basis.reference is None:
        return {}
    cut = _cut_windows(task, store, source_batch, ends)
    at = np.searchsorted(ends, cut.ends)
    errors = dict[str, Float64s]()
    for name, known in basis.expect_errors(cut.rows, cut.starts, model_scores, at).items():
        errors[name] = np.full(len(ends), np.nan)
        errors[name][at] = known
    return errors


def build_predictions(
    row: Ints,
    model_scores: Scores,
    seconds: float,
    basis: EstimateBasis,
    errors: Mapping[str, Float64s],
    name: str = "",
) -> Predictions:
    """Build the predictions of output `name`, by default of all. `errors` (w,) are those to expect of each output."""
    probability, held_out = model_scores.score, basis.scores.get(name)
    if model_scores.score is not None and held_out is not None:
        probability = cbpe.correctness_probabilities(held_out.n, held_out.correct, held_out.edges, model_scores.score)
    return replace(
        Predictions.from_scores(model_scores, row, seconds),
        correct_probability=probability,
        expected_error=errors.get(name),
        outputs={
            each: build_predictions(row, own, 0.0, basis, errors, each) for each, own in model_scores.outputs.items()
        },
    )


class EstimateBasis(msgspec.Struct, frozen=True, eq=False):
    """Basis of estimates of one bundle without labels: held-out scores by output, and a reference with errors.

    Without held-out scores a score is its own probability. `errors` names the outputs whose error is estimated.
    """

    scores: Mapping[str, HeldOutScores] = {}
    reference: Reference | None = None
    errors: frozenset[str] = frozenset()

    def expect_errors(
        self, rows: Float32s, starts: Ints, model_scores: Scores, at: Ints | slice = slice(None)
    ) -> dict[str, Float64s]:
        """Return the absolute error (w,) to expect of the values of each output that both bundles estimate it of.

        `rows` (n, F) in physical units, `starts` (w,) offsets of windows into them, whose values are those `at` places.
        """
        if self.reference is None or not len(starts):
            return {}
        outputs = {"": model_scores, **model_scores.outputs}
        answers = {
            name: own.value[at] for name, own in outputs.items() if own.value is not None and name in self.errors
        }
        return expect_errors(self.reference, rows, starts, answers)


def select_estimate_bases(references: Sequence[Reference | None]) -> list[EstimateBasis]:
    """Return the bases of estimates, of outputs for which all bundles have it: mixed estimates do not compare."""
    known = [reference for reference in references if reference is not None]
    if len(known) < len(references):
        return [EstimateBasis()] * len(references)
    tables = [list_held_out_scores(reference) for reference in known]
    shared = set.intersection(*(set(table) for table in tables))
    errors = frozenset.intersection(*(frozenset(reference.error_references) for reference in known))
    return [
        EstimateBasis({name: table[name] for name in shared}, reference if errors else None, errors)
        for table, reference in zip(tables, known, strict=True)
    ]


def build_stored_predictions(
    digest: str, windows: AlignedWindows, model_scores: Scores
) -> dict[str, StoredPredictions]:
    """Build the predictions of each output to store for labels that arrive later."""
    return {
        name: StoredPredictions(digest, windows.row, windows.t, scores.to_codes(own), own.score, own.value, {})
        for name, own in {"": model_scores, **model_scores.outputs}.items()
    }


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


def count_waiting_labels(store: Store, task: LoadedTask, after: Mapping[str, int]) -> dict[str, int]:
    """Count the labels of each output with higher numbers than in `after`, up to MAX_LABELS + 1."""
    return {
        name: len(
            store.query(label_store.next_numbers, output_key(task.name, name), after.get(name, 0), MAX_LABELS + 1)
        )
        for name in task.bundle.manifest.label_schemas
    }


def count_outcomes(
    tx: Transaction, task: LoadedTask, other: LoadedTask, after: Mapping[str, int]
) -> tuple[ComparisonStats, dict[str, int]]:
    """Compare both bundles' predictions with the labels of the outputs named in `after`, behind these numbers.

    Each label counts once; one that is corrected later counts as it arrived first. Labels whose author is not
    authenticated count nowhere here: a program that may write rows must not be able to roll a bundle back, or let one
    pass. Return the statistics and the number of the last label read of each output.
    """
    others = {output.name: output for output in list_outputs(other)}
    stats: dict[str, ComparisonStats] = {}
    last = dict(after)
    for output in list_outputs(task):
        if output.name not in after:
            continue
        numbers = label_store.next_numbers(tx.connection, output.key, after[output.name], MAX_LABELS)
        last[output.name] = max(numbers, default=after[output.name])
        if numbers and output.name in others:
            outcomes = _count_output_outcomes(tx, output, others[output.name], (after[output.name], numbers[-1]))
            stats |= {output.name: outcomes} if outcomes != ComparisonStats() else {}
    return replace(stats.pop("", ComparisonStats()), outputs=stats), last


def _count_output_outcomes(
    tx: Transaction, output: LabelledOutput, other: LabelledOutput, numbers: tuple[int, int]
) -> ComparisonStats:
    """Compare predictions with the labels behind the first number, up to the last one."""
    after, last = numbers
    labelled = label_store.load_labelled(tx.connection, output.key, output.digest, last, MAX_LABELS)
    key = predictions.shadow_key(output.task, output.name)
    pairs = [
        (sample, prediction)
        for sample in output.filter_evaluable(labelled)
        if sample.by
        and sample.number > after
        and sample.first_number > after
        and (prediction := tx.labels.find_by_row(key, sample.prediction.row)) is not None
        and prediction.bundle == other.digest
    ]
    return _build_outcome_stats(output.schema, other.schema, pairs)


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
