"""Overrides: changes to a task by operators, rollouts or crashes, stored until they are changed back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from outstation.device.config import Config
from outstation.device.store import task_keys
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.foundation.errors import ConfigError

if TYPE_CHECKING:
    from outstation.device.machine.schedule import Schedule


class BundleOverride(msgspec.Struct, frozen=True):
    """Bundle `digest` runs instead of the configured one, for as long as the digest of that is `configured`.

    `rollout` names the rollout that wants it; it is empty after a rollback by an operator or a quarantine.
    """

    digest: str
    configured: str
    rollout: str = ""


class QuarantinedBundle(msgspec.Struct, frozen=True):
    """Reason that a bundle does not run, for as long as the digest of the configured one is `configured`."""

    reason: str
    configured: str


def is_paused(store: Store, task: str) -> bool:
    return store.load_state(task, task_keys.PAUSED) is not None


def load_schedule(store: Store, task: str) -> str | None:
    """Return the schedule that an operator set instead of the configured one."""
    text = store.load_state(task, task_keys.SCHEDULE_OVERRIDE)
    return None if text is None else text.decode()


def effective_schedule(file: str, conf: Config, store: Store, task: str, last_us: int | None) -> Schedule:
    """Return the schedule that an operator set, or the configured one. Raises ConfigError if that is malformed."""
    # Command `batch` has no schedule.
    from outstation.device.machine import schedule_text

    text = load_schedule(store, task)
    if text is not None:
        try:
            return schedule_text.parse(file, task, text, last_us, conf.device.id)
        except ConfigError:
            # A schedule that an earlier version took must not keep the device from starting.
            pass
    return schedule_text.parse(file, task, conf.tasks[task].schedule, last_us, conf.device.id)


def load_bundle_override(store: Store, task: str) -> BundleOverride | None:
    stored = store.load_state(task, task_keys.BUNDLE_OVERRIDE)
    return decoders.from_json(stored, BundleOverride) if stored else None


def save_bundle_override(tx: Transaction, task: str, override: BundleOverride | None) -> None:
    if override is None:
        tx.delete_state(task, task_keys.BUNDLE_OVERRIDE)
    else:
        tx.save_state(task, task_keys.BUNDLE_OVERRIDE, msgspec.json.encode(override))


def load_quarantined(store: Store | Transaction, task: str) -> dict[str, QuarantinedBundle]:
    """Return the quarantined bundles of a task, by digest."""
    data = store.load_state(task, task_keys.QUARANTINED_BUNDLES) or b"{}"
    return decoders.from_json(data, dict[str, QuarantinedBundle])


def save_quarantined(tx: Transaction, task: str, quarantined: dict[str, QuarantinedBundle]) -> None:
    if quarantined:
        tx.save_state(task, task_keys.QUARANTINED_BUNDLES, msgspec.json.encode(quarantined))
    else:
        tx.delete_state(task, task_keys.QUARANTINED_BUNDLES)


def to_status(store: Store, task: str) -> dict[str, object]:
    """Return the members for status and health; none without overrides."""
    members: dict[str, object] = {}
    if is_paused(store, task):
        members["paused"] = True
    if (text := load_schedule(store, task)) is not None:
        members["schedule_override"] = text
    if (override := load_bundle_override(store, task)) is not None:
        members["rolled_out" if override.rollout else "rolled_back_to"] = override.digest
    if quarantined := load_quarantined(store, task):
        members["quarantined_bundles"] = sorted(quarantined)
    return members
