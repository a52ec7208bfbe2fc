"""What devices counted of two bundles over the same windows, as far as it can be believed.

A device cannot be made to say the truth, only to contradict itself less: a message whose sums cannot be those of any
windows is left out and counted, and of each device only the newest messages are held, so that a flood costs nothing but
its reading.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from agent.errors import MessageRefused
from agent.fleet.database import rollouts
from agent.fleet.database.interface import Connection
from agent.fleet.rollout.journal import Rollout
from agent.wire.messages import BundleStats, Moments, ShadowPayload, decode

MAX_BLOCKS = 200
# What is read in one go.
_CHUNK_ROWS = 2000
# What a batch and a window take in any model: beyond, a clock or a device is not right.
_MAX_BATCH_S, _MIN_WINDOW_S = 3600.0, 1e-9
_MAX_LABELLED = 1_000_000
# Of what is between 0 and 1, the squares around the mean are at most this each.
_MAX_VARIANCE = 0.25 * (1 + 1e-6)


class DeviceTallies(msgspec.Struct):
    """Messages of one device, oldest first: with the new bundle `beside` the old one, or `instead` of it."""

    as_shadow: deque[ShadowPayload] = msgspec.field(default_factory=lambda: deque(maxlen=MAX_BLOCKS))
    as_active: deque[ShadowPayload] = msgspec.field(default_factory=lambda: deque(maxlen=MAX_BLOCKS))
    implausible_count: int = 0
    implausible_reason: str = ""


class RolloutTallies:
    """Of one roll-out, by device; `read` again for what came since."""

    def __init__(self, rollout: Rollout) -> None:
        self._key = (rollout.name, rollout.plan.task, rollout.plan.digest)
        self._last_rowid = 0
        self.devices: dict[str, DeviceTallies] = {}

    def read_new(self, db: Connection) -> None:
        while rows := rollouts.load_shadows(db, *self._key, after=self._last_rowid, limit=_CHUNK_ROWS):
            for _, device, instead, body in rows:
                self._add_message(device, instead, body)
            self._last_rowid = rows[-1][0]

    def select_messages(self, devices: Iterable[str], *, new_is_shadow: bool) -> dict[str, list[ShadowPayload]]:
        """The messages of these devices that count, none of a device without any."""
        found = {}
        for device in devices:
            if (its := self.devices.get(device)) is not None and (
                blocks := its.as_shadow if new_is_shadow else its.as_active
            ):
                found[device] = list(blocks)
        return found

    def _add_message(self, device: str, new_is_active: bool, text: str) -> None:
        its = self.devices.setdefault(device, DeviceTallies())
        try:
            body = decode(text.encode(errors="surrogateescape"))
            problem = find_contradiction(body) if isinstance(body, ShadowPayload) else "it is no such message"
        except MessageRefused as refused:
            problem = str(refused)
        if problem:
            its.implausible_count += 1
            its.implausible_reason = problem
        elif isinstance(body, ShadowPayload):
            (its.as_active if new_is_active else its.as_shadow).append(body)


def find_contradiction(body: ShadowPayload) -> str:
    """Why these cannot be the sums of any windows; "" where they can.

    Windows that only one of the two answered are in no `n`, and labels may come long after their windows.
    """
    rows = body.rows[1] - body.rows[0] + 1
    if body.n > rows:
        return f"{body.n} windows of {rows} rows"
    if body.errors > body.batches:
        return f"{body.errors} of {body.batches} batches failed"
    if sum(body.labelled) > _MAX_LABELLED:
        return f"{sum(body.labelled)} labelled windows in one message"
    if body.difference.n > body.n or not _is_bounded(body.difference):
        return "the distance of the answers is none that windows can have"
    for whose, answered in (("model", body.answered), ("beside", body.other_stats)):
        if problem := _find_stats_problem(answered, rows, body.batches):
            return f"{whose}: {problem}"
    return ""


def _find_stats_problem(stats: BundleStats, rows: int, batches: int) -> str:
    if stats.windows > rows:
        return f"answered {stats.windows} windows of {rows} rows"
    if max(stats.scores.n, stats.expected.n) > stats.windows:
        return f"counts more than the {stats.windows} windows it answered"
    # Of no time at all nothing can be said, and nothing is.
    if stats.seconds and not stats.windows * _MIN_WINDOW_S <= stats.seconds <= batches * _MAX_BATCH_S:
        return f"took {stats.seconds:g} s for {stats.windows} windows"
    expected = stats.expected
    if expected.n and not (0 <= expected.mean <= 1 and expected.m2 <= _MAX_VARIANCE * expected.n):
        return "expects an accuracy that is no share"
    if not all(map(_is_bounded, (stats.scores, stats.abs_error))):
        return "has scores or errors that are no numbers"
    return ""


def _is_bounded(moments: Moments) -> bool:
    """Far enough from the largest number to be added up and squared."""
    return abs(moments.mean) < 1e100 and moments.m2 < 1e200
