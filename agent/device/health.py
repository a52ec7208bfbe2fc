"""What the device says of itself: health, what it did, and which task cannot run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from agent import __version__
from agent.clock import Now
from agent.config import Config
from agent.device.bundles import overrides, rollout_state
from agent.device.machine import timekeeping
from agent.device.machine.timekeeping import SYNCED
from agent.device.pipeline import deadline
from agent.device.store import space
from agent.device.store.cost import Process
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import StorageFull

log = logging.getLogger("outstation")

_BROKEN = "broken bundle"
Models = Mapping[str, Mapping[str, Any]]


class Broken(msgspec.Struct, frozen=True):
    """A task whose bundle cannot run here, and why; `instead` the one that goes on, "" where none does."""

    task: str
    bundle: str
    reason: str
    instead: str = ""


class Reports:
    """Writes such messages; one that finds no room is dropped, because the next one says the same."""

    def __init__(
        self,
        conf: Config,
        store: Store,
        author: Author,
        models: Mapping[str, Mapping[str, Any]],
        now: Callable[[], Now],
    ) -> None:
        self._conf, self._store, self._author, self._models, self._now = conf, store, author, models, now
        self._process = Process()
        # Members of a health message that others know of.
        self.more: Callable[[Now], Mapping[str, Any]] = lambda now: {}

    def health(self) -> None:
        now = self._now()

        def write(tx: Transaction) -> None:
            if now.quality == "synced":
                tx.set_meta(SYNCED, str(now.wall_us))
            self._process.turn(tx, now)
            body = health(self._conf, self._store, self._models)
            told = {**body, **self.more(now), "wall_clock": timekeeping.report(self._store, now)}
            self._author.write(tx, "health", None, told, now)

        self._write(write)

    def event(self, name: str, summary: str) -> None:
        """An audit message."""
        body = {"event": name, "summary": summary, "evidence": {"tasks": self._models}}
        self._write(lambda tx: self._author.write(tx, "audit", None, body, self._now()))

    def bundles(self, broken: Sequence[Broken]) -> None:
        """One alert for each task whose bundle cannot run, open until it can."""
        for one in broken:
            log.error("task %s: %s", one.task, _told(one))
            self.fails(one)
        for task in self._models.keys() - {one.task for one in broken}:
            self.works(task)

    def fails(self, one: Broken) -> None:
        """Raise the alert, unless it is open."""
        if self._store.state(one.task, _BROKEN) is None:
            self._bundle_alert(one.task, one.bundle, _told(one))

    def works(self, task: str) -> None:
        """Clear the alert, if it is open."""
        if self._store.state(task, _BROKEN) is not None:
            self._bundle_alert(task, self._conf.tasks[task].bundle, "")

    def _bundle_alert(self, task: str, bundle: str, reason: str) -> None:
        body: dict[str, Any] = {
            "alert": "model",
            "subject": bundle,
            "state": "raised" if reason else "cleared",
            "severity": "critical" if reason else "info",
            "id": f"{task}/model",
            "summary": f"{task} {reason}"[:1000] if reason else f"{task} runs again with bundle {bundle}.",
            "evidence": {},
        }

        def write(tx: Transaction) -> None:
            if reason:
                tx.keep(task, _BROKEN, reason.encode())
            else:
                tx.drop(task, _BROKEN)
            self._author.write(tx, "alerts", task, body, self._now())

        self._write(write)

    def _write(self, action: Callable[[Transaction], object]) -> None:
        try:
            with self._store.transaction() as tx:
                action(tx)
        except StorageFull as full:
            log.error("%s", full)


def _told(one: Broken) -> str:
    if one.instead:
        return f"goes on with {one.instead}: {one.reason}"
    return f"does not run: {one.reason}"


def health(conf: Config, store: Store, models: Models) -> dict[str, Any]:
    """The body of a health message; `models` names each running task's model."""
    counters = store.counters()
    waiting, _ = store.outbox_size()
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
                "model": models.get(name),
                **deadline.shown(store, counters, name, task.deadline),
                **overrides.shown(store, name),
                **rollout_state.shown(store, name, conf.device.id),
            }
            for name, task in conf.tasks.items()
        },
        "outbox": waiting,
        "store": {
            "bytes": store.used_bytes(),
            "max": int(conf.buffer.max_size),
            "hours": space.hours(store, store.limit_bytes()),
        },
    }
