"""The batch sizes and threads that trials chose for a task's models, kept in the store."""

from __future__ import annotations

import contextlib

import msgspec

from agent.device.store import task_keys
from agent.device.store.store import Store
from agent.errors import StorageBusy, StorageFull
from agent.model.inference.tuning import Tuning

# Those of a bundle and the one before it, tried with two runtimes.
_MAX_ENTRIES = 4


def load(store: Store, task: str) -> list[Tuning]:
    """The newest first."""
    try:
        return msgspec.json.decode(store.load_state(task, task_keys.TUNINGS) or b"[]", type=list[Tuning])
    except msgspec.MsgspecError:
        return []


def save(store: Store, task: str, tuning: Tuning) -> None:
    """So that the next start need not try again; where there is no room, it does."""
    past = load(store, task)
    if past[:1] == [tuning]:
        return
    kept = [tuning, *(one for one in past if not one.is_same_target(tuning))][:_MAX_ENTRIES]
    with contextlib.suppress(StorageBusy, StorageFull), store.transaction() as tx:
        tx.save_state(task, task_keys.TUNINGS, msgspec.json.encode(kept))
