"""What drift detection knows with the bundle that ran, laid by while another one is on probation, and taken up again.

While the other one runs, its own detection begins from nothing under the usual names. So a bundle that is taken back
costs the site neither the reference it learned nor what was gathered since; alerts that were open stay so until it is
known which of the two stays.
"""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from agent.clock import Now
from agent.device.pipeline import drift_state
from agent.device.pipeline.drift_state import LEARNING, SITE, STATE, Ended
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.drift.monitor import Judge
from agent.drift.state import State

_NAMES = (STATE, LEARNING, SITE)
_ASIDE = " before probation"


def lay_by(tx: Transaction, task: str) -> None:
    for name in _NAMES:
        tx.drop(task, name + _ASIDE)
        tx.rename(task, name, name + _ASIDE)


def take_up(tx: Transaction, author: Author, task: str, now: Now) -> None:
    """The bundle before runs again: what was found with the other one is over."""
    ended = _ended(tx, task, "", "its bundle was taken back")
    for name in _NAMES:
        tx.drop(task, name)
        tx.rename(task, name + _ASIDE, name)
    for kind, body in ended.messages if ended is not None else ():
        if kind == "alerts":
            author.write(tx, kind, task, body, now)


def give_up(tx: Transaction, author: Author, task: str, now: Now) -> None:
    """The other one stays: nothing that was learned with the one before holds for it."""
    ended = _ended(tx, task, _ASIDE, "the bundle was changed")
    for name in _NAMES:
        tx.drop(task, name + _ASIDE)
    if ended is not None:
        drift_state.say(tx, author, task, ended, now)


def restore(store: Store, task: str, judge: Judge) -> tuple[State, Ended | None]:
    """What the bundle before, now beside the other one, remembers."""
    past = store.state(task, STATE + _ASIDE)
    if past is None:
        return judge.start(), None
    try:
        return judge.restore(past, store.state(task, LEARNING + _ASIDE), store.state(task, SITE + _ASIDE)), None
    except ValueError:
        return judge.start(), None


def numbered_on(state: State, *others: State | None) -> State:
    """With alerts named after those of `others`: no name is used twice."""
    most = max([0, *(int(one.raised.max(initial=0)) for one in others if one is not None)])
    return replace(state, raised=np.maximum(state.raised, most))


def _ended(tx: Transaction, task: str, where: str, why: str) -> Ended | None:
    found = tx.kept(task, STATE + where)
    return None if found is None else drift_state.ended(task, found, tx.kept(task, SITE + where), why)
