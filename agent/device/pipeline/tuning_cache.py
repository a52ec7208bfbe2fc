"""The batch sizes and threads that trials chose for a task's models, kept in the store."""

from __future__ import annotations

import contextlib

import msgspec

from agent.device.store.store import Store
from agent.errors import StorageBusy, StorageFull
from agent.model.inference.tuning import Choice

_NAME = "batch choices"
# Those of a bundle and the one before it, tried with two runtimes.
_MOST = 4


def known(store: Store, task: str) -> list[Choice]:
    """The newest first."""
    try:
        return msgspec.json.decode(store.state(task, _NAME) or b"[]", type=list[Choice])
    except msgspec.MsgspecError:
        return []


def remember(store: Store, task: str, choice: Choice) -> None:
    """So that the next start need not try again; where there is no room, it does."""
    past = known(store, task)
    if past[:1] == [choice]:
        return
    kept = [choice, *(one for one in past if not one.is_for(choice))][:_MOST]
    with contextlib.suppress(StorageBusy, StorageFull), store.transaction() as tx:
        tx.keep(task, _NAME, msgspec.json.encode(kept))
