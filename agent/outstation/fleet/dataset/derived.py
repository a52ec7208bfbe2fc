"""Derived features of a retraining set, computed as devices do: from each row and those before it, never later ones.

A recording begins somewhere in a stream. Where a feature looks back beyond the recording, nobody knows what the device
computed, so its value is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from outstation.fleet.dataset.gather import RESERVED_COLUMNS, Gathered, Recording, name_label_column
from outstation.foundation.arrays import Bools, Float32s, Ints
from outstation.foundation.errors import UsageError
from outstation.ml.model.bundle import feature_set as feature_sets
from outstation.ml.model.bundle.feature_set import FeatureSet
from outstation.ml.model.bundle.manifest import ModelInput
from outstation.ml.model.inference import derived_features


class DerivedColumns(msgspec.Struct, frozen=True, eq=False):
    """Derived features of a set, `values` (n, D) of each recording; `left_out` counts rows with too short a history.

    A value is NaN where it is missing on the device, too, or left out.
    """

    feature_set: FeatureSet
    values: Sequence[Float32s]
    left_out: dict[str, int]

    @property
    def names(self) -> list[str]:
        return self.feature_set.columns


def compute(file: Path, gathered: Gathered) -> DerivedColumns:
    """Compute the features of a feature file. Raises ConfigError, and UsageError if the set has not their fields."""
    feature_set = feature_sets.read(file)
    if unknown := [name for name in feature_set.fields if name not in gathered.fields]:
        known = ", ".join(gathered.fields)
        raise UsageError(f"{file}: fields: the samples have no {unknown[0]!r}, they have {known}; correct the file")
    label_columns = map(name_label_column, gathered.outputs)
    if taken := sorted({*feature_set.columns} & {*gathered.fields, *RESERVED_COLUMNS, *label_columns}):
        raise UsageError(f"{file}: derived: {taken[0]!r} is a column of the set already; rename the feature")
    left_out = dict.fromkeys(feature_set.columns, 0)
    values = [
        _compute_recording(recording, gathered.fields, feature_set, left_out) for recording in gathered.recordings
    ]
    return DerivedColumns(feature_set, values, left_out)


def _compute_recording(
    recording: Recording, fields: Sequence[str], feature_set: FeatureSet, left_out: dict[str, int]
) -> Float32s:
    spec = ModelInput(
        fields=feature_set.fields,
        definition=feature_set.definition,
        derived=feature_set.derived,
        feature_order=feature_set.columns,
        max_gap_s=feature_set.max_gap_s,
    )
    with np.errstate(over="ignore"):
        rows = recording.values[:, [fields.index(name) for name in spec.fields]].astype(np.float32)
    values = derived_features.compute(rows, recording.t, spec)
    # Rows of a stream count from 1: nothing came before that one.
    if recording.first > 1:
        since_begin = _rows_since_begin(recording.t, feature_set.max_gap_s)
        for feature in feature_set.derived:
            is_unknown = since_begin < (0 if feature.is_time_based else feature.history_rows)
            for name in feature.columns:
                values[is_unknown, feature_set.columns.index(name)] = np.nan
                left_out[name] += int(is_unknown.sum())
    return values


def _rows_since_begin(t: Ints, max_gap_s: float | None) -> Ints:
    """Return the number of rows since the recording's begin; behind a gap, as many as any history has."""
    rows = np.arange(len(t), dtype=np.int64)
    is_behind_gap: Bools = derived_features.count_rows_since_gap(t, max_gap_s) < rows
    return np.where(is_behind_gap, np.iinfo(np.int64).max, rows)
