"""What labels say of two bundles that answered the same windows. Each label counts once, and a corrected one as it came
first."""

from __future__ import annotations

import numpy as np

from agent.comparison import tally
from agent.comparison.tally import ComparisonStats
from agent.device.pipeline import label_metrics
from agent.device.pipeline.loaded_task import LoadedTask
from agent.device.store import labels
from agent.device.store.labels import PredictionRow, StoredLabel
from agent.device.store.transaction import Transaction
from agent.performance.labels import LabelSchema

# Labels of one message: many that come at once are neighbours, and make several blocks.
MAX_LABELS = 50


def count_outcomes(
    tx: Transaction, task: LoadedTask, other: LoadedTask, after_number: int
) -> tuple[ComparisonStats, int]:
    """Of labels after `number` whose results both bundles have; and the number of the last label looked at."""
    numbers = labels.next_numbers(tx.connection, task.name, after_number, MAX_LABELS)
    if not numbers:
        return ComparisonStats(), after_number
    found = labels.load_labelled(tx.connection, task.name, task.bundle.digest, numbers[-1], MAX_LABELS)
    fresh = [
        one
        for one in label_metrics.filter_evaluable(task, found)
        if one.number > after_number and one.first_number > after_number
    ]
    pairs = [(one, there) for one in fresh if (there := _find_other_result(tx, task, other, one)) is not None]
    return _build_outcome_stats(
        label_metrics.build_label_schema(task), label_metrics.build_label_schema(other), pairs
    ), numbers[-1]


def _find_other_result(
    tx: Transaction, task: LoadedTask, other: LoadedTask, sample: StoredLabel
) -> PredictionRow | None:
    found = tx.labels.find_by_row(labels.shadow_key(task.name), sample.prediction.row)
    return found if found is not None and found.bundle == other.bundle.digest else None


def _build_outcome_stats(
    ours: LabelSchema, theirs: LabelSchema, pairs: list[tuple[StoredLabel, PredictionRow]]
) -> ComparisonStats:
    if ours.kind == "regress":
        off = [
            (_absolute_error(ours, one, one.prediction), _absolute_error(theirs, one, there)) for one, there in pairs
        ]
        return tally.from_abs_errors(np.array([a for a, _ in off]), np.array([b for _, b in off]))
    right = [(_is_correct(ours, one, one.prediction), _is_correct(theirs, one, there)) for one, there in pairs]
    known = [(a, b) for a, b in right if a is not None and b is not None]
    return tally.from_correctness([a for a, _ in known], [b for _, b in known])


def _is_correct(schema: LabelSchema, sample: StoredLabel, result: PredictionRow) -> bool | None:
    """None where the bundle does not understand the label, or said nothing that could be right."""
    if result.predicted_class is None:
        return None
    try:
        return schema.parse(sample.label) == result.predicted_class
    except ValueError:
        return None


def _absolute_error(schema: LabelSchema, sample: StoredLabel, result: PredictionRow) -> float:
    try:
        return float("nan") if result.value is None else abs(result.value - schema.parse(sample.label))
    except ValueError:
        return float("nan")
