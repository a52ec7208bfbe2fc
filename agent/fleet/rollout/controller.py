"""Going on by itself: judge every open roll-out, promote, finish or abort it, and keep the broker told."""

from __future__ import annotations

from collections.abc import Callable

from agent import clock
from agent.errors import UsageError
from agent.fleet.database.interface import Connection
from agent.fleet.rollout import actions, journal
from agent.fleet.rollout.actions import RolloutOperator
from agent.fleet.rollout.journal import Rollout
from agent.fleet.rollout.look import RolloutSnapshot, load_snapshot
from agent.fleet.rollout.publisher import RolloutPublisher
from agent.fleet.rollout.tallies import RolloutTallies

# A broker that lost what it retained, or was given an older one, is told again so often.
REPUBLISH_EVERY_S = 60.0


class RolloutController:
    """`names`: the roll-outs to follow; None: all that are open. `say` hears each decision and each trouble."""

    def __init__(self, publisher: RolloutPublisher, names: list[str] | None, report: Callable[[str], None]) -> None:
        self._publisher, self._names, self._report = publisher, names, report
        self._tallies: dict[str, RolloutTallies] = {}
        # Every roll-out that was open at some turn.
        self.followed_names: set[str] = set()
        self._republish_at = 0.0
        self._publish_problem = ""
        self._last_problem = ""

    def tick(self, now_s: float) -> bool:
        """One look at all of them, and what follows; whether there is more to do. `now_s` never goes back."""
        looks = self._load_snapshots()
        for one in looks:
            self._advance(one)
        if self._publish_problem or now_s >= self._republish_at:
            self._republish_at = now_s + REPUBLISH_EVERY_S
            self._report_publish_problem(self._publisher.publish())
        return bool(looks or self._publish_problem)

    def _load_snapshots(self) -> list[RolloutSnapshot]:
        now_us = clock.read().wall_us
        with self._publisher.store.snapshot() as db:
            found = [
                one
                for one in journal.load_rollouts(db, only_open=True)
                if self._names is None or one.name in self._names
            ]
            self.followed_names.update(one.name for one in found)
            for name in set(self._tallies) - {one.name for one in found}:
                del self._tallies[name]
            return [
                load_snapshot(db, one, now_us, self._tallies.setdefault(one.name, RolloutTallies(one))) for one in found
            ]

    def _advance(self, snapshot: RolloutSnapshot) -> None:
        deed = _choose_action(snapshot)
        if deed is None:
            return
        # Should anything fail between the commit and the broker, the next turn publishes.
        self._republish_at = 0.0
        try:
            done, trouble = self._publisher.execute(deed)
        except UsageError as problem:
            # Somebody else decided in between, or the disk is full: the next turn sees.
            if str(problem) != self._last_problem:
                self._report(str(problem))
            self._last_problem = str(problem)
            return
        self._last_problem = ""
        self._report(f"{done.name}: {_latest_summary(self._publisher, done)}")
        self._report_publish_problem(trouble)

    def _report_publish_problem(self, problem: str) -> None:
        if problem and problem != self._publish_problem:
            self._report(f"not published yet, trying again: {problem}")
        elif self._publish_problem and not problem:
            self._report("published")
        self._publish_problem = problem


def _choose_action(snapshot: RolloutSnapshot) -> Callable[[Connection, RolloutOperator, int], Rollout] | None:
    rollout, verdict = snapshot.rollout, snapshot.verdict
    if verdict.outcome == "abort":
        return lambda db, who, counter: actions.abort(db, who, counter, rollout, verdict.summary, verdict)
    if verdict.outcome in ("promote", "finish") and rollout.state == "running":
        return lambda db, who, counter: actions.promote(db, who, counter, rollout, verdict)
    return None


def _latest_summary(publisher: RolloutPublisher, rollout: Rollout) -> str:
    with publisher.store.snapshot() as db:
        return str(journal.load_decision_rows(db, rollout.name)[-1][4])
