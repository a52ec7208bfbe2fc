"""Labelled windows to evaluate with: rows of data files, the windows in them, and the label of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints
from outstation.foundation.errors import UsageError
from outstation.ml.datasets import joined_rows, readers
from outstation.ml.datasets.blocks import FILE_COLUMN, TIME_COLUMN, TextColumn
from outstation.ml.drift import expected_errors as errors
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.model.bundle.manifest import Manifest
from outstation.ml.model.inference import features, scores
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.ml.model.inference.joins import JoinedRows
from outstation.ml.performance.labels import NO_LABEL, SEPARATOR, LabelSchema
from outstation.workbench.evaluation.predictions import evaluation_kind

NO_FILES: Mapping[str, Path] = {}
TRAINING_SPLITS = frozenset({"train", "training", "fit"})


class Dataset(msgspec.Struct, frozen=True, eq=False):
    """All rows of some files: `values` (n, F), `t` (n,) epoch µs, `file_index` (n,), text `columns` (n,).

    `joined` holds the rows of further inputs for each file.
    """

    files: list[Path]
    values: Float32s
    t: Ints
    file_index: Ints
    row_numbers: Ints
    columns: dict[str, TextColumn]
    has_time: bool
    rejected_count: int
    joined: Sequence[Mapping[str, JoinedRows]] = ()

    def file_slices(self) -> list[slice]:
        ends = np.searchsorted(self.file_index, np.arange(len(self.files) + 1))
        return [slice(int(a), int(b)) for a, b in pairwise(ends)]


class LabelledWindows(msgspec.Struct, frozen=True, eq=False):
    """w labelled windows of rows `starts` to `last` (w,), with `truth` (w,) and the text `columns` of the last rows.

    For a multi-label model `truth` indexes the rows of `label_sets` (U, K). `mixed` windows span two labels.
    `unlabelled` windows were left out, and so were those of the training split.
    """

    dataset: Dataset
    starts: Ints
    last: Ints
    truth: Float64s
    label_sets: Bools | None = None
    columns: dict[str, TextColumn] = msgspec.field(default_factory=dict)
    unlabelled: int = 0
    mixed: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def subset(self, selection: Ints | Bools) -> LabelledWindows:
        columns = {name: column[selection] for name, column in self.columns.items()}
        return replace(
            self, starts=self.starts[selection], last=self.last[selection], truth=self.truth[selection], columns=columns
        )


def read(
    path: Path, inference: Inference, text_columns: Sequence[str], joined_files: Mapping[str, Path] = NO_FILES
) -> Dataset:
    """Read all rows at `path`, a file or a folder, with further columns as text. Raises UsageError."""
    spec = inference.manifest.input
    files = readers.list_sources(path, spec)
    blocks, file_index, rejected, reason = [], [], 0, "no rows in it"
    has_time = True
    columns: dict[str, list[TextColumn]] = {name: [] for name in text_columns}
    fields = {name: i for i, name in enumerate(spec.fields) if name in columns}
    extra = [name for name in text_columns if name != FILE_COLUMN and name not in fields]
    for i, file in enumerate(files):
        reader = readers.open_reader(file, spec, extra)
        has_time = has_time and TIME_COLUMN in reader.columns
        for block in reader.blocks():
            blocks.append(block)
            file_index.append(np.full(len(block.rows), i, np.int64))
            if block.rejected and not rejected:
                reason = f"none of its rows can be read; the first: {block.rejected[0].reason}"
            rejected += len(block.rejected)
            texts = {FILE_COLUMN: np.full(len(block.rows), file.name)} | block.text_columns
            texts |= {name: block.rows[:, at].astype(np.str_) for name, at in fields.items()}
            for name in columns:
                columns[name].append(texts[name])
    if not sum(len(block.rows) for block in blocks):
        raise UsageError(f"{path}: {reason}; so nothing to evaluate with; give data with labels")
    return Dataset(
        files,
        np.concatenate([block.rows for block in blocks]),
        np.concatenate([block.t for block in blocks]),
        np.concatenate(file_index),
        np.concatenate([block.row_numbers for block in blocks]),
        {name: np.concatenate(column) for name, column in columns.items()},
        has_time,
        rejected,
        [joined_rows.read(inference.manifest, file, joined_files) for file in files],
    )


def cut_windows(dataset: Dataset, inference: Inference, split: str | None = None) -> tuple[Ints, Ints]:
    """Return first and last rows of whole windows, none of which spans two files, or two splits. Raises UsageError."""
    window = inference.manifest.input.window
    starts = np.concatenate(
        [features.cut_windows(dataset.t[part], window).starts + part.start for part in dataset.file_slices()]
    )
    last = starts + inference.rows - 1
    if split is not None:
        same = dataset.columns[split][starts] == dataset.columns[split][last]
        starts, last = starts[same], last[same]
    if not len(starts):
        raise UsageError(
            f"{dataset.files[0]}: no {inference.rows} rows without a gap in {len(dataset.values)}, so not one window"
        )
    return starts, last


def find_run_starts(dataset: Dataset, inference: Inference) -> Ints:
    """Return for each row (n,) the first row that no gap, and no end of a file, separates from it."""
    steps, gap_s = np.diff(dataset.t), inference.manifest.input.gap_s
    is_first = np.concatenate([[True], (steps < 0) | (np.diff(dataset.file_index) != 0)])
    if gap_s is not None:
        is_first[1:] |= steps > gap_s * 1e6
    return np.maximum.accumulate(np.where(is_first, np.arange(len(dataset.t)), 0))


def predict(inference: Inference, dataset: Dataset, starts: Ints) -> InferenceResult:
    """Return the result for windows at ascending `starts`, with raw outputs; each file is a stream of its own."""
    results = []
    for i, part in enumerate(dataset.file_slices()):
        cut = cut_at(inference, dataset, starts, i)
        results.append(inference.run_windows(dataset.values[part], dataset.t[part], cut, with_outputs=True))
    return concatenate_results(results, starts, dataset)


def cut_at(inference: Inference, dataset: Dataset, starts: Ints, file: int) -> WindowCut:
    """Return the windows of one file at `starts`, with the values of further inputs."""
    part = dataset.file_slices()[file]
    own = starts[(starts >= part.start) & (starts < part.stop)] - part.start
    cut = WindowCut(own, len(own))
    return inference.join(cut, dataset.t[part], dataset.joined[file]) if inference.manifest.joined else cut


def concatenate_results(results: Sequence[InferenceResult], starts: Ints, dataset: Dataset) -> InferenceResult:
    """Join the results of each file, with raw outputs."""
    outputs = np.concatenate([result.outputs for result in results if result.outputs is not None])
    missing = np.concatenate([result.missing_share for result in results])
    joined = scores.concatenate([result.scores for result in results])
    seconds = sum(result.seconds for result in results)
    return InferenceResult(WindowCut(starts, len(dataset.values)), joined, missing, outputs, seconds)


def label_windows(
    dataset: Dataset, inference: Inference, label: str, columns: Sequence[str], split: str | None
) -> LabelledWindows:
    """Return windows with their last row's label, without those of the training split. Raises UsageError."""
    starts, last = cut_windows(dataset, inference, split)
    file = dataset.files[0]
    if split is not None:
        is_test = ~training_mask(dataset.columns[split][last])
        if not is_test.any():
            raise UsageError(f"{file}: column {split} says train everywhere, so nothing is left to test")
        starts, last = starts[is_test], last[is_test]
    texts = np.char.strip(dataset.columns[label])
    known = texts[last] != ""
    if not known.any():
        raise UsageError(f"{file}: column {label} is empty, so nobody can tell which predictions are right")
    starts, last, unlabelled = starts[known], last[known], int((~known).sum())
    truth, label_sets = _parse_truth(dataset, inference.manifest, label, texts, last)
    mixed = int((texts[starts] != texts[last]).sum()) if inference.manifest.kind != "regress" else 0
    if np.ptp(truth) == 0:
        text = f"all {len(truth)} labels in column {label} are {texts[last[0]]}"
        raise UsageError(f"{file}: {text}: nothing can be told apart; give data with at least two")
    picked = {name: dataset.columns[name][last] for name in columns}
    return LabelledWindows(dataset, starts, last, truth, label_sets, picked, unlabelled, mixed)


