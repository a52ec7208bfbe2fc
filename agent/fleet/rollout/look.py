"""A roll-out as it stands: its devices, its tallies and what follows from them."""

from __future__ import annotations

import msgspec

from agent.fleet.database.interface import Connection
from agent.fleet.rollout import journal
from agent.fleet.rollout.devices import Members, members
from agent.fleet.rollout.journal import Rollout
from agent.fleet.rollout.promotion import Verdict, judge
from agent.fleet.rollout.tallies import Tallies


class Look(msgspec.Struct, frozen=True):
    """`began`: when the step it is at did."""

    rollout: Rollout
    members: Members
    tallies: Tallies
    verdict: Verdict
    began: str


def look(db: Connection, rollout: Rollout, now_us: int, tallies: Tallies | None = None) -> Look:
    """Inside a snapshot; `tallies` of an earlier look are gone on with."""
    tallies = tallies or Tallies(rollout)
    tallies.read(db)
    its, began = members(db, rollout), journal.began(db, rollout.name)
    return Look(rollout, its, tallies, judge(rollout, its, tallies, began, now_us), began)
