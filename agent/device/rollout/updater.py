"""Everything that brings other bundles to a running device, put together for the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.clock import Now
from agent.device.bundles.rollout_state import Reason
from agent.device.pipeline.batch import Task
from agent.device.rollout.executor import Rollouts
from agent.device.rollout.fetch.fetcher import Failed, Fetched, Fetcher
from agent.device.rollout.state_machine import Finding
from agent.device.rollout.supply import Supply
from agent.errors import ModelDied

# What a repository shows that is older than what was seen, not what was signed, or not by whom.
_UNTRUSTED = frozenset({
    "BadVersionNumberError", "UnsignedMetadataError", "LengthOrHashMismatchError", "DownloadLengthMismatchError",
    "EqualVersionNumberError", "RepositoryError",
})  # fmt: skip


class Updating:
    """Called by the main loop."""

    def __init__(self, rollouts: Rollouts, supplies: Mapping[str, Supply], fetcher: Fetcher | None) -> None:
        self.rollouts, self._supplies, self._fetcher = rollouts, supplies, fetcher

    def turn(self, now: Now) -> bool:
        """Go on with what is fetched, proved and tried; whether anything was written for the collector."""
        if self._fetcher is not None and (found := self._fetcher.poll(now)) is not None:
            self._hand_on(found)
        return self.rollouts.turn(now)

    def wait_s(self, now: Now) -> float:
        """Until `turn` may have something to do."""
        waits = self.rollouts.wait_s(now)
        return waits if self._fetcher is None else min(waits, self._fetcher.wait_s(now))

    def resumes(self, task: str) -> bool:
        """Whether the task waits for the bundle that answers for it, after a start."""
        return self.rollouts.resumes(task)

    def ran(self, task: str, now: Now) -> None:
        """A batch of the task was committed."""
        self.rollouts.ran(task, now)

    def fell(self, task: str, died: ModelDied, now: Now) -> Task | None:
        """The bundle on probation did not answer a batch: who does instead, if anybody can."""
        return self.rollouts.fell(task, died, now)

    def report(self, now: Now) -> dict[str, Any]:
        """Members for health."""
        found = None if self._fetcher is None else self._fetcher.report(now)
        return {} if found is None else {"updates": found}

    def stop(self, now: Now) -> None:
        """The daemon stops. Raises StorageError."""
        self.rollouts.stop(now)
        if self._fetcher is not None:
            self._fetcher.close()

    def drop(self) -> None:
        """The store failed: end what runs beside, and write nothing."""
        self.rollouts.drop()
        if self._fetcher is not None:
            self._fetcher.close()

    def _hand_on(self, found: Fetched | Failed) -> None:
        supply = self._supplies.get(found.task)
        if supply is None:
            return
        if isinstance(found, Fetched):
            supply.came(found.task, found.path)
        elif found.error in _UNTRUSTED:
            supply.failed(found.task, Finding("signature", f"{found.error}: {found.detail}"))
        elif found.lasting:
            reason: Reason = "unfit" if found.error == "Unfit" else "fetch"
            supply.failed(found.task, Finding(reason, f"{found.error}: {found.detail}"))
