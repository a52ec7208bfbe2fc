"""Quarantine: a bundle that crashed or hung twice in a row is not run again; the previous one resumes.

Rules:
- A model process that dies or hangs counts one crash of its bundle for its task.
- Where models run in the daemon, a start that finds the crash marker set counts one. A hang that the watchdog ended
  leaves the same marker.
- A committed batch of that bundle resets the count: a healthy model that happens to be killed while it runs, as by
  `kill -9`, commits batches long before that happens again.
- The second crash quarantines the bundle for the task. A bundle that ran before and has a copy here runs instead;
  without one the task stops and its readings wait.
- An operator's `rollback` to the bundle, or another configured bundle, ends the quarantine.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from outstation.device.bundles import history, overrides
from outstation.device.bundles.overrides import QuarantinedBundle
from outstation.device.config import Config
from outstation.device.machine.marker import Marker
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import clock, decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import BadBundle, StorageFull
from outstation.ml.model.bundle import bundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.protocol.alerts.kinds import QUARANTINED

log = logging.getLogger("outstation")
MAX_CRASHES = 2


class _CrashCount(msgspec.Struct, frozen=True):
    """Crashes of bundle `digest` in a row, and the id of the last run that crashed."""

    digest: str
    count: int
    last_marker_id: str


def handle_crash(conf: Config, store: Store, message_log: MessageLog, marker: CrashMarker, now: ClockReading) -> None:
    """Count the crash that ended the previous process, if a model did, and quarantine its bundle after the second."""
    crash = marker.previous
    if crash is not None and crash.task in conf.tasks:
        try:
            _count_crash(conf, store, message_log, crash, now)
        except StorageFull as full:
            log.error("task %s: %s; the crash of its model is not counted", crash.task, full)
    marker.clear()


def record_crash(
    conf: Config, store: Store, message_log: MessageLog, task: str, digest: str, now: ClockReading
) -> bool:
    """Count a crash of the model process of bundle `digest`; return True if that quarantined the bundle."""
    record = CrashRecord(task, digest, f"{clock.boot_id()}/{now.boot_s}")
    return _count_crash(conf, store, message_log, record, now) >= MAX_CRASHES


def require_not_quarantined(store: Store, task: str, path: Path) -> None:
    """Raise BadBundle if the bundle at `path` is quarantined for `task`."""
    quarantined = overrides.load_quarantined(store, task)
    if quarantined and (digest := bundle.read(path, None).digest) in quarantined:
        raise BadBundle(
            f"{path}: {quarantined[digest].reason}; the task's readings are kept. Configure another bundle, or send "
            "the command `rollback` to run it all the same"
        )


def release_reconfigured(conf: Config, store: Store, message_log: MessageLog, now: ClockReading) -> None:
    """End the quarantine of tasks for which another bundle is configured since; called at a start."""
    for name, task in conf.tasks.items():
        quarantined = overrides.load_quarantined(store, name)
        unchanged = {"", *(entry.configured for entry in quarantined.values())}
        if not quarantined or history.configured_digest(task.bundle, conf.data_dir) in unchanged:
            continue
        try:
            with store.transaction() as tx:
                release(tx, message_log, name, now)
        except StorageFull as full:
            log.error("task %s: %s; the next start ends the quarantine of its bundle", name, full)


def release(tx: Transaction, message_log: MessageLog, task: str, now: ClockReading) -> None:
    """End the quarantine of all bundles of a task, and reset its crash count."""
    overrides.save_quarantined(tx, task, {})
    tx.delete_state(task, task_keys.CRASH_COUNT)
    alert = QUARANTINED.cleared(f"{task}: no bundle is quarantined any more.", task=task)
    message_log.append(tx, "alerts", task, alert.to_body(task), now)


def is_suspected(store: Store, task: str, digest: str) -> bool:
    """Return True if the daemon ended while bundle `digest` ran for `task`, and no batch was committed since."""
    crashes = _load_crash_count(store, task)
    return crashes is not None and crashes.digest == digest


def _load_crash_count(store: Store, task: str) -> _CrashCount | None:
    stored = store.load_state(task, task_keys.CRASH_COUNT)
    return decoders.from_json(stored, _CrashCount) if stored else None


def _count_crash(conf: Config, store: Store, message_log: MessageLog, crash: CrashRecord, now: ClockReading) -> int:
    """Count a crash; return how many the bundle has in a row."""
    counted = _load_crash_count(store, crash.task)
    if counted is not None and counted.last_marker_id == crash.id:
        # Counted by a start that ended before it could clear the marker.
        return counted.count
    count = counted.count + 1 if counted is not None and counted.digest == crash.digest else 1
    log.error("task %s: bundle %s crashed or hung, %d times in a row", crash.task, crash.digest, count)
    past = history.load_history(store, crash.task)
    quarantined = overrides.load_quarantined(store, crash.task)
    resumed = _find_previous(conf, store, crash.task, {crash.digest, *quarantined})
    target = None if resumed is None else history.bundle_ref(resumed)
    configured = history.configured_digest(conf.tasks[crash.task].bundle, conf.data_dir)
    with store.transaction(vital=True) as tx:
        tx.save_state(
            crash.task, task_keys.CRASH_COUNT, msgspec.json.encode(_CrashCount(crash.digest, count, crash.id))
        )
        if count < MAX_CRASHES:
            return count
        refs = [] if past is None else [past.current, past.previous]
        name = next((str(ref) for ref in refs if ref is not None and ref.digest == crash.digest), "its bundle")
        reason = (
            f"{name} ({crash.digest[:19]}…) crashed or hung {count} times in a row, "
            f"the last time before {clock.to_rfc3339(now.wall_us)}, and is quarantined"
        )
        quarantined = {**quarantined, crash.digest: QuarantinedBundle(reason, configured)}
        overrides.save_quarantined(tx, crash.task, quarantined)
        outcome = f"{target} runs instead" if target else "no other has a copy here: the task stops, its readings wait"
        summary = f"{crash.task}: {reason}; {outcome}."
        evidence = {
            "task": crash.task,
            "digest": crash.digest,
            "crashes": count,
            "to": target.digest if target else None,
        }
        message_log.append(tx, "audit", None, {"event": "quarantined", "summary": summary, "evidence": evidence}, now)
        if target is not None:
            alert = QUARANTINED.raised(summary, evidence, task=crash.task)
            message_log.append(tx, "alerts", crash.task, alert.to_body(crash.task), now)
        if resumed is not None and target is not None:
            overrides.save_bundle_override(tx, crash.task, history.make_override(target, configured))
            if past is not None and past.current != target:
                history.record_activation(tx, message_log, crash.task, resumed, past, "quarantine", now)
    return count


def _find_previous(conf: Config, store: Store, task: str, excluded: Collection[str]) -> Bundle | None:
    """Return the newest bundle that ran for `task` and whose copy can be read."""
    for ref in history.available_bundles(store, task, conf.data_dir, excluded):
        with suppress(BadBundle):
            return bundle.read(history.copy_folder(conf.data_dir, ref.digest), None)
    return None


FILE = "running"


class CrashRecord(msgspec.Struct, frozen=True):
    """Run of a bundle for a task; `id` is unique among all runs of a boot."""

    task: str
    digest: str
    id: str


class CrashMarker(Marker[CrashRecord]):
    """Marker of the run in hand, in `folder`, for the one process that holds the store."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / FILE, CrashRecord, "a model that ends the daemon")
        # Of one length, so that what is written does not depend on the process.
        self._process, self._run_counter = f"{os.getpid():08x}/{time.monotonic_ns():016x}", itertools.count(1)

    @contextlib.contextmanager
    def guard_run(self, task: str, digest: str) -> Iterator[None]:
        """Set the marker while the model of bundle `digest` is loaded or runs for `task`; an exception is no crash."""
        self.write(CrashRecord(task, digest, f"{self._process}/{next(self._run_counter)}"))
        try:
            yield
        finally:
            self.clear()
