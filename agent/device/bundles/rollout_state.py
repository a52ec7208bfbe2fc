"""How a task stands with what is desired of it, as it is kept in the store, and what of bundles is held."""

from __future__ import annotations

import json
import logging
from typing import Any, Literal

import msgspec

from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.wire.desired_state import Wanted

log = logging.getLogger("outstation.updates")

Phase = Literal["not chosen", "fetching", "refused", "shadow", "probation", "settled", "rolled back", "withdrawn"]
Reason = Literal[
    "", "signature", "golden", "unfit", "fetch", "crash", "hang", "batch time", "errors", "output drift", "estimate",
    "labels", "agreement", "latency", "operator", "aborted", "held",
]  # fmt: skip

# Names in table state.
STANDING, HELD = "rollout", "held bundles"
_MOST_HELD = 16


class Standing(msgspec.Struct, frozen=True, omit_defaults=True):
    """`why` is a sentence for a person. `since` is a time of the wall clock, `since_s` of the device's uptime.

    `configured`: digest of the bundle in the config when this phase began; `changed_here`: it is withdrawn for as long
    as that is the one. `past`: what ran for the task before it was on probation, as `kept` writes it.
    """

    wanted: Wanted
    phase: Phase
    reason: Reason = ""
    why: str = ""
    numbers: dict[str, Any] = {}
    since: str = ""
    since_s: float = 0.0
    late: bool = False
    configured: str = ""
    changed_here: bool = False
    past: str = ""

    @property
    def said(self) -> tuple[object, ...]:
        """What an audit message says anew when it changes."""
        wanted = self.wanted
        return (wanted.rollout, wanted.digest, wanted.strategy, self.phase, self.reason, self.late)


class Held(msgspec.Struct, frozen=True):
    """A bundle is not tried before `until_s` of the device's uptime; `why` is what it was taken back for."""

    until_s: float
    why: str


def standing(store: Store, task: str) -> Standing | None:
    """None where nothing was desired of it yet, or what was kept cannot be read."""
    found = store.state(task, STANDING)
    try:
        return msgspec.json.decode(found, type=Standing) if found else None
    except msgspec.MsgspecError as damage:
        log.error("task %s: how its roll-out stands cannot be read (%s); it begins anew", task, damage)
        return None


def on_probation(store: Store, task: str) -> str:
    """The digest of the bundle that is on probation for `task`; "" where none is."""
    one = standing(store, task)
    return one.wanted.digest if one is not None and one.phase == "probation" else ""


def keep_standing(tx: Transaction, task: str, one: Standing | None) -> None:
    if one is None:
        tx.drop(task, STANDING)
    else:
        tx.keep(task, STANDING, msgspec.json.encode(one))


def held(store: Store, task: str) -> dict[str, Held]:
    """Bundles that were taken back or refused, by digest; those whose time is over, too."""
    try:
        return msgspec.json.decode(store.state(task, HELD) or b"{}", type=dict[str, Held])
    except msgspec.MsgspecError:
        return {}


def hold(tx: Transaction, task: str, digest: str, one: Held, at_s: float) -> None:
    """Also forgets whose time is over, and of very many those that end first."""
    try:
        known = msgspec.json.decode(tx.kept(task, HELD) or b"{}", type=dict[str, Held])
    except msgspec.MsgspecError:
        known = {}
    current = {name: other for name, other in known.items() if other.until_s > at_s and name != digest}
    newest = sorted(current.items(), key=lambda item: item[1].until_s)[-(_MOST_HELD - 1) :]
    tx.keep(task, HELD, msgspec.json.encode({**dict(newest), digest: one}))


def digests(store: Store, task: str) -> set[str]:
    """Bundles whose copies a roll-out still needs."""
    one = standing(store, task)
    if one is None or one.phase not in ("fetching", "shadow", "probation", "settled"):
        return set()
    past = json.loads(one.past) if one.past else {}
    return {one.wanted.digest, *(ran["digest"] for ran in past.values() if ran)}


def shown(store: Store, task: str, device: str) -> dict[str, Any]:
    """Members for status and health; none where nothing is desired."""
    one = standing(store, task)
    if one is None:
        return {}
    wanted = one.wanted
    told = {
        "id": wanted.rollout,
        "strategy": wanted.strategy,
        "percent": wanted.percent,
        "chosen": wanted.chosen(device),
        "wants": {"name": wanted.bundle, "version": wanted.version, "digest": wanted.digest},
        "phase": one.phase,
        "reason": one.reason,
        "why": one.why,
        "since": one.since,
        "late": one.late,
    }
    return {"rollout": told}
