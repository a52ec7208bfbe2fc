"""What a task's drift is told against on this device: a reference, or how far learning one has got."""

from __future__ import annotations

from typing import Any

from agent import clock
from agent.config import Config
from agent.device.pipeline import drift_state, relearn
from agent.device.store import task_keys
from agent.device.store.store import Store
from agent.drift.baseline.reference import Reference
from agent.errors import BadBundle, UsageError


def build_document(conf: Config, store: Store, task: str) -> dict[str, Any]:
    """Which reference is in force and what it warns of, how far learning has got, and what is asked for."""
    asked = relearn.pending_request(store, task)
    document: dict[str, Any] = {"task": task, "site": None, "learning": None, "asked": asked.action if asked else None}
    kept = store.load_state(task, task_keys.SITE_REFERENCE)
    if kept is not None:
        document["site"] = _describe_site(kept)
    state = drift_state.load_for_display(store, task)
    if document["site"] is None and state is not None:
        document["learning"] = {
            "windows": state.learning.window_count,
            "of": conf.tasks[task].learn_windows,
            "for_s": max(state.requested_learn_s, float(conf.tasks[task].learn_duration)),
        }
    return document


def _describe_site(stored: bytes) -> dict[str, Any] | None:
    """None for one that an earlier version learned: it is not in force any more."""
    try:
        found = Reference.from_json(stored)
    except BadBundle as problem:
        raise UsageError(
            f"the site's reference in the store is damaged ({problem}); `outstation reference reset`"
        ) from None
    extra = found.site
    if extra is None:
        return None
    begin, end = (clock.to_rfc3339(t) for t in extra.learned)
    return {
        "number": extra.number,
        "digest": found.digest,
        "windows": found.drift_windows,
        "from": begin,
        "to": end,
        "hours": [int(hour) for hour in extra.hours.nonzero()[0]],
        "daily": bool(extra.waves.any()),
        "warning": found.warning,
    }
