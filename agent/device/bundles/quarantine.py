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

import msgspec

from agent import clock
from agent.alerts import QUARANTINED
from agent.clock import ClockReading
from agent.config import Config
from agent.device.bundles import history as kept
from agent.device.bundles import overrides
from agent.device.bundles.crash_marker import CrashMarker, CrashRecord
from agent.device.bundles.history import BundleRef
from agent.device.bundles.overrides import QuarantinedBundle
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import BadBundle, StorageFull
from agent.model.bundle import bundle
from agent.model.bundle.bundle import Bundle

log = logging.getLogger("outstation")

MAX_CRASHES = 2


class _CrashCount(msgspec.Struct, frozen=True):
    """Of bundle `digest`, in a row; `last` is the id of the newest mark."""

    digest: str
    count: int
    last_marker_id: str


def handle_crash(conf: Config, store: Store, message_log: MessageLog, marker: CrashMarker, now: ClockReading) -> None:
    """Count what the process before died of, and set a bundle aside where that was once too often."""
    left = marker.previous_run
    if left is not None and left.task in conf.tasks:
        try:
            _count_crash(conf, store, message_log, left, now)
        except StorageFull as full:
            log.error("task %s: %s; that its model ended the agent is not counted", left.task, full)
    marker.clear()


def require_not_quarantined(store: Store, task: str, path: Path) -> None:
    """Raises BadBundle where the bundle at `path` is set aside for `task`."""
    aside = overrides.load_quarantined(store, task)
    if aside and (digest := bundle.read(path, None).digest) in aside:
        raise BadBundle(
            f"{path}: {aside[digest].reason}; its readings are kept. Configure another bundle, or send the command "
            "`rollback` to run it all the same"
        )


def release_reconfigured(conf: Config, store: Store, message_log: MessageLog, now: ClockReading) -> None:
    """At a start: another bundle than when one was set aside is configured for a task."""
    for name, task in conf.tasks.items():
        aside = overrides.load_quarantined(store, name)
        unchanged = {"", *(one.configured for one in aside.values())}
        if not aside or kept.configured_digest(task.bundle, conf.data_dir) in unchanged:
            continue
        try:
            with store.transaction() as tx:
                release(tx, message_log, name, now)
        except StorageFull as full:
            log.error("task %s: %s; that its bundle is no longer set aside is recorded at the next start", name, full)


def release(tx: Transaction, message_log: MessageLog, task: str, now: ClockReading) -> None:
    """Nothing is set aside for `task` any more, and its crashes are forgotten."""
    overrides.save_quarantined(tx, task, {})
    tx.delete_state(task, task_keys.CRASH_COUNT)
    alert = QUARANTINED.cleared(f"{task}: no bundle is set aside any more.", task=task)
    message_log.append(tx, "alerts", task, alert.to_body(task), now)


def is_suspected(store: Store, task: str, digest: str) -> bool:
    """Whether the agent ended while bundle `digest` ran for `task`, and no batch of it was committed since."""
    crashes = _load_crash_count(store, task)
    return crashes is not None and crashes.digest == digest


def _load_crash_count(store: Store, task: str) -> _CrashCount | None:
    found = store.load_state(task, task_keys.CRASH_COUNT)
    return msgspec.json.decode(found, type=_CrashCount) if found else None


def _count_crash(conf: Config, store: Store, message_log: MessageLog, crash: CrashRecord, now: ClockReading) -> None:
    past = _load_crash_count(store, crash.task)
    if past is not None and past.last_marker_id == crash.id:
        # Counted by a start that died before it could clear the mark.
        return
    count = past.count + 1 if past is not None and past.digest == crash.digest else 1
    log.error("task %s: the agent ended while bundle %s ran, %d times in a row", crash.task, crash.digest, count)
    history = kept.load_history(store, crash.task)
    aside = overrides.load_quarantined(store, crash.task)
    resumed = _find_previous(conf, store, crash.task, {crash.digest, *aside})
    target = None if resumed is None else kept.bundle_ref(resumed)
    configured = kept.configured_digest(conf.tasks[crash.task].bundle, conf.data_dir)
    with store.transaction(vital=True) as tx:
        tx.save_state(
            crash.task, task_keys.CRASH_COUNT, msgspec.json.encode(_CrashCount(crash.digest, count, crash.id))
        )
        if count < MAX_CRASHES:
            return
        known = [history.current, history.previous] if history is not None else []
        name = next((str(one) for one in known if one is not None and one.digest == crash.digest), "its bundle")
        why = (
            f"{name} ({crash.digest[:19]}…) ended the agent {count} times in a row while it ran, "
            f"the last time before {clock.to_rfc3339(now.wall_us)}, and is set aside"
        )
        overrides.save_quarantined(tx, crash.task, {**aside, crash.digest: QuarantinedBundle(why, configured)})
        _report_quarantine(tx, message_log, crash, why, count, target, now)
        if resumed is not None and target is not None:
            overrides.save_bundle_override(tx, crash.task, kept.make_override(target, configured))
            if history is not None and history.current != target:
                kept.record_activation(tx, message_log, crash.task, resumed, history, "quarantine", now)


def _find_previous(conf: Config, store: Store, task: str, excluded: Collection[str]) -> Bundle | None:
    """The newest bundle that ran for `task`, and whose copy can be read."""
    for one in kept.available_bundles(store, task, conf.data_dir, excluded):
        with suppress(BadBundle):
            return bundle.read(kept.copy_folder(conf.data_dir, one.digest), None)
    return None


def _report_quarantine(
    tx: Transaction,
    message_log: MessageLog,
    crash: CrashRecord,
    reason: str,
    count: int,
    target: BundleRef | None,
    now: ClockReading,
) -> None:
    """The audit message, and the alert where another bundle runs; where none does, the task's own alert says so."""
    then = f"{target} runs instead" if target else "no other is kept here, so the task stops and its readings wait"
    summary = f"{crash.task}: {reason}; {then}."
    evidence = {"task": crash.task, "digest": crash.digest, "crashes": count, "to": target.digest if target else None}
    message_log.append(tx, "audit", None, {"event": "quarantined", "summary": summary, "evidence": evidence}, now)
    if target is not None:
        alert = QUARANTINED.raised(summary, evidence, task=crash.task)
        message_log.append(tx, "alerts", crash.task, alert.to_body(crash.task), now)
