"""Copies of the bundles that ran: the last two of each task, so that a rollback needs nothing but this device.

A copy is on the disk before its bundle counts as activated. They are beside the store's quota: two for each task.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict

from agent import durable_files
from agent.clock import ClockReading
from agent.config import Config
from agent.device.bundles import overrides, rollout_state
from agent.device.bundles.overrides import BundleOverride
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import BadBundle, StorageFull
from agent.model.bundle import builtin, bundle
from agent.model.bundle.bundle import Bundle

log = logging.getLogger("outstation")

_MAX_LABEL_BYTES = 8_000
_PARTIAL_SUFFIX = ".half"


class BundleRef(msgspec.Struct, frozen=True):
    """A bundle that was activated."""

    name: str
    version: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class BundleHistory(msgspec.Struct, frozen=True):
    """The bundle of a task, and the one before it."""

    current: BundleRef
    previous: BundleRef | None = None


def load_history(store: Store, task: str) -> BundleHistory | None:
    kept = store.load_state(task, task_keys.BUNDLE_HISTORY)
    return None if kept is None else from_json(kept)


def from_json(data: bytes) -> BundleHistory:
    found = json.loads(data)
    return BundleHistory(BundleRef(**found["now"]), BundleRef(**found["before"]) if found["before"] else None)


def copy_folder(data_dir: Path, digest: str) -> Path:
    return data_dir / "bundles" / ".kept" / digest.removeprefix("sha256:")


def locate_bundle(conf: Config, store: Store | None, task: str) -> Path:
    """Where the bundle that `task` runs is. Raises BadBundle."""
    configured = builtin.locate_bundle(conf.tasks[task].bundle, conf.data_dir / "bundles")
    return configured if store is None else effective_path(store, task, configured, conf.data_dir)


def effective_path(store: Store, task: str, configured: Path, data_dir: Path) -> Path:
    """Where the bundle of `task` is: the configured one, or the one it was rolled back to, or came to by a roll-out."""
    wanted = overrides.load_bundle_override(store, task)
    if wanted is None:
        return configured
    try:
        changed = bundle.read(configured, None).digest != wanted.configured
    except BadBundle:
        # The configured one cannot be read: what ran goes on.
        changed = False
    return configured if changed else copy_folder(data_dir, wanted.digest)


def available_bundles(store: Store, task: str, data_dir: Path, excluded: Collection[str]) -> list[BundleRef]:
    """Bundles that ran for `task` and whose copies are here, the newest first, without those of `barred` digests.

    One that is still on probation is none: it may run apart only.
    """
    past, tried = load_history(store, task), rollout_state.find_canary_digest(store, task)
    known = [] if past is None else [one for one in (past.current, past.previous) if one is not None]
    known = [one for one in known if one.digest not in excluded and one.digest != tried]
    return [one for one in known if copy_folder(data_dir, one.digest).is_dir()]


def store_copy(loaded: Bundle, data_dir: Path) -> bool:
    """Copy a bundle, durably; False where the disk does not take it. A crash leaves a whole copy or none."""
    target = copy_folder(data_dir, loaded.digest)
    if target.is_dir():
        return True
    half = target.with_name(target.name + _PARTIAL_SUFFIX)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        for name, data in loaded.files.items():
            durable_files.write_new(half / name, data, 0o644)
        durable_files.fsync(half)
        durable_files.rename(half, target)
    except OSError as error:
        log.error(
            "%s: bundle %s cannot be kept for a rollback: %s", target.parent, loaded.manifest.name, error.strerror
        )
        shutil.rmtree(half, ignore_errors=True)
        return False
    return True


def record_configured(
    store: Store, message_log: MessageLog, task: str, loaded: Bundle, data_dir: Path, now: ClockReading
) -> None:
    """A `task` was loaded at the start: copy its bundle and record the change, if it is one."""
    store_copy(loaded, data_dir)
    old, this = load_history(store, task), bundle_ref(loaded)
    wanted = overrides.load_bundle_override(store, task)
    left = wanted is not None and wanted.digest != this.digest
    if old is not None and old.current.digest == this.digest and not left:
        return
    try:
        with store.transaction() as tx:
            if left:
                overrides.save_bundle_override(tx, task, None)
            record_activation(tx, message_log, task, loaded, old, "configured", now)
    except StorageFull as full:
        log.error("task %s: %s; that %s was activated is recorded at the next start", task, full, this)


def record_activation(
    tx: Transaction,
    message_log: MessageLog,
    task: str,
    loaded: Bundle,
    past: BundleHistory | None,
    reason: str,
    now: ClockReading,
) -> None:
    """That `task` runs this bundle now, what ran before, and the audit message.

    The message says what labels of its results may be: who collects them has no bundle.
    """
    this, before = bundle_ref(loaded), past.current if past else None
    if before is not None and before.digest == this.digest:
        before = past.previous if past else None
    kept = _save_history(tx, task, this, before)
    output = loaded.manifest.output
    told = output.labels if len(json.dumps(output.labels)) <= _MAX_LABEL_BYTES else ()
    evidence: dict[str, Any] = {"task": task, "from": kept["before"], "to": kept["now"], "why": reason}
    evidence |= {"kind": loaded.manifest.label_kind, "labels": list(told), "threshold": output.threshold}
    summary = f"{task}: {this} was activated" + (f" after {before}." if before else ".")
    message_log.append(tx, "audit", None, {"event": "activated", "summary": summary, "evidence": evidence}, now)


def _save_history(tx: Transaction, task: str, current: BundleRef, previous: BundleRef | None) -> dict[str, Any]:
    kept = {"now": asdict(current), "before": asdict(previous) if previous else None}
    tx.save_state(task, task_keys.BUNDLE_HISTORY, json.dumps(kept).encode())
    return kept


def restore(tx: Transaction, task: str, past: BundleHistory | None) -> None:
    """That this ran, and not what was recorded since: a bundle that did not prove itself is none to go back to."""
    if past is None:
        tx.delete_state(task, task_keys.BUNDLE_HISTORY)
    else:
        _save_history(tx, task, past.current, past.previous)


def bundle_ref(loaded: Bundle) -> BundleRef:
    return BundleRef(loaded.manifest.name, loaded.manifest.version, loaded.digest)


def prune(store: Store, tasks: Iterable[str], data_dir: Path) -> None:
    """Delete copies that no task can go back to."""
    needed = set()
    for task in tasks:
        known, wanted = load_history(store, task), overrides.load_bundle_override(store, task)
        digests = [known.current.digest] if known else []
        digests += [known.previous.digest] if known and known.previous else []
        digests += [wanted.digest] if wanted else []
        digests += sorted(rollout_state.find_needed_digests(store, task))
        needed |= {copy_folder(data_dir, digest).name for digest in digests}
    home = data_dir / "bundles" / ".kept"
    for entry in home.iterdir() if home.is_dir() else ():
        # A copy that is being made is not there yet, and needed.
        if entry.name.removesuffix(_PARTIAL_SUFFIX) not in needed:
            shutil.rmtree(entry, ignore_errors=True)


def configured_digest(name: str, data_dir: Path) -> str:
    """The digest of the configured bundle; "" where it cannot be read."""
    try:
        return bundle.read(builtin.locate_bundle(name, data_dir / "bundles"), None).digest
    except BadBundle:
        return ""


def make_override(target: BundleRef, configured: str, rollout: str = "") -> BundleOverride | None:
    """What to keep so that `this` runs from now on; nothing where it is the configured one."""
    return None if target.digest == configured else BundleOverride(target.digest, configured, rollout)
