"""A task's drift state in the store: how it is kept, found again, and what of an earlier bundle's is put right.

What is gathered while learning, and the site's reference, are kept apart: they are large, and seldom others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.clock import Now
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.drift.baseline.learning import Learning
from agent.drift.monitor import Judge
from agent.drift.state import State
from agent.drift.testing.test_suite import JOINT, OUTPUT, SCORE

STATE, LEARNING, SITE = "drift", "learning", "site reference"


class Ended(msgspec.Struct, frozen=True):
    """`messages` (kind, body) that say what is no more."""

    messages: list[tuple[str, dict[str, Any]]]


def keep(tx: Transaction, task: str, judge: Judge, state: State, before: State | None) -> None:
    """`before` is what was kept last, if anything was."""
    tx.keep(task, STATE, judge.to_bytes(state))
    if before is None or before.learning is not state.learning:
        tx.keep(task, LEARNING, state.learning.to_bytes())
    if before is not None and before.site is state.site:
        return
    if state.site is None:
        tx.drop(task, SITE)
    else:
        tx.keep(task, SITE, state.site.to_json())


def restore(store: Store, task: str, judge: Judge) -> tuple[State, Ended | None]:
    """What is remembered of the task; and what another bundle had begun, to end with the next state that is kept."""
    past = store.state(task, STATE)
    if past is None:
        return judge.start(), None
    try:
        return judge.restore(past, store.state(task, LEARNING), store.state(task, SITE)), None
    except ValueError:
        return _anew(task, judge.start(), past, store.state(task, SITE))


def seen(store: Store, task: str) -> State | None:
    """The same for people, whatever bundle it is of; None where there is nothing to read."""
    past, learning = store.state(task, STATE), store.state(task, LEARNING)
    try:
        state = None if past is None else State.joined(past, store.state(task, SITE))
        return state and (state if learning is None else replace(state, learning=Learning.from_bytes(learning)))
    except ValueError:
        return None


def end(tx: Transaction, author: Author, task: str, ended: Ended, now: Now) -> None:
    tx.drop(task, LEARNING)
    tx.drop(task, SITE)
    say(tx, author, task, ended, now)


def say(tx: Transaction, author: Author, task: str, ended: Ended, now: Now) -> None:
    for kind, body in ended.messages:
        author.write(tx, kind, task if kind == "alerts" else None, body, now)


def ended(task: str, past: bytes, site: bytes | None, why: str) -> Ended:
    """What is to be said when nothing that this state knows holds any more, because of `why`."""
    try:
        old = State.joined(past, site)
    except ValueError:
        return Ended([])
    messages: list[tuple[str, dict[str, Any]]] = [("alerts", body) for body in _open_alerts(task, old, why)]
    if old.site is not None:
        summary = f"{task}: {why}, so this site's reference is learned anew."
        evidence = {"task": task, "asked": "bundle changed", "site": old.site.digest, "by": "the agent"}
        messages.append(("audit", {"event": "reference reset", "summary": summary, "evidence": evidence}))
    return Ended(messages)


def _anew(task: str, start: State, past: bytes, site: bytes | None) -> tuple[State, Ended]:
    """Nothing that was learned for another bundle holds for this one."""
    said = ended(task, past, site, "the bundle, or the agent, was changed")
    try:
        old = State.from_bytes(past)
    except ValueError:
        return start, said
    # Names of alerts are never used twice.
    raised = np.full_like(start.raised, old.raised.max(initial=0))
    return replace(start, raised=raised, learned=old.learned), said


def _open_alerts(task: str, old: State, why: str) -> Iterator[dict[str, Any]]:
    """Cleared: what they were against is gone."""
    subjects = (*old.fields, OUTPUT, SCORE, JOINT)
    kinds = ("drift", old.detectors.open_subjects), ("fault", old.faulty)
    for column, (kind, is_open) in enumerate(kinds):
        for i in np.flatnonzero(is_open).tolist():
            yield {
                "alert": kind,
                "subject": subjects[i],
                "state": "cleared",
                "severity": "info",
                "id": f"{task}/{subjects[i]}/{kind}/{old.raised[i, column]}",
                "summary": f"{subjects[i]}: no longer watched as before: {why}.",
                "evidence": {},
            }
