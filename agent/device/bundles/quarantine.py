"""A bundle that ended the agent twice in a row while it ran is set aside, and the one before it resumes.

Rules:
- a start that finds the `marker` set counts one crash of that bundle for that task; a hang that the watchdog ended
  leaves the same mark
- a batch of that bundle that is committed in between begins the count anew: a healthy model that happens to be killed
  while it runs, as by `kill -9`, has proved itself long before it could happen again
- the second crash sets the bundle aside for the task: one that ran before and is kept here runs instead, else none,
  and the readings wait
- an operator's `rollback` to it, or another configured bundle, ends that
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from agent import clock
from agent.clock import Now
from agent.config import Config
from agent.device.bundles import history as kept
from agent.device.bundles import overrides
from agent.device.bundles.crash_marker import Mark, Marker
from agent.device.bundles.history import Ran
from agent.device.bundles.overrides import Aside
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import BadBundle, StorageFull
from agent.model.bundle import bundle
from agent.model.bundle.bundle import Bundle

log = logging.getLogger("outstation")

MOST_CRASHES = 2


class _Crashes(msgspec.Struct, frozen=True):
    """Of bundle `digest`, in a row; `last` is the id of the newest mark."""

    digest: str
    count: int
    last: str


def settle(conf: Config, store: Store, author: Author, marker: Marker, now: Now) -> None:
    """Count what the process before died of, and set a bundle aside where that was once too often."""
    left = marker.left
    if left is not None and left.task in conf.tasks:
        try:
            _count(conf, store, author, left, now)
        except StorageFull as full:
            log.error("task %s: %s; that its model ended the agent is not counted", left.task, full)
    marker.clear()


def refuse(store: Store, task: str, path: Path) -> None:
    """Raises BadBundle where the bundle at `path` is set aside for `task`."""
    aside = overrides.set_aside(store, task)
    if aside and (digest := bundle.read(path, None).digest) in aside:
        raise BadBundle(
            f"{path}: {aside[digest].why}; its readings are kept. Configure another bundle, or send the command "
            "`rollback` to run it all the same"
        )


def lift(conf: Config, store: Store, author: Author, now: Now) -> None:
    """At a start: another bundle than when one was set aside is configured for a task."""
    for name, task in conf.tasks.items():
        aside = overrides.set_aside(store, name)
        unchanged = {"", *(one.configured for one in aside.values())}
        if not aside or kept.configured_digest(task.bundle, conf.data_dir) in unchanged:
            continue
        try:
            with store.transaction() as tx:
                end(tx, author, name, now)
        except StorageFull as full:
            log.error("task %s: %s; that its bundle is no longer set aside is recorded at the next start", name, full)


def end(tx: Transaction, author: Author, task: str, now: Now) -> None:
    """Nothing is set aside for `task` any more, and its crashes are forgotten."""
    overrides.keep_set_aside(tx, task, {})
    tx.drop(task, overrides.CRASHES)
    body = _alert(task, "cleared", "info", f"{task}: no bundle is set aside any more.", {})
    author.write(tx, "alerts", task, body, now)


def is_suspected(store: Store, task: str, digest: str) -> bool:
    """Whether the agent ended while bundle `digest` ran for `task`, and no batch of it was committed since."""
    crashes = _crashes(store, task)
    return crashes is not None and crashes.digest == digest


def _crashes(store: Store, task: str) -> _Crashes | None:
    found = store.state(task, overrides.CRASHES)
    return msgspec.json.decode(found, type=_Crashes) if found else None


def _count(conf: Config, store: Store, author: Author, left: Mark, now: Now) -> None:
    past = _crashes(store, left.task)
    if past is not None and past.last == left.id:
        # Counted by a start that died before it could clear the mark.
        return
    count = past.count + 1 if past is not None and past.digest == left.digest else 1
    log.error("task %s: the agent ended while bundle %s ran, %d times in a row", left.task, left.digest, count)
    history = kept.history(store, left.task)
    aside = overrides.set_aside(store, left.task)
    resumed = _before(conf, store, left.task, {left.digest, *aside})
    target = None if resumed is None else kept.ran(resumed)
    configured = kept.configured_digest(conf.tasks[left.task].bundle, conf.data_dir)
    with store.transaction(vital=True) as tx:
        tx.keep(left.task, overrides.CRASHES, msgspec.json.encode(_Crashes(left.digest, count, left.id)))
        if count < MOST_CRASHES:
            return
        known = [history.now, history.before] if history is not None else []
        name = next((str(one) for one in known if one is not None and one.digest == left.digest), "its bundle")
        why = (
            f"{name} ({left.digest[:19]}…) ended the agent {count} times in a row while it ran, "
            f"the last time before {clock.rfc3339(now.wall_us)}, and is set aside"
        )
        overrides.keep_set_aside(tx, left.task, {**aside, left.digest: Aside(why, configured)})
        _tell(tx, author, left, why, count, target, now)
        if resumed is not None and target is not None:
            overrides.keep_rollback(tx, left.task, kept.rolled_back(target, configured))
            if history is not None and history.now != target:
                kept.record(tx, author, left.task, resumed, history, "quarantine", now)


def _before(conf: Config, store: Store, task: str, barred: Collection[str]) -> Bundle | None:
    """The newest bundle that ran for `task`, and whose copy can be read."""
    for one in kept.ran_before(store, task, conf.data_dir, barred):
        with suppress(BadBundle):
            return bundle.read(kept.folder(conf.data_dir, one.digest), None)
    return None


def _tell(tx: Transaction, author: Author, left: Mark, why: str, count: int, target: Ran | None, now: Now) -> None:
    """The audit message, and the alert where another bundle runs; where none does, the task's own alert says so."""
    then = f"{target} runs instead" if target else "no other is kept here, so the task stops and its readings wait"
    summary = f"{left.task}: {why}; {then}."
    evidence = {"task": left.task, "digest": left.digest, "crashes": count, "to": target.digest if target else None}
    author.write(tx, "audit", None, {"event": "quarantined", "summary": summary, "evidence": evidence}, now)
    if target is not None:
        author.write(tx, "alerts", left.task, _alert(left.task, "raised", "critical", summary, evidence), now)


def _alert(task: str, state: str, severity: str, summary: str, evidence: dict[str, Any]) -> dict[str, Any]:
    return {
        "alert": "model",
        "subject": task,
        "state": state,
        "severity": severity,
        "id": f"{task}/quarantine",
        "summary": summary,
        "evidence": evidence,
    }
