"""Rollout state of a task, as stored, and the hold-offs of its bundles."""

from __future__ import annotations

import json
import logging
from typing import Any, Literal

import msgspec

from outstation.device.store import task_keys
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.protocol.wire.desired_state import DesiredBundle, Phase

log = logging.getLogger("outstation.updates")

Reason = Literal[
    "", "signature", "golden_vectors", "incompatible", "download_failed", "crash", "hang", "batch_timeout",
    "error_rate", "output_drift", "estimated_accuracy", "labels", "agreement", "latency", "operator",
    "aborted", "hold_off",
]  # fmt: skip

_MAX_HOLD_OFFS = 16


class RolloutState(msgspec.Struct, frozen=True, omit_defaults=True):
    """Phase of the desired bundle of a task, and why.

    - `detail`: a sentence for a person
    - `since`: wall time of the phase's begin; `since_s`: the same in the device's uptime
    - `configured_digest`: the bundle in the config when the phase began; with `is_locally_changed` the rollout stays
      cancelled for as long as that bundle is configured
    - `previous_history`: the bundle history from before the canary, as JSON
    """

    desired: DesiredBundle
    phase: Phase
    reason: Reason = ""
    detail: str = ""
    numbers: dict[str, Any] = {}
    since: str = ""
    since_s: float = 0.0
    late: bool = False
    configured_digest: str = ""
    is_locally_changed: bool = False
    previous_history: str = ""

    @property
    def audit_key(self) -> tuple[object, ...]:
        """Members whose change is worth an audit message."""
        wanted = self.desired
        return (wanted.rollout, wanted.digest, wanted.strategy, self.phase, self.reason, self.late)


class HoldOff(msgspec.Struct, frozen=True):
    """A bundle is not tried again before `until_s` of the device's uptime; `detail` is the reason."""

    until_s: float
    detail: str


def load_state(store: Store, task: str) -> RolloutState | None:
    """Return the state; None if no bundle was desired yet, or if it cannot be read."""
    stored = store.load_state(task, task_keys.ROLLOUT_STATE)
    try:
        return decoders.from_json(stored, RolloutState) if stored else None
    except msgspec.MsgspecError as damage:
        log.error("task %s: its rollout state cannot be read (%s); the rollout begins again", task, damage)
        return None


def find_canary_digest(store: Store, task: str) -> str:
    """Return the digest of the canary bundle of a task; empty if there is none."""
    state = load_state(store, task)
    return state.desired.digest if state is not None and state.phase == "canary" else ""


def save_state(tx: Transaction, task: str, state: RolloutState | None) -> None:
    if state is None:
        tx.delete_state(task, task_keys.ROLLOUT_STATE)
    else:
        tx.save_state(task, task_keys.ROLLOUT_STATE, msgspec.json.encode(state))


def load_hold_offs(store: Store | Transaction, task: str) -> dict[str, HoldOff]:
    """Return hold-offs by the bundle's digest, also those that have ended."""
    try:
        return decoders.from_json(store.load_state(task, task_keys.HOLD_OFFS) or b"{}", dict[str, HoldOff])
    except msgspec.MsgspecError:
        return {}


def add_hold_off(tx: Transaction, task: str, digest: str, hold_off: HoldOff, uptime_s: float) -> None:
    """Save a hold-off; drop those that have ended, and of too many those that end first."""
    known = load_hold_offs(tx, task).items()
    current = {name: other for name, other in known if other.until_s > uptime_s and name != digest}
    newest = sorted(current.items(), key=lambda item: item[1].until_s)[-(_MAX_HOLD_OFFS - 1) :]
    tx.save_state(task, task_keys.HOLD_OFFS, msgspec.json.encode({**dict(newest), digest: hold_off}))


def find_needed_digests(store: Store, task: str) -> set[str]:
    """Return the digests of bundles whose copies a rollout still needs."""
    state = load_state(store, task)
    if state is None or state.phase not in ("downloading", "shadow", "canary", "active"):
        return set()
    past = json.loads(state.previous_history) if state.previous_history else {}
    return {state.desired.digest, *(ref["digest"] for ref in past.values() if ref)}


def build_status(store: Store, task: str, device: str) -> dict[str, Any]:
    """Return the member for health and status; empty if no bundle is desired."""
    state = load_state(store, task)
    if state is None:
        return {}
    wanted = state.desired
    members = {
        "id": wanted.rollout,
        "strategy": wanted.strategy,
        "percent": wanted.percent,
        "selected": wanted.includes_device(device),
        "desired": {"name": wanted.bundle, "version": wanted.version, "digest": wanted.digest},
        "phase": state.phase,
        "reason": state.reason,
        "detail": state.detail,
        "since": state.since,
        "late": state.late,
    }
    return {"rollout": members}
