"""Data to evaluate with: model windows, what was true of each, and what else is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.drift.codec import Floats as Numbers
from agent.drift.truth import Truth
from agent.errors import UsageError
from agent.evaluation import blocks, tablefile
from agent.evaluation.answers import Engine
from agent.evaluation.blocks import Texts
from agent.model.features import Floats, Ints

TRAINING = frozenset({"train", "training", "fit"})
_PAUSE_US = 10_000_000_000
_SAID = 3


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of some files: `rows` (n, F), `t` (n,) as written, `part` (n,) which file, `columns` of text (n,)."""

    files: list[Path]
    rows: Floats
    t: Ints
    part: Ints
    number: Ints
    columns: dict[str, Texts]
    timed: bool
    rejected: int


@dataclass(frozen=True, eq=False)
class Examples:
    """w labelled windows: they begin at rows `starts` (w,), `truth` (w,) as in `Pairs`, `columns` (w,) of their last rows.

    `mixed` windows span two labels, `unlabelled` ones were left out, as were those of the training split.
    """

    source: Rows
    starts: Ints
    last: Ints
    truth: Numbers
    columns: dict[str, Texts] = field(default_factory=dict)
    unlabelled: int = 0
    mixed: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def some(self, most: int) -> Examples:
        """At most so many, evenly from all of them."""
        if len(self) <= most:
            return self
        return self.pick(np.linspace(0, len(self) - 1, most).astype(np.int64))

    def pick(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Examples:
        columns = {name: column[which] for name, column in self.columns.items()}
        return replace(self, starts=self.starts[which], last=self.last[which], truth=self.truth[which], columns=columns)


def read(path: Path, engine: Engine, texts: Sequence[str]) -> Rows:
    """All rows at `path`, a file or a folder, with further columns as text. Raises UsageError."""
    files = blocks.files(path)
    spec = engine.manifest.input
    found, parts, rejected = [], [], 0
    timed = True
    columns: dict[str, list[Texts]] = {name: [] for name in texts}
    for i, file in enumerate(files):
        reader = tablefile.open_file(file, spec, [name for name in texts if name != "file"])
        timed = timed and "t" in reader.columns
        for block in reader.blocks(blocks.Place()):
            found.append(block)
            parts.append(np.full(len(block.rows), i, np.int64))
            rejected += len(block.rejected)
            for name in texts:
                columns[name].append(np.full(len(block.rows), file.name) if name == "file" else block.texts[name])
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


def windows(rows: Rows, engine: Engine, split: str | None = None) -> tuple[Ints, Ints]:
    """(first rows, last rows) of whole windows, none of which spans two files, or two splits. Raises UsageError."""
    last_of_file = np.flatnonzero(np.diff(rows.part))
    t = rows.t.copy()
    if len(last_of_file):
        # A step back in time ends a window, a long pause too: files follow each other with one.
        begins = np.concatenate([[0], last_of_file + 1])
        for before, begin in zip(last_of_file, begins[1:], strict=True):
            if t[begin] >= t[before]:
                t[begin:] -= t[begin] - t[before] + _PAUSE_US
    starts = engine.cut(t).starts
    last = starts + engine.window_rows - 1
    if split is not None:
        whole = rows.columns[split][starts] == rows.columns[split][last]
        starts, last = starts[whole], last[whole]
    if not len(starts):
        raise UsageError(
            f"{rows.files[0]}: no {engine.window_rows} rows without a gap in {len(rows.rows)}, so not one window"
        )
    return starts, last


def labelled(rows: Rows, engine: Engine, label: str, columns: Sequence[str], split: str | None) -> Examples:
    """Windows with their last row's label; those of the training split are left out. Raises UsageError."""
    starts, last = windows(rows, engine, split)
    if split is not None:
        keep = ~np.isin(np.char.lower(rows.columns[split][last]), sorted(TRAINING))
        if not keep.any():
            raise UsageError(f"{rows.files[0]}: column {split} says train everywhere, so nothing is left to test")
        starts, last = starts[keep], last[keep]
    texts = np.char.strip(rows.columns[label])
    known = texts[last] != ""
    if not known.any():
        raise UsageError(f"{rows.files[0]}: column {label} is empty, so nobody can tell which answers are right")
    mixed = texts[starts[known]] != texts[last[known]]
    found = Examples(
        rows,
        starts[known],
        last[known],
        _truth(rows, engine, label, texts, last[known]),
        {name: rows.columns[name][last[known]] for name in columns},
        int((~known).sum()),
        int(mixed.sum()) if engine.manifest.kind != "regress" else 0,
    )
    _require_two(found, engine, label)
    return found


def _truth(rows: Rows, engine: Engine, label: str, texts: Texts, last: Ints) -> Numbers:
    """Class index, number, or 1 for an anomaly, of each window. Raises UsageError."""
    meaning = Truth(engine.manifest.kind, tuple(engine.manifest.output.labels))
    known, at = np.unique(texts[last], return_inverse=True)
    values = np.empty(len(known))
    for i, text in enumerate(known):
        try:
            values[i] = meaning.read(str(text))
        except ValueError as problem:
            row = int(last[np.flatnonzero(at == i)[0]])
            where = f"{rows.files[rows.part[row]]}: row {rows.number[row]}, column {label}"
            raise UsageError(f"{where}: {problem}; an unknown label is an empty cell") from None
    return values[at]


def _require_two(found: Examples, engine: Engine, label: str) -> None:
    """Raises UsageError where all labels are the same."""
    if len(found) > 1 and np.ptp(found.truth) > 0:
        return
    kind = engine.manifest.kind
    value = found.truth[0]
    same = {
        "classify": lambda: engine.manifest.output.labels[int(value)],
        "anomaly": lambda: "anomalies" if value else "normal",
    }.get(kind, lambda: f"{value:g}")()
    raise UsageError(
        f"{found.source.files[0]}: all {len(found)} labels in column {label} are {same}: of one class nothing can be "
        "told apart; give data of at least two"
    )