def training_mask(split: TextColumn) -> Bools:
    """Return (n,) which values of a split column mean training data."""
    return np.isin(np.char.lower(split), sorted(TRAINING_SPLITS))


def _parse_truth(
    dataset: Dataset, manifest: Manifest, label: str, texts: TextColumn, last: Ints
) -> tuple[Float64s, Bools | None]:
    """Return truth and label sets of each window. Raises UsageError."""
    schema = LabelSchema(evaluation_kind(manifest), tuple(manifest.output.labels))
    distinct, at = np.unique(texts[last], return_inverse=True)
    values, label_sets = np.empty(len(distinct)), np.zeros((len(distinct), len(manifest.output.labels)), bool)
    for i, text in enumerate(map(str, distinct)):
        try:
            if manifest.output.multi_label:
                parts = [] if text == NO_LABEL else text.split(SEPARATOR)
                label_sets[i, [int(schema.parse(part.strip())) for part in parts]] = True
                values[i] = i
            else:
                values[i] = schema.parse(text)
        except ValueError as problem:
            row = int(last[np.flatnonzero(at == i)[0]])
            where = f"{dataset.files[dataset.file_index[row]]}: row {dataset.row_numbers[row]}, column {label}"
            raise UsageError(f"{where}: {problem}; leave the cell empty if the label is unknown") from None
    return values[at], label_sets if manifest.output.multi_label else None


def expect_errors(
    reference: Reference, dataset: Dataset, starts: Ints, values: Float64s, output: str = ""
) -> Float64s | None:
    """Return the absolute error (w,) that the inputs of windows at ascending `starts` let expect of `values` (w,).

    None if the reference has no held-out errors of this output, "" the first one.
    """
    if output not in reference.error_references:
        return None
    expected = np.empty(len(starts))
    for part in dataset.file_slices():
        own = (starts >= part.start) & (starts < part.stop)
        rows, begins = dataset.values[part], starts[own] - part.start
        expected[own] = errors.expect_errors(reference, rows, begins, {output: values[own]})[output]
    return expected
