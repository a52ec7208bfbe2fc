"""Tallies of a roll-out: the plausible `shadow` messages of each device.

A device cannot be forced to tell the truth, only to be consistent: a message whose sums no windows can produce is
counted and left out. Only the newest messages of a device are kept, so a flood costs no more than reading it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from outstation.fleet.database import rollouts
from outstation.fleet.database.interface import Connection
from outstation.fleet.rollout.journal import Rollout
from outstation.foundation.errors import MessageRefused
from outstation.ml.comparison.tally import join_part
from outstation.protocol.wire.messages import BundleStats, ComparedOutput, Moments, ShadowPayload
from outstation.protocol.wire.verification import decode

MAX_BLOCKS = 200
_CHUNK_ROWS = 2000
# Bounds for the time of a batch and of a window in any model: beyond them a clock or a device is wrong.
_MAX_BATCH_S, _MIN_WINDOW_S = 3600.0, 1e-9
_MAX_LABELLED = 1_000_000
# The largest variance of values in [0, 1].
_MAX_VARIANCE = 0.25 * (1 + 1e-6)


class DeviceTallies(msgspec.Struct):
    """Messages of one device, oldest first, by the role of the new bundle."""

    as_shadow: deque[ShadowPayload] = msgspec.field(default_factory=lambda: deque(maxlen=MAX_BLOCKS))
    as_active: deque[ShadowPayload] = msgspec.field(default_factory=lambda: deque(maxlen=MAX_BLOCKS))
    implausible_count: int = 0
    implausible_reason: str = ""


class RolloutTallies:
    """Tallies of one roll-out by device. `read_new` adds what arrived since."""

    def __init__(self, rollout: Rollout) -> None:
        self._key = (rollout.name, rollout.plan.task, rollout.plan.digest)
        self._last_rowid = 0
        self.devices: dict[str, DeviceTallies] = {}

    def read_new(self, db: Connection) -> None:
        while rows := rollouts.load_shadows(db, *self._key, after=self._last_rowid, limit=_CHUNK_ROWS):
            for _, device, new_is_active, text in rows:
                tallies = self.devices.setdefault(device, DeviceTallies())
                try:
                    body = decode(text.encode(errors="surrogateescape"))
                    problem = find_contradiction(body) if isinstance(body, ShadowPayload) else "not a shadow message"
                except MessageRefused as refused:
                    problem = str(refused)
                if problem:
                    tallies.implausible_count += 1
                    tallies.implausible_reason = problem
                elif isinstance(body, ShadowPayload):
                    join_part(tallies.as_active if new_is_active else tallies.as_shadow, body)
            self._last_rowid = rows[-1][0]

    def select_messages(self, devices: Iterable[str], *, new_is_shadow: bool) -> dict[str, list[ShadowPayload]]:
        """Return the messages of `devices`, without devices that sent none."""
        selected = {}
        for device in devices:
            tallies = self.devices.get(device)
            if tallies is not None and (messages := tallies.as_shadow if new_is_shadow else tallies.as_active):
                selected[device] = list(messages)
        return selected


def find_contradiction(body: ShadowPayload) -> str:
    """Return why no windows can produce these sums; "" if they can.

    `n` excludes windows that only one bundle answered, and labels may arrive long after their windows.
    """
    rows = body.rows[1] - body.rows[0] + 1
    if body.errors > body.batches:
        return f"{body.errors} of {body.batches} batches failed"
    parts: dict[str, ShadowPayload | ComparedOutput] = {"": body, **body.outputs}
    for output, part in parts.items():
        if problem := _find_output_problem(part, rows, body.batches):
            return f"output {output}: {problem}" if output else problem
    return ""


def _find_output_problem(part: ShadowPayload | ComparedOutput, rows: int, batches: int) -> str:
    if part.n > rows:
        return f"{part.n} windows of {rows} rows"
    if sum(part.labelled) > _MAX_LABELLED:
        return f"{sum(part.labelled)} labelled windows in one message"
    if part.difference.n > part.n or not _is_bounded(part.difference):
        return "the differences of scores or values are out of range"
    for name, stats in (("model", part.stats), ("other", part.other_stats)):
        if problem := _find_stats_problem(stats, rows, batches):
            return f"{name}: {problem}"
    return ""


def _find_stats_problem(stats: BundleStats, rows: int, batches: int) -> str:
    if stats.windows > rows:
        return f"answered {stats.windows} windows of {rows} rows"
    if max(stats.scores.n, stats.expected_accuracy.n, stats.expected_error.n) > stats.windows:
        return f"has more scores than the {stats.windows} windows it answered"
    # A time of 0 means unknown.
    if stats.seconds and not stats.windows * _MIN_WINDOW_S <= stats.seconds <= batches * _MAX_BATCH_S:
        return f"took {stats.seconds:g} s for {stats.windows} windows"
    expected = stats.expected_accuracy
    if expected.n and not (0 <= expected.mean <= 1 and expected.m2 <= _MAX_VARIANCE * expected.n):
        return "expects an accuracy outside 0 to 1"
    if not all(map(_is_bounded, (stats.scores, stats.abs_error, stats.expected_error))):
        return "has scores or errors that are out of range"
    if min(stats.abs_error.mean, stats.expected_error.mean) < 0:
        return "has absolute errors below 0"
    return ""


def _is_bounded(moments: Moments) -> bool:
    """Return True if sums and squares of the values cannot overflow."""
    return abs(moments.mean) < 1e100 and moments.m2 < 1e200
