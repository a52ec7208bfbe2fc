"""Going on by itself: judge every open roll-out, promote, finish or abort it, and keep the broker told."""

from __future__ import annotations

from collections.abc import Callable

from agent import clock
from agent.errors import UsageError
from agent.fleet.database.interface import Connection
from agent.fleet.rollout import actions, journal
from agent.fleet.rollout.actions import Operator
from agent.fleet.rollout.journal import Rollout
from agent.fleet.rollout.look import Look, look
from agent.fleet.rollout.publisher import Desk
from agent.fleet.rollout.tallies import Tallies

# A broker that lost what it retained, or was given an older one, is told again so often.
TELL_EVERY_S = 60.0


class Follower:
    """`names`: the roll-outs to follow; None: all that are open. `say` hears each decision and each trouble."""

    def __init__(self, desk: Desk, names: list[str] | None, say: Callable[[str], None]) -> None:
        self._desk, self._names, self._say = desk, names, say
        self._tallies: dict[str, Tallies] = {}
        # Every roll-out that was open at some turn.
        self.followed: set[str] = set()
        self._tell_at = 0.0
        self._trouble = ""
        self._problem = ""

    def turn(self, now_s: float) -> bool:
        """One look at all of them, and what follows; whether there is more to do. `now_s` never goes back."""
        looks = self._looks()
        for one in looks:
            self._follow(one)
        if self._trouble or now_s >= self._tell_at:
            self._tell_at = now_s + TELL_EVERY_S
            self._told(self._desk.publish())
        return bool(looks or self._trouble)

    def _looks(self) -> list[Look]:
        now_us = clock.read().wall_us
        with self._desk.store.snapshot() as db:
            found = [
                one for one in journal.rollouts(db, only_open=True) if self._names is None or one.name in self._names
            ]
            self.followed.update(one.name for one in found)
            for name in set(self._tallies) - {one.name for one in found}:
                del self._tallies[name]
            return [look(db, one, now_us, self._tallies.setdefault(one.name, Tallies(one))) for one in found]

    def _follow(self, seen: Look) -> None:
        deed = _deed(seen)
        if deed is None:
            return
        # Should anything fail between the commit and the broker, the next turn publishes.
        self._tell_at = 0.0
        try:
            done, trouble = self._desk.act(deed)
        except UsageError as problem:
            # Somebody else decided in between, or the disk is full: the next turn sees.
            if str(problem) != self._problem:
                self._say(str(problem))
            self._problem = str(problem)
            return
        self._problem = ""
        self._say(f"{done.name}: {_newest(self._desk, done)}")
        self._told(trouble)

    def _told(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            self._say(f"not published yet, trying again: {trouble}")
        elif self._trouble and not trouble:
            self._say("published")
        self._trouble = trouble


def _deed(seen: Look) -> Callable[[Connection, Operator, int], Rollout] | None:
    rollout, verdict = seen.rollout, seen.verdict
    if verdict.answer == "abort":
        return lambda db, who, counter: actions.abort(db, who, counter, rollout, verdict.summary, verdict)
    if verdict.answer in ("promote", "finish") and rollout.state == "running":
        return lambda db, who, counter: actions.promote(db, who, counter, rollout, verdict)
    return None


def _newest(desk: Desk, rollout: Rollout) -> str:
    with desk.store.snapshot() as db:
        return str(journal.decided(db, rollout.name)[-1][4])
