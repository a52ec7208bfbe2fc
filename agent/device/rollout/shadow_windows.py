"""The windows of another bundle that end where those of a batch do, and what the two said of them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.comparison.tally import Kind, Said
from agent.device.pipeline import batch
from agent.device.pipeline.batch import Task
from agent.device.store.given import Given
from agent.device.store.rows import concatenate
from agent.device.store.store import Batch, Store
from agent.drift.baseline.reference import Reference
from agent.model.bundle.manifest import Manifest
from agent.model.inference import derived_features, features, scores
from agent.model.inference.features import Floats, Ints
from agent.model.inference.inference import MOST_VALUES
from agent.model.inference.scores import Scores
from agent.performance import cbpe


class Windows(msgspec.Struct, frozen=True):
    """Scaled model input, one for each of `row` (w,), the numbers of the rows they end at, at `t` (w,) epoch µs."""

    row: Ints
    t: Ints
    values: Floats


def windows(task: Task, store: Store, taken: Batch, ends: Ints) -> Windows:
    """The windows of `task` that end at `ends` (w,), offsets into the rows of the batch; fewer where one has no room.

    None begins before what is still stored, or reaches over a gap; and no more than fit into memory. Raises
    StorageError.
    """
    spec, length = task.inference.manifest.input, task.window_rows
    past = batch.history(task, store, taken.first - 1, task.inference.history + length - 1)
    rows = concatenate([past, taken.rows]) if len(past) else taken.rows
    # Windows may begin in the rows before the batch, and features look back from there.
    before = max(0, len(past) - (length - 1))
    matrix = features.matrix([rows.columns[i] for i in task.columns])
    table = derived_features.columns(matrix, rows.t, spec, before)
    starts = ends + (len(past) - before) - length + 1
    whole = np.isin(starts, _anywhere(rows.t[before:], task.inference.manifest))
    most = max(1, MOST_VALUES // (length * table.shape[1]))
    starts, ends = starts[whole][:most], ends[whole][:most]
    return Windows(taken.first + ends, taken.rows.t[ends], features.windows(table, starts, spec))


def _anywhere(t: Ints, manifest: Manifest) -> Ints:
    """Where windows could begin, were there one at each row."""
    window = manifest.input.window
    return features.cut(t, None if window is None else replace(window, step=1)).starts


def kind(manifest: Manifest) -> Kind:
    return Kind(manifest.truth, tuple(manifest.output.labels))


def said(row: Ints, found: Scores, seconds: float, table: Reference | None) -> Said:
    """`table` says how often a score is right; without, a score is taken for the chance that it is."""
    chance = found.score
    if found.score is not None and table is not None:
        assert table.score_correct is not None
        chance = cbpe.chances(table.score_n, table.score_correct, table.score_edges, found.score)
    several = found.said is not None
    label = None if several else found.label
    return Said(row, seconds, label, found.said, found.anomaly, found.score, found.value, chance)


def tables(some: Sequence[Reference | None]) -> list[Reference | None]:
    """Those that tell how often a score is right, where all do: two that are told by other means do not compare."""
    known = [one is not None and one.score_correct is not None and len(one.score_edges) > 0 for one in some]
    return list(some) if all(known) else [None] * len(some)


def given(digest: str, of: Windows, found: Scores) -> Given:
    """As it is kept for labels that come later."""
    return Given(digest, of.row, of.t, scores.codes(found), found.score, found.value, {})


def joined(parts: Sequence[Given]) -> Given:
    """Of one bundle, in order."""

    def column(name: str) -> np.ndarray | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else np.concatenate(found)

    row, t = np.concatenate([part.row for part in parts]), np.concatenate([part.t for part in parts])
    return Given(parts[0].bundle, row, t, column("said"), column("score"), column("value"), {})
