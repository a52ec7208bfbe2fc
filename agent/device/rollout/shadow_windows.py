"""The windows of another bundle that end where those of a batch do, and what the two said of them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.comparison.tally import OutputKind, Predictions
from agent.device.pipeline import batch
from agent.device.pipeline.loaded_task import LoadedTask
from agent.device.store.labels import StoredPredictions
from agent.device.store.rows import concatenate
from agent.device.store.store import RowBatch, Store
from agent.drift.baseline.reference import Reference
from agent.model.bundle.manifest import Manifest
from agent.model.inference import derived_features, features, scores
from agent.model.inference.features import Floats, Ints
from agent.model.inference.inference import MAX_VALUES
from agent.model.inference.scores import Scores
from agent.performance import cbpe


class AlignedWindows(msgspec.Struct, frozen=True):
    """Scaled model input, one for each of `row` (w,), the numbers of the rows they end at, at `t` (w,) epoch µs."""

    row: Ints
    t: Ints
    values: Floats


def align_windows(task: LoadedTask, store: Store, source_batch: RowBatch, ends: Ints) -> AlignedWindows:
    """The windows of `task` that end at `ends` (w,), offsets into the rows of the batch; fewer where one has no room.

    None begins before what is still stored, or reaches over a gap; and no more than fit into memory. Raises
    StorageError.
    """
    spec, length = task.inference.manifest.input, task.window_rows
    past = batch.load_history(task, store, source_batch.first - 1, task.inference.history_rows + length - 1)
    rows = concatenate([past, source_batch.rows]) if len(past) else source_batch.rows
    # Windows may begin in the rows before the batch, and features look back from there.
    before = max(0, len(past) - (length - 1))
    matrix = features.stack_columns([rows.columns[i] for i in task.input_columns])
    table = derived_features.compute(matrix, rows.t, spec, before)
    starts = ends + (len(past) - before) - length + 1
    whole = np.isin(starts, _find_window_starts(rows.t[before:], task.inference.manifest))
    most = max(1, MAX_VALUES // (length * table.shape[1]))
    starts, ends = starts[whole][:most], ends[whole][:most]
    return AlignedWindows(
        source_batch.first + ends, source_batch.rows.t[ends], features.build_windows(table, starts, spec)
    )


def _find_window_starts(t: Ints, manifest: Manifest) -> Ints:
    """Where windows could begin, were there one at each row."""
    window = manifest.input.window
    return features.cut_windows(t, None if window is None else replace(window, step=1)).starts


def build_output_kind(manifest: Manifest) -> OutputKind:
    return OutputKind(manifest.label_kind, tuple(manifest.output.labels))


def build_predictions(row: Ints, model_scores: Scores, seconds: float, reference: Reference | None) -> Predictions:
    """`table` says how often a score is right; without, a score is taken for the chance that it is."""
    chance = model_scores.score
    if model_scores.score is not None and reference is not None:
        assert reference.score_correct is not None
        chance = cbpe.correctness_probabilities(
            reference.score_n, reference.score_correct, reference.score_edges, model_scores.score
        )
    several = model_scores.predicted is not None
    label = None if several else model_scores.label
    return Predictions(
        row,
        seconds,
        label,
        model_scores.predicted,
        model_scores.anomaly,
        model_scores.score,
        model_scores.value,
        chance,
    )


def select_score_references(references: Sequence[Reference | None]) -> list[Reference | None]:
    """Those that tell how often a score is right, where all do: two that are told by other means do not compare."""
    known = [one is not None and one.score_correct is not None and len(one.score_edges) > 0 for one in references]
    return list(references) if all(known) else [None] * len(references)


def build_stored_predictions(digest: str, windows: AlignedWindows, model_scores: Scores) -> StoredPredictions:
    """As it is kept for labels that come later."""
    return StoredPredictions(
        digest, windows.row, windows.t, scores.to_codes(model_scores), model_scores.score, model_scores.value, {}
    )


def concatenate_stored(parts: Sequence[StoredPredictions]) -> StoredPredictions:
    """Of one bundle, in order."""

    def column(name: str) -> np.ndarray | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else np.concatenate(found)

    row, t = np.concatenate([part.row for part in parts]), np.concatenate([part.t for part in parts])
    return StoredPredictions(parts[0].bundle, row, t, column("said"), column("score"), column("value"), {})
