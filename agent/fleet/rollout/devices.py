"""The devices of a roll-out: who it is for, and how far each one says that it came.

Only devices that may sign now count: what a stolen device says is no evidence. Whom a group has is in the configs of
its devices, so of a group only those are known that say something of the roll-out.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from agent.fleet.database.interface import Connection
from agent.fleet.rollout.journal import Rollout

NOT_HEARD_OF = "not heard of"
# Reasons that are no failure of the bundle: it is for other devices, somebody decided so, or it is tried again.
_NO_FAILURE = frozenset({"unfit", "operator", "aborted", "fetch", "held"})
_PASSING = frozenset({"fetch", "held"})
_FAILED = frozenset({"refused", "rolled back"})

# The last word of a device is that of its newest log.
_MEMBERS = """
    WITH said AS (
        SELECT c.device, c.phase, c.reason, c.summary, c.time, c.strategy,
               row_number() OVER (PARTITION BY c.device ORDER BY l.rowid DESC, c.seq DESC) AS nth
        FROM rollout_devices c JOIN logs l ON l.device = c.device AND l.log = c.log
        WHERE c.rollout = :rollout AND c.task = :task AND c.digest = :digest)
    SELECT d.device, d.last_seen, s.phase, s.reason, s.summary, s.time, s.strategy
    FROM devices d LEFT JOIN said s ON s.device = d.device AND s.nth = 1
    WHERE EXISTS (SELECT 1 FROM keys k WHERE k.device = d.device AND k.revoked IS NULL AND k.through IS NULL)
    ORDER BY d.device
"""


class Member(msgspec.Struct, frozen=True):
    """A device that the roll-out is for. `phase`: what it said last, `not heard of` before it said anything."""

    device: str
    last_seen: str | None
    phase: str
    reason: str = ""
    summary: str = ""
    since: str | None = None
    strategy: str | None = None

    @property
    def failed(self) -> bool:
        """Whether it refused the bundle, or took it back."""
        return self.phase in _FAILED and self.reason not in _NO_FAILURE

    @property
    def there(self) -> bool:
        """Whether it came to an end, whichever."""
        ended = self.phase in ("settled", "refused", "rolled back", "withdrawn")
        return ended and not (self.phase == "refused" and self.reason in _PASSING)

    @property
    def left_out(self) -> bool:
        """Whether it says that the bundle is not for it."""
        return self.phase == "refused" and self.reason == "unfit"


class Members(msgspec.Struct, frozen=True):
    """Of one step: `chosen` devices, those of them that `join` with it, and the `others`."""

    chosen: list[Member] = msgspec.field(default_factory=list)
    joining: frozenset[str] = frozenset()
    others: list[Member] = msgspec.field(default_factory=list)

    @property
    def heard(self) -> list[Member]:
        """Chosen devices that said something and are not left out."""
        return [one for one in self.chosen if one.phase != NOT_HEARD_OF and not one.left_out]

    @property
    def failed(self) -> list[Member]:
        return [one for one in self.chosen if one.failed]

    def phases(self) -> dict[str, int]:
        """How many of the chosen are in each phase."""
        found: dict[str, int] = {}
        for one in self.chosen:
            found[one.phase] = found.get(one.phase, 0) + 1
        return dict(sorted(found.items()))


def members(db: Connection, rollout: Rollout) -> Members:
    """Of the step that the roll-out is at."""
    plan = rollout.plan
    names = {"rollout": rollout.name, "task": plan.task, "digest": plan.digest}
    known = [
        Member(device, seen, phase or NOT_HEARD_OF, reason or "", summary or "", since, strategy)
        for device, seen, phase, reason, summary, since, strategy in db.execute(_MEMBERS, names)
    ]
    kind, _, whom = plan.to.partition(":")
    meant = [one for one in known if _is_meant(one, kind, whom)]
    wanted = plan.wanted(rollout.step)
    chosen = [one for one in meant if wanted.chosen(one.device)]
    there = _before(rollout)
    joining = frozenset(one.device for one in chosen if not there(one.device))
    return Members(chosen, joining, [one for one in meant if not wanted.chosen(one.device)])


def enrolled(db: Connection) -> list[str]:
    """Devices that may sign."""
    sql = "SELECT DISTINCT device FROM keys WHERE revoked IS NULL AND through IS NULL ORDER BY device"
    return [str(row[0]) for row in db.execute(sql)]


def _is_meant(one: Member, kind: str, whom: str) -> bool:
    if kind == "group":
        return one.phase != NOT_HEARD_OF
    return kind == "all" or one.device == whom


def _before(rollout: Rollout) -> Callable[[str], bool]:
    """Whether a device was in this already at the step before: beside the old bundle, or instead of it."""
    steps = rollout.plan.steps
    here, before = rollout.step, rollout.step - 1
    if before < 1 or (steps[before - 1].strategy == "shadow") != (steps[here - 1].strategy == "shadow"):
        return lambda _: False
    return rollout.plan.wanted(before).chosen
