"""Label requests: results of the fleet without a label, chosen by doubt, drift, rarity and chance.

Doubt and rarity are of a model's first output: a result with labels of further outputs only is still listed.
"""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import msgspec
import numpy as np

from outstation.fleet.database import log_succession
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.labelling import candidates as table
from outstation.fleet.database.labelling.candidates import UnlabelledResult
from outstation.fleet.database.labelling.labelled_results import TaskLog
from outstation.foundation import decoders
from outstation.foundation.arrays import Float64s, Ints
from outstation.ml.performance import label_candidates
from outstation.ml.performance.label_candidates import Reason, UnlabelledResults

# Results that are read for one list; each task has its share of them.
_READ_ROWS, _MIN_ROWS, _MAX_ROWS = 100_000, 50, 5_000
_MAX_WINDOWS = 200
# Strength of drift that moves no distribution of a single field, such as a changed correlation.
_LEAST_DRIFT = 0.001
_WORDS = {
    "uncertain": "the model doubts",
    "drifted": "its input drifted",
    "rare": "its class has few labels",
    "random": "at random, for a fair sample",
}


class LabelRequest(msgspec.Struct, frozen=True):
    """A result that should get a label, and why."""

    device: str
    task: str
    log: str
    row: int
    t: int
    label: str | None
    score: float | None
    value: float | None
    seq: int
    reason: Reason
    strength: float

    @property
    def words(self) -> str:
        return _WORDS[self.reason]


def list_next(db: Connection, *, device: str | None, task: str | None, limit: int, seed: int = 0) -> list[LabelRequest]:
    """Return up to `limit` results to label, in turn of each task. `seed` chooses the random ones."""
    pairs = table.list_tasks(db, device, task)
    share = min(_MAX_ROWS, max(_MIN_ROWS, _READ_ROWS // max(1, len(pairs))))
    # Each of many tasks gives a few, so that the list is full even if most have none.
    few = min(limit, max(len(label_candidates.REASONS), 4 * limit // max(1, len(pairs))))
    pairs = pairs[: _READ_ROWS // _MIN_ROWS]
    logs = zip(pairs, log_succession.find_newest_logs(db, pairs), strict=True)
    by_task = [
        _choose(db, (*pair, log[0]), log[1], share, few, seed, turn)
        for turn, (pair, log) in enumerate(logs)
        if log is not None
    ]
    in_turn = (request for turn in itertools.zip_longest(*by_task) for request in turn if request is not None)
    return [*itertools.islice(in_turn, limit)]


def _choose(
    db: Connection, key: TaskLog, last_row: int, rows: int, limit: int, seed: int, turn: int
) -> list[LabelRequest]:
    listed = table.load_newest(db, key, last_row, rows)[::-1]
    labelled = table.load_labelled_rows(db, key, listed[0].row) if listed else set()
    listed = [result for result in listed if result.row not in labelled]
    if not listed:
        return []
    rows_of = np.array([result.row for result in listed], np.int64)
    results = UnlabelledResults(
        batch=np.array([result.seq for result in listed], np.int64),
        doubt=_doubt(listed),
        drift=_drift(db, key, rows_of),
        predicted=[result.label for result in listed],
    )
    device, task, _ = key
    own_seed = zlib.crc32(f"{seed} {device} {task}".encode())
    chosen = label_candidates.choose(results, table.count_classes(db, key), limit, own_seed, turn)
    return [_to_request(key, listed[each.index], each.reason, each.strength) for each in chosen]


def _to_request(key: TaskLog, result: UnlabelledResult, reason: Reason, strength: float) -> LabelRequest:
    row, t, label, score, value, seq = result
    return LabelRequest(*key, row, t, label, score, value, seq, reason, round(strength, 6))


def _doubt(listed: list[UnlabelledResult]) -> Float64s:
    """Return 1 - score of classes; NaN where there is no score."""
    score = [np.nan if result.label is None or result.score is None else result.score for result in listed]
    return np.asarray(1.0 - np.array(score, np.float64))


def _drift(db: Connection, key: TaskLog, rows: Ints) -> Float64s:
    """Return for each row the largest PSI of a drifted field in its window; 0 outside windows with drift."""
    drift = np.zeros(len(rows))
    for first, last, features in table.load_drifted(db, key, int(rows[0]), _MAX_WINDOWS):
        within = slice(*np.searchsorted(rows, (first, last + 1)))
        drift[within] = np.maximum(drift[within], _largest_psi(features))
    return drift


def _largest_psi(features: str) -> float:
    try:
        fields = decoders.from_json(features, dict[str, _DriftedField])
    except msgspec.MsgspecError:
        return _LEAST_DRIFT
    return max(field.psi or _LEAST_DRIFT for field in [_DriftedField(), *fields.values()] if field.state == "drift")


class _DriftedField(msgspec.Struct):
    state: str = "drift"
    psi: float | None = None


def to_document(requests: list[LabelRequest]) -> list[dict[str, Any]]:
    return msgspec.to_builtins(requests)  # type: ignore[no-any-return]
