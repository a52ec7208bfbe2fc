"""Bundle history: copies of the last two bundles of each task, so that a rollback needs only this device.

A copy is durable before its bundle counts as activated. Copies are outside the store's quota.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict

from outstation.device.bundles import overrides, rollout_state
from outstation.device.bundles.overrides import BundleOverride
from outstation.device.config import Config
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders, durable_files
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import BadBundle, StorageFull, UnknownBundle
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.bundle.manifest import ModelOutput

log = logging.getLogger("outstation")

_MAX_LABEL_BYTES = 8_000
_PARTIAL_SUFFIX = ".half"


class BundleRef(msgspec.Struct, frozen=True):
    """Name, version and digest of a bundle that was activated."""

    name: str
    version: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class BundleHistory(msgspec.Struct, frozen=True):
    current: BundleRef
    previous: BundleRef | None = None


def load_history(store: Store, task: str) -> BundleHistory | None:
    stored = store.load_state(task, task_keys.BUNDLE_HISTORY)
    return decoders.from_json(stored, BundleHistory) if stored else None


def copies_folder(data_dir: Path) -> Path:
    return data_dir / "bundles" / ".copies"


def copy_folder(data_dir: Path, digest: str) -> Path:
    return copies_folder(data_dir) / digest.removeprefix("sha256:")


def locate_bundle(conf: Config, store: Store | None, task: str) -> Path:
    """Return the folder of the configured bundle, or of the one that a rollback or rollout put in its place.

    Raises BadBundle.
    """
    try:
        configured = builtin.locate_bundle(conf.tasks[task].bundle, conf.data_dir / "bundles")
    except UnknownBundle as problem:
        raise UnknownBundle(f"tasks.{task}.bundle: {problem}") from None
    override = None if store is None else overrides.load_bundle_override(store, task)
    if override is None:
        return configured
    try:
        has_changed = bundle.read(configured, None).digest != override.configured
    except BadBundle:
        # The configured bundle cannot be read: the current one continues to run.
        has_changed = False
    return configured if has_changed else copy_folder(conf.data_dir, override.digest)


def available_bundles(store: Store, task: str, data_dir: Path, excluded: Collection[str]) -> list[BundleRef]:
    """Return the bundles that ran for `task` and have a copy here, newest first, without `excluded` digests.

    A canary is left out: it may run in a subprocess only.
    """
    past, canary = load_history(store, task), rollout_state.find_canary_digest(store, task)
    refs = [] if past is None else [ref for ref in (past.current, past.previous) if ref is not None]
    refs = [ref for ref in refs if ref.digest not in excluded and ref.digest != canary]
    return [ref for ref in refs if copy_folder(data_dir, ref.digest).is_dir()]


def store_copy(loaded: Bundle, data_dir: Path) -> bool:
    """Copy a bundle durably; return False if the disk has no room. A crash leaves a complete copy or none."""
    target = copy_folder(data_dir, loaded.digest)
    if target.is_dir():
        return True
    # Few starts need it.
    import shutil

    partial = target.with_name(target.name + _PARTIAL_SUFFIX)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, data in loaded.files.items():
            durable_files.write_new(partial / name, data, 0o644)
        durable_files.fsync(partial)
        durable_files.rename(partial, target)
    except OSError as error:
        log.error("%s: bundle %s cannot be copied here: %s", target.parent, loaded.manifest.name, error.strerror)
        shutil.rmtree(partial, ignore_errors=True)
        return False
    return True


def record_configured(
    store: Store, message_log: MessageLog, task: str, loaded: Bundle, data_dir: Path, now: ClockReading
) -> None:
    """Copy the bundle of a task that the start loaded, and record its activation if it is another one."""
    store_copy(loaded, data_dir)
    old, this = load_history(store, task), bundle_ref(loaded)
    override = overrides.load_bundle_override(store, task)
    is_obsolete = override is not None and override.digest != this.digest
    if old is not None and old.current.digest == this.digest and not is_obsolete:
        return
    try:
        with store.transaction() as tx:
            if is_obsolete:
                overrides.save_bundle_override(tx, task, None)
            record_activation(tx, message_log, task, loaded, old, "configured", now)
    except StorageFull as full:
        log.error("task %s: %s; the next start records that %s was activated", task, full, this)


def record_activation(
    tx: Transaction,
    message_log: MessageLog,
    task: str,
    loaded: Bundle,
    past: BundleHistory | None,
    reason: str,
    now: ClockReading,
) -> None:
    """Save the history with this bundle as the current one, and append the audit message.

    The message describes labels of its results: a collector that takes them has no bundle.
    """
    this, previous = bundle_ref(loaded), past.current if past else None
    if previous is not None and previous.digest == this.digest:
        previous = past.previous if past else None
    restore(tx, task, BundleHistory(this, previous))
    manifest = loaded.manifest
    further = {
        name: _describe_labels(manifest.label_schemas[name].kind, spec) for name, spec in manifest.further.items()
    }
    origin = asdict(previous) if previous else None
    evidence: dict[str, Any] = {"task": task, "from": origin, "to": asdict(this), "why": reason}
    evidence |= _describe_labels(manifest.label_kind, manifest.output)
    # Labels of all outputs share the limit: a collector infers those that are left out.
    if further and len(msgspec.json.encode(further)) <= _MAX_LABEL_BYTES:
        evidence["outputs"] = further
    summary = f"{task}: {this} was activated" + (f" after {previous}." if previous else ".")
    message_log.append(tx, "audit", None, {"event": "activated", "summary": summary, "evidence": evidence}, now)


def _describe_labels(kind: str, output: ModelOutput) -> dict[str, Any]:
    labels = output.labels if len(msgspec.json.encode(output.labels)) <= _MAX_LABEL_BYTES else ()
    return {"kind": kind, "labels": list(labels), "threshold": output.threshold}


def restore(tx: Transaction, task: str, past: BundleHistory | None) -> None:
    """Save a history, such as that from before a canary: a bundle that was rolled back is no target for a rollback."""
    if past is None:
        tx.delete_state(task, task_keys.BUNDLE_HISTORY)
    else:
        tx.save_state(task, task_keys.BUNDLE_HISTORY, msgspec.json.encode(past))


def bundle_ref(loaded: Bundle) -> BundleRef:
    return BundleRef(loaded.manifest.name, loaded.manifest.version, loaded.digest)


def prune(store: Store, tasks: Iterable[str], data_dir: Path) -> None:
    """Delete copies that no task can go back to or come to."""
    needed = set()
    for task in tasks:
        past, override = load_history(store, task), overrides.load_bundle_override(store, task)
        digests = [past.current.digest] if past else []
        digests += [past.previous.digest] if past and past.previous else []
        digests += [override.digest] if override else []
        digests += sorted(rollout_state.find_needed_digests(store, task))
        needed |= {copy_folder(data_dir, digest).name for digest in digests}
    home = copies_folder(data_dir)
    for entry in home.iterdir() if home.is_dir() else ():
        # The suffix: a copy that is just being made is needed, too.
        if entry.name.removesuffix(_PARTIAL_SUFFIX) not in needed:
            import shutil

            shutil.rmtree(entry, ignore_errors=True)


def configured_digest(name: str, data_dir: Path) -> str:
    """Return the digest of the configured bundle; empty if it cannot be read."""
    try:
        return bundle.read(builtin.locate_bundle(name, data_dir / "bundles"), None).digest
    except BadBundle:
        return ""


def make_override(target: BundleRef, configured: str, rollout: str = "") -> BundleOverride | None:
    """Return the override that runs `target` from now on; None if that is the configured bundle."""
    return None if target.digest == configured else BundleOverride(target.digest, configured, rollout)
