"""Label requests of one device: stored predictions without a label, chosen by doubt, rarity and chance."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import numpy as np

from outstation.device.store import label_store, predictions
from outstation.device.store.predictions import StoredPredictions
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.ml.performance import label_candidates
from outstation.ml.performance.label_candidates import Reason, UnlabelledResults
from outstation.ml.performance.labels import NO_TRUTH, LabelSchema

_MAX_BATCHES = 200


class LabelRequest(msgspec.Struct, frozen=True):
    row: int
    t: int
    label: str | None
    score: float | None
    value: float | None
    reason: Reason
    strength: float

    @property
    def answer(self) -> str:
        return self.label if self.label is not None else "" if self.value is None else f"{self.value:.6g}"

    def to_dict(self) -> dict[str, Any]:
        return {**msgspec.to_builtins(self), "time": clock.to_rfc3339(self.t)}


def list_next(store: Store, task: str, schema: LabelSchema, limit: int, seed: int) -> list[LabelRequest]:
    """Return up to `limit` of the newest results without a label; `seed` chooses the random ones."""
    batches = store.query(predictions.load_newest_predictions, task, _MAX_BATCHES)[::-1]
    if not batches:
        return []
    known = store.query(label_store.load_label_texts, task, int(batches[0].row[0]))
    listed = [
        _describe(batch, number, index, schema)
        for number, batch in enumerate(batches)
        for index in range(len(batch.row))
        if int(batch.row[index]) not in known
    ]
    results = UnlabelledResults(
        batch=np.array([batch for batch, _ in listed], np.int64),
        doubt=np.array([np.nan if each.score is None else 1.0 - each.score for _, each in listed]),
        drift=np.zeros(len(listed)),
        predicted=[each.label for _, each in listed],
    )
    counts = dict.fromkeys(schema.class_names, 0)
    counts |= Counter(text for text, source in known.values() if source not in NO_TRUTH)
    chosen = label_candidates.choose(results, counts, limit, seed)
    return [
        msgspec.structs.replace(listed[each.index][1], reason=each.reason, strength=round(each.strength, 6))
        for each in chosen
    ]


def _describe(batch: StoredPredictions, number: int, index: int, schema: LabelSchema) -> tuple[int, LabelRequest]:
    code = None if batch.predicted_class is None else int(batch.predicted_class[index])
    score = None if batch.score is None else float(batch.score[index])
    value = None if batch.value is None else float(batch.value[index])
    label = None if code is None else schema.format_class(code)
    return number, LabelRequest(int(batch.row[index]), int(batch.t[index]), label, score, value, "random", 0.0)
