"""Copies of the bundles that ran: the last two of each task, so that a rollback needs nothing but this device.

A copy is on the disk before its bundle counts as activated. They are beside the store's quota: two for each task.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict

from agent.clock import Now
from agent.config import Config
from agent.device.bundles import overrides, rollout_state
from agent.device.bundles.overrides import Rollback
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import BadBundle, StorageFull
from agent.model.bundle import builtin, bundle
from agent.model.bundle.bundle import Bundle
from agent.wire.keys import write_new

log = logging.getLogger("outstation")

ACTIVE = "active bundle"
_MOST_LABEL_BYTES = 8_000
_HALF = ".half"


class Ran(msgspec.Struct, frozen=True):
    """A bundle that was activated."""

    name: str
    version: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class History(msgspec.Struct, frozen=True):
    """The bundle of a task, and the one before it."""

    now: Ran
    before: Ran | None = None


def history(store: Store, task: str) -> History | None:
    kept = store.state(task, ACTIVE)
    return None if kept is None else from_json(kept)


def from_json(kept: bytes) -> History:
    found = json.loads(kept)
    return History(Ran(**found["now"]), Ran(**found["before"]) if found["before"] else None)


def folder(data_dir: Path, digest: str) -> Path:
    return data_dir / "bundles" / ".kept" / digest.removeprefix("sha256:")


def bundle_of(conf: Config, store: Store | None, task: str) -> Path:
    """Where the bundle that `task` runs is. Raises BadBundle."""
    configured = builtin.locate(conf.tasks[task].bundle, conf.data_dir / "bundles")
    return configured if store is None else in_force(store, task, configured, conf.data_dir)


def in_force(store: Store, task: str, configured: Path, data_dir: Path) -> Path:
    """Where the bundle of `task` is: the configured one, or the one it was rolled back to, or came to by a roll-out."""
    wanted = overrides.rollback(store, task)
    if wanted is None:
        return configured
    try:
        changed = bundle.read(configured, None).digest != wanted.configured
    except BadBundle:
        # The configured one cannot be read: what ran goes on.
        changed = False
    return configured if changed else folder(data_dir, wanted.digest)


def ran_before(store: Store, task: str, data_dir: Path, barred: Collection[str]) -> list[Ran]:
    """Bundles that ran for `task` and whose copies are here, the newest first, without those of `barred` digests.

    One that is still on probation is none: it may run apart only.
    """
    past, tried = history(store, task), rollout_state.on_probation(store, task)
    known = [] if past is None else [one for one in (past.now, past.before) if one is not None]
    known = [one for one in known if one.digest not in barred and one.digest != tried]
    return [one for one in known if folder(data_dir, one.digest).is_dir()]


def keep(found: Bundle, data_dir: Path) -> bool:
    """Copy a bundle, durably; False where the disk does not take it. A crash leaves a whole copy or none."""
    target = folder(data_dir, found.digest)
    if target.is_dir():
        return True
    half = target.with_name(target.name + _HALF)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        for name, data in found.files.items():
            write_new(half / name, data, 0o644)
        sync(half)
        half.rename(target)
        sync(target.parent)
    except OSError as error:
        log.error("%s: bundle %s cannot be kept for a rollback: %s", target.parent, found.manifest.name, error.strerror)
        shutil.rmtree(half, ignore_errors=True)
        return False
    return True


def activated(store: Store, author: Author, task: str, found: Bundle, data_dir: Path, now: Now) -> None:
    """A `task` was loaded at the start: copy its bundle and record the change, if it is one."""
    keep(found, data_dir)
    old, this = history(store, task), ran(found)
    wanted = overrides.rollback(store, task)
    left = wanted is not None and wanted.digest != this.digest
    if old is not None and old.now.digest == this.digest and not left:
        return
    try:
        with store.transaction() as tx:
            if left:
                overrides.keep_rollback(tx, task, None)
            record(tx, author, task, found, old, "configured", now)
    except StorageFull as full:
        log.error("task %s: %s; that %s was activated is recorded at the next start", task, full, this)


def record(tx: Transaction, author: Author, task: str, found: Bundle, old: History | None, why: str, now: Now) -> None:
    """That `task` runs this bundle now, what ran before, and the audit message.

    The message says what labels of its results may be: who collects them has no bundle.
    """
    this, before = ran(found), old.now if old else None
    if before is not None and before.digest == this.digest:
        before = old.before if old else None
    kept = _keep(tx, task, this, before)
    output = found.manifest.output
    told = output.labels if len(json.dumps(output.labels)) <= _MOST_LABEL_BYTES else ()
    evidence: dict[str, Any] = {"task": task, "from": kept["before"], "to": kept["now"], "why": why}
    evidence |= {"kind": found.manifest.truth, "labels": list(told), "threshold": output.threshold}
    summary = f"{task}: {this} was activated" + (f" after {before}." if before else ".")
    author.write(tx, "audit", None, {"event": "activated", "summary": summary, "evidence": evidence}, now)


def _keep(tx: Transaction, task: str, now: Ran, before: Ran | None) -> dict[str, Any]:
    kept = {"now": asdict(now), "before": asdict(before) if before else None}
    tx.keep(task, ACTIVE, json.dumps(kept).encode())
    return kept


def restore(tx: Transaction, task: str, past: History | None) -> None:
    """That this ran, and not what was recorded since: a bundle that did not prove itself is none to go back to."""
    if past is None:
        tx.drop(task, ACTIVE)
    else:
        _keep(tx, task, past.now, past.before)


def ran(found: Bundle) -> Ran:
    return Ran(found.manifest.name, found.manifest.version, found.digest)


def prune(store: Store, tasks: Iterable[str], data_dir: Path) -> None:
    """Delete copies that no task can go back to."""
    needed = set()
    for task in tasks:
        known, wanted = history(store, task), overrides.rollback(store, task)
        digests = [known.now.digest] if known else []
        digests += [known.before.digest] if known and known.before else []
        digests += [wanted.digest] if wanted else []
        digests += sorted(rollout_state.digests(store, task))
        needed |= {folder(data_dir, digest).name for digest in digests}
    home = data_dir / "bundles" / ".kept"
    for entry in home.iterdir() if home.is_dir() else ():
        # A copy that is being made is not there yet, and needed.
        if entry.name.removesuffix(_HALF) not in needed:
            shutil.rmtree(entry, ignore_errors=True)


def configured_digest(name: str, data_dir: Path) -> str:
    """The digest of the configured bundle; "" where it cannot be read."""
    try:
        return bundle.read(builtin.locate(name, data_dir / "bundles"), None).digest
    except BadBundle:
        return ""


def rolled_back(this: Ran, configured: str, rollout: str = "") -> Rollback | None:
    """What to keep so that `this` runs from now on; nothing where it is the configured one."""
    return None if this.digest == configured else Rollback(this.digest, configured, rollout)


def sync(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
