"""What operators, or crashes, have changed about a task, kept in the store until somebody changes it back."""

from __future__ import annotations

import json

import msgspec
from msgspec.structs import asdict

from agent.config import Config
from agent.device.machine import schedule
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import ConfigError

PAUSED, SCHEDULE, ROLLBACK = "paused", "schedule", "rollback"
SET_ASIDE, CRASHES = "set aside", "crashes"


class Rollback(msgspec.Struct, frozen=True):
    """Run bundle `digest` instead of the configured one, for as long as that is `configured`: both digests.

    Because roll-out `rollout` wants it; where that is empty, because of an operator's word or of crashes.
    """

    digest: str
    configured: str
    rollout: str = ""


class Aside(msgspec.Struct, frozen=True):
    """Why a bundle is not run, for as long as the digest of the configured one is `configured`."""

    why: str
    configured: str


def is_paused(store: Store, task: str) -> bool:
    return store.state(task, PAUSED) is not None


def scheduled(store: Store, task: str) -> str | None:
    """The schedule that an operator set instead of the configured one."""
    text = store.state(task, SCHEDULE)
    return None if text is None else text.decode()


def schedule_in_force(file: str, conf: Config, store: Store, task: str, last_us: int | None) -> schedule.Schedule:
    """By the operator's word, or by the config. Raises ConfigError where the config's cannot be read."""
    text = scheduled(store, task)
    if text is not None:
        try:
            return schedule.parse(file, task, text, last_us)
        except ConfigError:
            # One that an earlier version took must not keep the device from starting.
            pass
    return schedule.parse(file, task, conf.tasks[task].schedule, last_us)


def rollback(store: Store, task: str) -> Rollback | None:
    kept = store.state(task, ROLLBACK)
    return Rollback(**json.loads(kept)) if kept else None


def keep_rollback(tx: Transaction, task: str, wanted: Rollback | None) -> None:
    if wanted is None:
        tx.drop(task, ROLLBACK)
    else:
        # Left out where it is empty: an earlier version of the agent knows no roll-outs.
        kept = {name: value for name, value in asdict(wanted).items() if value or name != "rollout"}
        tx.keep(task, ROLLBACK, json.dumps(kept).encode())


def set_aside(store: Store, task: str) -> dict[str, Aside]:
    """Bundles that are not run for `task`, by digest."""
    return _asides(store.state(task, SET_ASIDE))


def set_aside_in(tx: Transaction, task: str) -> dict[str, Aside]:
    return _asides(tx.kept(task, SET_ASIDE))


def _asides(kept: bytes | None) -> dict[str, Aside]:
    return {digest: Aside(**one) for digest, one in json.loads(kept or b"{}").items()}


def keep_set_aside(tx: Transaction, task: str, aside: dict[str, Aside]) -> None:
    if aside:
        kept = {digest: asdict(one) for digest, one in aside.items()}
        tx.keep(task, SET_ASIDE, json.dumps(kept).encode())
    else:
        tx.drop(task, SET_ASIDE)


def shown(store: Store, task: str) -> dict[str, object]:
    """Members for status and health; none where nothing was changed."""
    members: dict[str, object] = {}
    if is_paused(store, task):
        members["paused"] = True
    if (text := scheduled(store, task)) is not None:
        members["schedule_set"] = text
    if (rolled := rollback(store, task)) is not None:
        members["rolled_out" if rolled.rollout else "rolled_back_to"] = rolled.digest
    if aside := set_aside(store, task):
        members["set_aside"] = sorted(aside)
    return members
