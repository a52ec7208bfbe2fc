"""The device about itself: what the health message says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent import __version__
from agent.config import Config
from agent.device.store import Store


def report(conf: Config, store: Store, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The body of a health message; `tasks` names each task's model."""
    counters = store.counters()
    waiting, _ = store.outbox_size()
    used = store.used_bytes()
    return {
        "agent": __version__,
        "streams": {name: {"rows": store.last_row(name), "first": store.first_row(name)} for name in conf.streams},
        "rejected": counters.get("lines rejected", 0),
        "tasks": {
            name: {
                "stream": task.stream,
                "row": store.cursor(name) or 0,
                "first": store.first_consumed(name),
                "windows": counters.get(f"windows.{name}", 0),
                "model": tasks.get(name),
            }
            for name, task in conf.tasks.items()
        },
        "outbox": waiting,
        "store": {"bytes": used, "max": int(conf.buffer.max_size)},
    }
