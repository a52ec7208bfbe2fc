"""How a task stands with what is desired of it, as it is kept in the store, and what of bundles is held."""

from __future__ import annotations

import json
import logging
from typing import Any, Literal

import msgspec

from agent.device.store import task_keys
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.wire.desired_state import DesiredBundle, Phase

log = logging.getLogger("outstation.updates")

Reason = Literal[
    "", "signature", "golden_vectors", "incompatible", "download_failed", "crash", "hang", "batch_timeout", "error_rate",
    "output_drift", "estimated_accuracy", "labels", "agreement", "latency", "operator", "aborted", "hold_off",
]  # fmt: skip

# Names in table state.
_MAX_HOLD_OFFS = 16


class RolloutState(msgspec.Struct, frozen=True, omit_defaults=True):
    """`why` is a sentence for a person. `since` is a time of the wall clock, `since_s` of the device's uptime.

    `configured`: digest of the bundle in the config when this phase began; `changed_here`: it is withdrawn for as long
    as that is the one. `past`: what ran for the task before it was on probation, as `kept` writes it.
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
        """What an audit message says anew when it changes."""
        wanted = self.desired
        return (wanted.rollout, wanted.digest, wanted.strategy, self.phase, self.reason, self.late)


class HoldOff(msgspec.Struct, frozen=True):
    """A bundle is not tried before `until_s` of the device's uptime; `why` is what it was taken back for."""

    until_s: float
    detail: str


def load_state(store: Store, task: str) -> RolloutState | None:
    """None where nothing was desired of it yet, or what was kept cannot be read."""
    found = store.load_state(task, task_keys.ROLLOUT_STATE)
    try:
        return msgspec.json.decode(found, type=RolloutState) if found else None
    except msgspec.MsgspecError as damage:
        log.error("task %s: how its roll-out stands cannot be read (%s); it begins anew", task, damage)
        return None


def find_canary_digest(store: Store, task: str) -> str:
    """The digest of the bundle that is on probation for `task`; "" where none is."""
    one = load_state(store, task)
    return one.desired.digest if one is not None and one.phase == "canary" else ""


def save_state(tx: Transaction, task: str, state: RolloutState | None) -> None:
    if state is None:
        tx.delete_state(task, task_keys.ROLLOUT_STATE)
    else:
        tx.save_state(task, task_keys.ROLLOUT_STATE, msgspec.json.encode(state))


def load_hold_offs(store: Store, task: str) -> dict[str, HoldOff]:
    """Bundles that were taken back or refused, by digest; those whose time is over, too."""
    try:
        return msgspec.json.decode(store.load_state(task, task_keys.HOLD_OFFS) or b"{}", type=dict[str, HoldOff])
    except msgspec.MsgspecError:
        return {}


def add_hold_off(tx: Transaction, task: str, digest: str, hold_off: HoldOff, uptime_s: float) -> None:
    """Also forgets whose time is over, and of very many those that end first."""
    try:
        known = msgspec.json.decode(tx.load_state(task, task_keys.HOLD_OFFS) or b"{}", type=dict[str, HoldOff])
    except msgspec.MsgspecError:
        known = {}
    current = {name: other for name, other in known.items() if other.until_s > uptime_s and name != digest}
    newest = sorted(current.items(), key=lambda item: item[1].until_s)[-(_MAX_HOLD_OFFS - 1) :]
    tx.save_state(task, task_keys.HOLD_OFFS, msgspec.json.encode({**dict(newest), digest: hold_off}))


def find_needed_digests(store: Store, task: str) -> set[str]:
    """Bundles whose copies a roll-out still needs."""
    one = load_state(store, task)
    if one is None or one.phase not in ("downloading", "shadow", "canary", "active"):
        return set()
    past = json.loads(one.previous_history) if one.previous_history else {}
    return {one.desired.digest, *(ran["digest"] for ran in past.values() if ran)}


def build_status(store: Store, task: str, device: str) -> dict[str, Any]:
    """Members for status and health; none where nothing is desired."""
    one = load_state(store, task)
    if one is None:
        return {}
    wanted = one.desired
    told = {
        "id": wanted.rollout,
        "strategy": wanted.strategy,
        "percent": wanted.percent,
        "selected": wanted.includes_device(device),
        "desired": {"name": wanted.bundle, "version": wanted.version, "digest": wanted.digest},
        "phase": one.phase,
        "reason": one.reason,
        "detail": one.detail,
        "since": one.since,
        "late": one.late,
    }
    return {"rollout": told}
