"""Roll-out controller: evaluate every open roll-out, promote, finish or abort it, and republish the desired state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from outstation.fleet.database import rollouts
from outstation.fleet.rollout import actions, journal
from outstation.fleet.rollout.publisher import RolloutAction, RolloutPublisher
from outstation.fleet.rollout.rollout_status import RolloutSnapshot, load_snapshot
from outstation.fleet.rollout.tallies import RolloutTallies
from outstation.foundation import clock
from outstation.foundation.errors import UsageError

# A broker may lose retained messages, or be restored from an older backup.
REPUBLISH_EVERY_S = 60.0


class RolloutController:
    """Controller of the roll-outs `names`, or of all open ones. `report` gets each decision and each error."""

    def __init__(self, publisher: RolloutPublisher, names: list[str] | None, report: Callable[[str], None]) -> None:
        self._publisher, self._names, self._report = publisher, names, report
        self._tallies: dict[str, RolloutTallies] = {}
        # Every roll-out that was open in some tick.
        self.followed_names: set[str] = set()
        self._republish_at = 0.0
        self._publish_error = ""
        self._last_problem = ""

    def tick(self, now_s: float) -> bool:
        """Evaluate all roll-outs once; return True while there is more to do. `now_s` is monotonic."""
        snapshots = self._load_snapshots()
        for snapshot in snapshots:
            self._advance(snapshot)
        if self._publish_error or now_s >= self._republish_at:
            self._republish_at = now_s + REPUBLISH_EVERY_S
            self._report_publish_error(self._publisher.publish())
        return bool(snapshots or self._publish_error)

    def _load_snapshots(self) -> list[RolloutSnapshot]:
        now_us = clock.read().wall_us
        with self._publisher.store.snapshot() as db:
            followed = [
                rollout
                for rollout in journal.load_rollouts(db, only_open=True)
                if self._names is None or rollout.name in self._names
            ]
            names = {rollout.name for rollout in followed}
            self.followed_names |= names
            for name in set(self._tallies) - names:
                del self._tallies[name]
            return [
                load_snapshot(db, rollout, now_us, self._tallies.setdefault(rollout.name, RolloutTallies(rollout)))
                for rollout in followed
            ]

    def _advance(self, snapshot: RolloutSnapshot) -> None:
        rollout, verdict = snapshot.rollout, snapshot.verdict
        action: RolloutAction
        if verdict.outcome == "abort":
            action = partial(actions.abort, expected=rollout, reason=verdict.summary, verdict=verdict)
        elif verdict.outcome in ("promote", "finish") and rollout.state == "running":
            action = partial(actions.promote, expected=rollout, verdict=verdict)
        else:
            return
        # If anything fails between the commit and the broker, the next tick publishes.
        self._republish_at = 0.0
        try:
            rollout, publish_error = self._publisher.execute(action)
        except UsageError as problem:
            # An operator decided in the meantime, or the disk is full: the next tick evaluates again.
            if str(problem) != self._last_problem:
                self._report(str(problem))
            self._last_problem = str(problem)
            return
        self._last_problem = ""
        with self._publisher.store.snapshot() as db:
            summary = rollouts.load_decisions(db, rollout.name)[-1][4]
        self._report(f"{rollout.name}: {summary}")
        self._report_publish_error(publish_error)

    def _report_publish_error(self, error: str) -> None:
        if error and error != self._publish_error:
            self._report(f"not published yet, will retry: {error}")
        elif self._publish_error and not error:
            self._report("published")
        self._publish_error = error
