"""What devices counted of two bundles over the same windows, as far as it can be believed.

A device cannot be made to say the truth, only to contradict itself less: a message whose sums cannot be those of any
windows is left out and counted, and of each device only the newest messages are held, so that a flood costs nothing but
its reading.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from agent.errors import Refused
from agent.fleet.database.interface import Connection
from agent.fleet.rollout.journal import Rollout
from agent.wire.messages import Answered, Moments, Shadow, decode

MOST_BLOCKS = 200
# What is read in one go.
_CHUNK = 2000
_NEW = """
    SELECT rowid, device, model = :digest, body FROM shadows
    WHERE rollout = :rollout AND rowid > :after AND task = :task
      AND (model = :digest) <> (beside = :digest)
    ORDER BY rowid LIMIT :limit
"""
# What a batch and a window take in any model: beyond, a clock or a device is not right.
_BATCH_S, _WINDOW_S = 3600.0, 1e-9
_MOST_LABELLED = 1_000_000
# Of what is between 0 and 1, the squares around the mean are at most this each.
_MOST_SPREAD = 0.25 * (1 + 1e-6)


class OfDevice(msgspec.Struct):
    """Messages of one device, oldest first: with the new bundle `beside` the old one, or `instead` of it."""

    beside: deque[Shadow] = msgspec.field(default_factory=lambda: deque(maxlen=MOST_BLOCKS))
    instead: deque[Shadow] = msgspec.field(default_factory=lambda: deque(maxlen=MOST_BLOCKS))
    unbelievable: int = 0
    why: str = ""


class Tallies:
    """Of one roll-out, by device; `read` again for what came since."""

    def __init__(self, rollout: Rollout) -> None:
        self._names = {"rollout": rollout.name, "task": rollout.plan.task, "digest": rollout.plan.digest}
        self._after = 0
        self.devices: dict[str, OfDevice] = {}

    def read(self, db: Connection) -> None:
        while rows := db.execute(_NEW, {**self._names, "after": self._after, "limit": _CHUNK}).fetchall():
            for _, device, instead, body in rows:
                self._add(device, bool(instead), body)
            self._after = rows[-1][0]

    def blocks(self, devices: Iterable[str], *, beside: bool) -> dict[str, list[Shadow]]:
        """The messages of these devices that count, none of a device without any."""
        found = {}
        for device in devices:
            if (its := self.devices.get(device)) is not None and (blocks := its.beside if beside else its.instead):
                found[device] = list(blocks)
        return found

    def _add(self, device: str, instead: bool, text: str) -> None:
        its = self.devices.setdefault(device, OfDevice())
        try:
            body = decode(text.encode(errors="surrogateescape"))
            problem = contradiction(body) if isinstance(body, Shadow) else "it is no such message"
        except Refused as refused:
            problem = str(refused)
        if problem:
            its.unbelievable += 1
            its.why = problem
        elif isinstance(body, Shadow):
            (its.instead if instead else its.beside).append(body)


def contradiction(body: Shadow) -> str:
    """Why these cannot be the sums of any windows; "" where they can.

    Windows that only one of the two answered are in no `n`, and labels may come long after their windows.
    """
    rows = body.rows[1] - body.rows[0] + 1
    if body.n > rows:
        return f"{body.n} windows of {rows} rows"
    if body.errors > body.batches:
        return f"{body.errors} of {body.batches} batches failed"
    if sum(body.labelled) > _MOST_LABELLED:
        return f"{sum(body.labelled)} labelled windows in one message"
    if body.apart.n > body.n or not _finite(body.apart):
        return "the distance of the answers is none that windows can have"
    for whose, answered in (("model", body.answered), ("beside", body.answered_beside)):
        if problem := _of_one(answered, rows, body.batches):
            return f"{whose}: {problem}"
    return ""


def _of_one(answered: Answered, rows: int, batches: int) -> str:
    if answered.windows > rows:
        return f"answered {answered.windows} windows of {rows} rows"
    if max(answered.scores.n, answered.expected.n) > answered.windows:
        return f"counts more than the {answered.windows} windows it answered"
    # Of no time at all nothing can be said, and nothing is.
    if answered.seconds and not answered.windows * _WINDOW_S <= answered.seconds <= batches * _BATCH_S:
        return f"took {answered.seconds:g} s for {answered.windows} windows"
    expected = answered.expected
    if expected.n and not (0 <= expected.mean <= 1 and expected.m2 <= _MOST_SPREAD * expected.n):
        return "expects an accuracy that is no share"
    if not all(map(_finite, (answered.scores, answered.off))):
        return "has scores or errors that are no numbers"
    return ""


def _finite(moments: Moments) -> bool:
    """Far enough from the largest number to be added up and squared."""
    return abs(moments.mean) < 1e100 and moments.m2 < 1e200
