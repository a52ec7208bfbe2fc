"""Data to evaluate with: model windows, what was true of each, and what else is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from agent.arrays import Floats as Numbers
from agent.datasets import blocks, tables
from agent.datasets.blocks import FILE, Texts
from agent.errors import UsageError
from agent.evaluation.predictions import kind_of
from agent.model.bundle.manifest import Manifest
from agent.model.inference import features, scores
from agent.model.inference.features import Cut, Floats, Ints
from agent.model.inference.inference import Answers, Inference
from agent.performance.labels import NONE, SEPARATOR, Truth

TRAINING = frozenset({"train", "training", "fit"})


class Rows(msgspec.Struct, frozen=True, eq=False):
    """All rows of some files: `rows` (n, F), `t` (n,) epoch µs, `part` (n,) which file, `columns` of text (n,)."""

    files: list[Path]
    rows: Floats
    t: Ints
    part: Ints
    number: Ints
    columns: dict[str, Texts]
    timed: bool
    rejected: int

    def files_rows(self) -> list[slice]:
        """Which rows are of each file."""
        ends = np.searchsorted(self.part, np.arange(len(self.files) + 1))
        return [slice(int(a), int(b)) for a, b in pairwise(ends)]


class Examples(msgspec.Struct, frozen=True, eq=False):
    """w labelled windows of rows `starts` to `last` (w,); `truth` (w,) as in `Pairs`, `columns` (w,) of the last rows.

    Of a multi-label model `truth` counts the rows of `sets` (U, K). `mixed` windows span two labels.
    `unlabelled` ones were left out, as were those of the training split.
    """

    source: Rows
    starts: Ints
    last: Ints
    truth: Numbers
    sets: NDArray[np.bool_] | None = None
    columns: dict[str, Texts] = msgspec.field(default_factory=dict)
    unlabelled: int = 0
    mixed: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def pick(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Examples:
        columns = {name: column[which] for name, column in self.columns.items()}
        return replace(self, starts=self.starts[which], last=self.last[which], truth=self.truth[which], columns=columns)


def read(path: Path, inference: Inference, texts: Sequence[str]) -> Rows:
    """All rows at `path`, a file or a folder, with further columns as text. Raises UsageError."""
    spec = inference.manifest.input
    files = blocks.sources(path, spec)
    found, parts, rejected = [], [], 0
    timed = True
    columns: dict[str, list[Texts]] = {name: [] for name in texts}
    own = {name: i for i, name in enumerate(spec.fields) if name in columns}
    asked = [name for name in texts if name != FILE and name not in own]
    for i, file in enumerate(files):
        reader = tables.open_file(file, spec, asked)
        timed = timed and "t" in reader.columns
        for block in reader.blocks(blocks.Place()):
            found.append(block)
            parts.append(np.full(len(block.rows), i, np.int64))
            rejected += len(block.rejected)
            told = {FILE: np.full(len(block.rows), file.name)} | block.texts
            told |= {name: block.rows[:, at].astype(np.str_) for name, at in own.items()}
            for name in columns:
                columns[name].append(told[name])
    if not sum(len(block.rows) for block in found):
        raise UsageError(f"{path}: no rows in it, so nothing to evaluate with; give data with labels")
    return Rows(
        files,
        np.concatenate([block.rows for block in found]),
        np.concatenate([block.t for block in found]),
        np.concatenate(parts),
        np.concatenate([block.number for block in found]),
        {name: np.concatenate(column) for name, column in columns.items()},
        timed,
        rejected,
    )


def windows(rows: Rows, inference: Inference, split: str | None = None) -> tuple[Ints, Ints]:
    """(first rows, last rows) of whole windows, none of which spans two files, or two splits. Raises UsageError."""
    window = inference.manifest.input.window
    starts = np.concatenate([features.cut(rows.t[of], window).starts + of.start for of in rows.files_rows()])
    last = starts + inference.rows - 1
    if split is not None:
        whole = rows.columns[split][starts] == rows.columns[split][last]
        starts, last = starts[whole], last[whole]
    if not len(starts):
        raise UsageError(
            f"{rows.files[0]}: no {inference.rows} rows without a gap in {len(rows.rows)}, so not one window"
        )
    return starts, last


def answered(inference: Inference, rows: Rows, starts: Ints) -> Answers:
    """The answers for windows at `starts`, ascending, with raw outputs; each file is a stream of its own."""
    found = []
    for of in rows.files_rows():
        some = starts[(starts >= of.start) & (starts < of.stop)] - of.start
        found.append(inference.answer(rows.rows[of], rows.t[of], Cut(some, len(some)), raw=True))
    outputs = np.concatenate([one.outputs for one in found if one.outputs is not None])
    missing = np.concatenate([one.missing for one in found])
    return Answers(Cut(starts, len(rows.rows)), scores.joined([one.scores for one in found]), missing, outputs)


def labelled(rows: Rows, inference: Inference, label: str, columns: Sequence[str], split: str | None) -> Examples:
    """Windows with their last row's label; those of the training split are left out. Raises UsageError."""
    starts, last = windows(rows, inference, split)
    if split is not None:
        keep = ~training(rows.columns[split][last])
        if not keep.any():
            raise UsageError(f"{rows.files[0]}: column {split} says train everywhere, so nothing is left to test")
        starts, last = starts[keep], last[keep]
    texts = np.char.strip(rows.columns[label])
    known = texts[last] != ""
    if not known.any():
        raise UsageError(f"{rows.files[0]}: column {label} is empty, so nobody can tell which answers are right")
    starts, last, unlabelled = starts[known], last[known], int((~known).sum())
    truth, sets = _truth(rows, inference.manifest, label, texts, last)
    mixed = int((texts[starts] != texts[last]).sum()) if inference.manifest.kind != "regress" else 0
    told = {name: rows.columns[name][last] for name in columns}
    _require_two(truth, f"{rows.files[0]}: all {len(truth)} labels in column {label}", str(texts[last[0]]))
    return Examples(rows, starts, last, truth, sets, told, unlabelled, mixed)


def training(split: Texts) -> NDArray[np.bool_]:
    """(n,) which values of a split column are those a model learns from."""
    return np.isin(np.char.lower(split), sorted(TRAINING))


def _truth(
    rows: Rows, manifest: Manifest, label: str, texts: Texts, last: Ints
) -> tuple[Numbers, NDArray[np.bool_] | None]:
    """(truth, sets) of each window. Raises UsageError."""
    meaning = Truth(kind_of(manifest), tuple(manifest.output.labels))
    known, at = np.unique(texts[last], return_inverse=True)
    values, sets = np.empty(len(known)), np.zeros((len(known), len(manifest.output.labels)), bool)
    for i, text in enumerate(known):
        try:
            if manifest.output.multi_label:
                sets[i, [int(meaning.read(one.strip())) for one in _parts(str(text))]] = True
                values[i] = i
            else:
                values[i] = meaning.read(str(text))
        except ValueError as problem:
            row = int(last[np.flatnonzero(at == i)[0]])
            where = f"{rows.files[rows.part[row]]}: row {rows.number[row]}, column {label}"
            raise UsageError(f"{where}: {problem}; leave the cell empty where none is known") from None
    return values[at], sets if manifest.output.multi_label else None


def _parts(text: str) -> list[str]:
    return [] if text == NONE else text.split(SEPARATOR)


def _require_two(truth: Numbers, all_labels: str, text: str) -> None:
    """Raises UsageError where all labels are the same."""
    if np.ptp(truth) == 0:
        raise UsageError(f"{all_labels} are {text}: nothing can be told apart; give data of at least two")
