"""What operators, or crashes, have changed about a task, kept in the store until somebody changes it back."""

from __future__ import annotations

import json

import msgspec
from msgspec.structs import asdict

from agent.config import Config
from agent.device.machine import schedule
from agent.device.store import task_keys
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import ConfigError


class BundleOverride(msgspec.Struct, frozen=True):
    """Run bundle `digest` instead of the configured one, for as long as that is `configured`: both digests.

    Because roll-out `rollout` wants it; where that is empty, because of an operator's word or of crashes.
    """

    digest: str
    configured: str
    rollout: str = ""


class QuarantinedBundle(msgspec.Struct, frozen=True):
    """Why a bundle is not run, for as long as the digest of the configured one is `configured`."""

    reason: str
    configured: str


def is_paused(store: Store, task: str) -> bool:
    return store.load_state(task, task_keys.PAUSED) is not None


def load_schedule(store: Store, task: str) -> str | None:
    """The schedule that an operator set instead of the configured one."""
    text = store.load_state(task, task_keys.SCHEDULE_OVERRIDE)
    return None if text is None else text.decode()


def effective_schedule(file: str, conf: Config, store: Store, task: str, last_us: int | None) -> schedule.Schedule:
    """By the operator's word, or by the config. Raises ConfigError where the config's cannot be read."""
    text = load_schedule(store, task)
    if text is not None:
        try:
            return schedule.parse(file, task, text, last_us)
        except ConfigError:
            # One that an earlier version took must not keep the device from starting.
            pass
    return schedule.parse(file, task, conf.tasks[task].schedule, last_us)


def load_bundle_override(store: Store, task: str) -> BundleOverride | None:
    kept = store.load_state(task, task_keys.BUNDLE_OVERRIDE)
    return BundleOverride(**json.loads(kept)) if kept else None


def save_bundle_override(tx: Transaction, task: str, override: BundleOverride | None) -> None:
    if override is None:
        tx.delete_state(task, task_keys.BUNDLE_OVERRIDE)
    else:
        # Left out where it is empty: an earlier version of the agent knows no roll-outs.
        kept = {name: value for name, value in asdict(override).items() if value or name != "rollout"}
        tx.save_state(task, task_keys.BUNDLE_OVERRIDE, json.dumps(kept).encode())


def load_quarantined(store: Store, task: str) -> dict[str, QuarantinedBundle]:
    """Bundles that are not run for `task`, by digest."""
    return _decode_quarantined(store.load_state(task, task_keys.QUARANTINED_BUNDLES))


def load_quarantined_in_tx(tx: Transaction, task: str) -> dict[str, QuarantinedBundle]:
    return _decode_quarantined(tx.load_state(task, task_keys.QUARANTINED_BUNDLES))


def _decode_quarantined(data: bytes | None) -> dict[str, QuarantinedBundle]:
    return {digest: QuarantinedBundle(**one) for digest, one in json.loads(data or b"{}").items()}


def save_quarantined(tx: Transaction, task: str, quarantined: dict[str, QuarantinedBundle]) -> None:
    if quarantined:
        kept = {digest: asdict(one) for digest, one in quarantined.items()}
        tx.save_state(task, task_keys.QUARANTINED_BUNDLES, json.dumps(kept).encode())
    else:
        tx.delete_state(task, task_keys.QUARANTINED_BUNDLES)


def to_status(store: Store, task: str) -> dict[str, object]:
    """Members for status and health; none where nothing was changed."""
    members: dict[str, object] = {}
    if is_paused(store, task):
        members["paused"] = True
    if (text := load_schedule(store, task)) is not None:
        members["schedule_override"] = text
    if (rolled := load_bundle_override(store, task)) is not None:
        members["rolled_out" if rolled.rollout else "rolled_back_to"] = rolled.digest
    if aside := load_quarantined(store, task):
        members["quarantined_bundles"] = sorted(aside)
    return members
