"""Data to evaluate with: model windows, what was true of each, and what else is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from agent.arrays import Float64s as Numbers
from agent.datasets import readers
from agent.datasets.blocks import FILE_COLUMN, TIME_COLUMN, TextColumn
from agent.errors import UsageError
from agent.evaluation.predictions import evaluation_kind
from agent.model.bundle.manifest import Manifest
from agent.model.inference import features, scores
from agent.model.inference.features import Floats, Ints, WindowCut
from agent.model.inference.inference import Inference, InferenceResult
from agent.performance.labels import NO_LABEL, SEPARATOR, LabelSchema

TRAINING_SPLITS = frozenset({"train", "training", "fit"})


class Dataset(msgspec.Struct, frozen=True, eq=False):
    """All rows of some files: `rows` (n, F), `t` (n,) epoch µs, `part` (n,) which file, `columns` of text (n,)."""

    files: list[Path]
    values: Floats
    t: Ints
    file_index: Ints
    row_numbers: Ints
    columns: dict[str, TextColumn]
    has_time: bool
    rejected_count: int

    def file_slices(self) -> list[slice]:
        """Which rows are of each file."""
        ends = np.searchsorted(self.file_index, np.arange(len(self.files) + 1))
        return [slice(int(a), int(b)) for a, b in pairwise(ends)]


class LabelledWindows(msgspec.Struct, frozen=True, eq=False):
    """w labelled windows of rows `starts` to `last` (w,); `truth` (w,) as in `Pairs`, `columns` (w,) of the last rows.

    Of a multi-label model `truth` counts the rows of `sets` (U, K). `mixed` windows span two labels.
    `unlabelled` ones were left out, as were those of the training split.
    """

    dataset: Dataset
    starts: Ints
    last: Ints
    truth: Numbers
    label_sets: NDArray[np.bool_] | None = None
    columns: dict[str, TextColumn] = msgspec.field(default_factory=dict)
    unlabelled: int = 0
    mixed: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def subset(self, selection: NDArray[np.int64] | NDArray[np.bool_]) -> LabelledWindows:
        columns = {name: column[selection] for name, column in self.columns.items()}
        return replace(
            self, starts=self.starts[selection], last=self.last[selection], truth=self.truth[selection], columns=columns
        )


def read(path: Path, inference: Inference, text_columns: Sequence[str]) -> Dataset:
    """All rows at `path`, a file or a folder, with further columns as text. Raises UsageError."""
    spec = inference.manifest.input
    files = readers.list_sources(path, spec)
    found, parts, rejected = [], [], 0
    timed = True
    columns: dict[str, list[TextColumn]] = {name: [] for name in text_columns}
    own = {name: i for i, name in enumerate(spec.fields) if name in columns}
    asked = [name for name in text_columns if name != FILE_COLUMN and name not in own]
    for i, file in enumerate(files):
        reader = readers.open_reader(file, spec, asked)
        timed = timed and TIME_COLUMN in reader.columns
        for block in reader.blocks():
            found.append(block)
            parts.append(np.full(len(block.rows), i, np.int64))
            rejected += len(block.rejected)
            told = {FILE_COLUMN: np.full(len(block.rows), file.name)} | block.text_columns
            told |= {name: block.rows[:, at].astype(np.str_) for name, at in own.items()}
            for name in columns:
                columns[name].append(told[name])
    if not sum(len(block.rows) for block in found):
        raise UsageError(f"{path}: no rows in it, so nothing to evaluate with; give data with labels")
    return Dataset(
        files,
        np.concatenate([block.rows for block in found]),
        np.concatenate([block.t for block in found]),
        np.concatenate(parts),
        np.concatenate([block.row_numbers for block in found]),
        {name: np.concatenate(column) for name, column in columns.items()},
        timed,
        rejected,
    )


def cut_windows(dataset: Dataset, inference: Inference, split: str | None = None) -> tuple[Ints, Ints]:
    """(first rows, last rows) of whole windows, none of which spans two files, or two splits. Raises UsageError."""
    window = inference.manifest.input.window
    starts = np.concatenate(
        [features.cut_windows(dataset.t[of], window).starts + of.start for of in dataset.file_slices()]
    )
    last = starts + inference.rows - 1
    if split is not None:
        whole = dataset.columns[split][starts] == dataset.columns[split][last]
        starts, last = starts[whole], last[whole]
    if not len(starts):
        raise UsageError(
            f"{dataset.files[0]}: no {inference.rows} rows without a gap in {len(dataset.values)}, so not one window"
        )
    return starts, last


def predict(inference: Inference, dataset: Dataset, starts: Ints) -> InferenceResult:
    """The answers for windows at `starts`, ascending, with raw outputs; each file is a stream of its own."""
    found = []
    for of in dataset.file_slices():
        some = starts[(starts >= of.start) & (starts < of.stop)] - of.start
        found.append(
            inference.run_windows(dataset.values[of], dataset.t[of], WindowCut(some, len(some)), with_outputs=True)
        )
    outputs = np.concatenate([one.outputs for one in found if one.outputs is not None])
    missing = np.concatenate([one.missing_share for one in found])
    return InferenceResult(
        WindowCut(starts, len(dataset.values)), scores.concatenate([one.scores for one in found]), missing, outputs
    )


def label_windows(
    dataset: Dataset, inference: Inference, label: str, columns: Sequence[str], split: str | None
) -> LabelledWindows:
    """Windows with their last row's label; those of the training split are left out. Raises UsageError."""
    starts, last = cut_windows(dataset, inference, split)
    if split is not None:
        keep = ~training_mask(dataset.columns[split][last])
        if not keep.any():
            raise UsageError(f"{dataset.files[0]}: column {split} says train everywhere, so nothing is left to test")
        starts, last = starts[keep], last[keep]
    texts = np.char.strip(dataset.columns[label])
    known = texts[last] != ""
    if not known.any():
        raise UsageError(f"{dataset.files[0]}: column {label} is empty, so nobody can tell which answers are right")
    starts, last, unlabelled = starts[known], last[known], int((~known).sum())
    truth, sets = _parse_truth(dataset, inference.manifest, label, texts, last)
    mixed = int((texts[starts] != texts[last]).sum()) if inference.manifest.kind != "regress" else 0
    told = {name: dataset.columns[name][last] for name in columns}
    _require_two_labels(truth, f"{dataset.files[0]}: all {len(truth)} labels in column {label}", str(texts[last[0]]))
    return LabelledWindows(dataset, starts, last, truth, sets, told, unlabelled, mixed)


