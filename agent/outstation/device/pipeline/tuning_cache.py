"""Tuning cache: the batch size and threads that autotuning chose for each of a task's models, kept in the store."""

from __future__ import annotations

import contextlib

import msgspec

from outstation.device.store import task_keys
from outstation.device.store.store import Store
from outstation.foundation import decoders
from outstation.foundation.errors import StorageBusy, StorageFull
from outstation.ml.model.inference.tuning import Tuning

# The current bundle and the previous one, each with two runtimes.
_MAX_ENTRIES = 4


def load(store: Store, task: str) -> list[Tuning]:
    """Return the stored tunings, newest first."""
    try:
        return decoders.from_json(store.load_state(task, task_keys.TUNINGS) or b"[]", list[Tuning])
    except msgspec.MsgspecError:
        return []


def save(store: Store, task: str, tuning: Tuning) -> None:
    """Store `tuning` as the newest; a full or busy store drops it, and the next start tunes again."""
    past = load(store, task)
    if past[:1] == [tuning]:
        return
    tunings = [tuning, *(old for old in past if old.target != tuning.target)][:_MAX_ENTRIES]
    with contextlib.suppress(StorageBusy, StorageFull), store.transaction() as tx:
        tx.save_state(task, task_keys.TUNINGS, msgspec.json.encode(tunings))