def training_mask(split: TextColumn) -> NDArray[np.bool_]:
    """(n,) which values of a split column are those a model learns from."""
    return np.isin(np.char.lower(split), sorted(TRAINING_SPLITS))


def _parse_truth(
    dataset: Dataset, manifest: Manifest, label: str, texts: TextColumn, last: Ints
) -> tuple[Numbers, NDArray[np.bool_] | None]:
    """(truth, sets) of each window. Raises UsageError."""
    meaning = LabelSchema(evaluation_kind(manifest), tuple(manifest.output.labels))
    known, at = np.unique(texts[last], return_inverse=True)
    values, sets = np.empty(len(known)), np.zeros((len(known), len(manifest.output.labels)), bool)
    for i, text in enumerate(known):
        try:
            if manifest.output.multi_label:
                sets[i, [int(meaning.parse(one.strip())) for one in _split_labels(str(text))]] = True
                values[i] = i
            else:
                values[i] = meaning.parse(str(text))
        except ValueError as problem:
            row = int(last[np.flatnonzero(at == i)[0]])
            where = f"{dataset.files[dataset.file_index[row]]}: row {dataset.row_numbers[row]}, column {label}"
            raise UsageError(f"{where}: {problem}; leave the cell empty where none is known") from None
    return values[at], sets if manifest.output.multi_label else None


def _split_labels(text: str) -> list[str]:
    return [] if text == NO_LABEL else text.split(SEPARATOR)


def _require_two_labels(truth: Numbers, all_labels: str, text: str) -> None:
    """Raises UsageError where all labels are the same."""
    if np.ptp(truth) == 0:
        raise UsageError(f"{all_labels} are {text}: nothing can be told apart; give data of at least two")
