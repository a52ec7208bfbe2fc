"""Everything that brings other bundles to a running device, put together for the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.clock import ClockReading
from agent.device.bundles.rollout_state import Reason
from agent.device.pipeline.loaded_task import LoadedTask
from agent.device.rollout.executor import RolloutExecutor
from agent.device.rollout.fetch.fetcher import FetchedBundle, Fetcher, FetchFailure
from agent.device.rollout.state_machine import BundleAssessment
from agent.device.rollout.supply import BundleSupply
from agent.errors import ModelProcessFailed

# What a repository shows that is older than what was seen, not what was signed, or not by whom.
_UNTRUSTED_ERRORS = frozenset({
    "BadVersionNumberError", "UnsignedMetadataError", "LengthOrHashMismatchError", "DownloadLengthMismatchError",
    "EqualVersionNumberError", "RepositoryError",
})  # fmt: skip


class BundleUpdater:
    """Called by the main loop."""

    def __init__(
        self, rollouts: RolloutExecutor, supplies: Mapping[str, BundleSupply], fetcher: Fetcher | None
    ) -> None:
        self.rollouts, self._supplies, self._fetcher = rollouts, supplies, fetcher

    def tick(self, now: ClockReading) -> bool:
        """Go on with what is fetched, proved and tried; whether anything was written for the collector."""
        if self._fetcher is not None and (found := self._fetcher.poll(now)) is not None:
            self._dispatch(found)
        return self.rollouts.tick(now)

    def wait_s(self, now: ClockReading) -> float:
        """Until `turn` may have something to do."""
        waits = self.rollouts.wait_s(now)
        return waits if self._fetcher is None else min(waits, self._fetcher.wait_s(now))

    def is_resuming(self, task: str) -> bool:
        """Whether the task waits for the bundle that answers for it, after a start."""
        return self.rollouts.is_resuming(task)

    def on_batch_committed(self, task: str, now: ClockReading) -> None:
        """A batch of the task was committed."""
        self.rollouts.on_batch_committed(task, now)

    def on_canary_failure(self, task: str, failure: ModelProcessFailed, now: ClockReading) -> LoadedTask | None:
        """The bundle on probation did not answer a batch: who does instead, if anybody can."""
        return self.rollouts.on_canary_failure(task, failure, now)

    def report(self, now: ClockReading) -> dict[str, Any]:
        """Members for health."""
        found = None if self._fetcher is None else self._fetcher.report(now)
        return {} if found is None else {"updates": found}

    def stop(self, now: ClockReading) -> None:
        """The daemon stops. Raises StorageError."""
        self.rollouts.stop(now)
        if self._fetcher is not None:
            self._fetcher.close()

    def abort(self) -> None:
        """The store failed: end what runs beside, and write nothing."""
        self.rollouts.abort()
        if self._fetcher is not None:
            self._fetcher.close()

    def _dispatch(self, result: FetchedBundle | FetchFailure) -> None:
        supply = self._supplies.get(result.task)
        if supply is None:
            return
        if isinstance(result, FetchedBundle):
            supply.on_fetched(result.task, result.path)
        elif result.error in _UNTRUSTED_ERRORS:
            supply.on_fetch_failed(result.task, BundleAssessment("signature", f"{result.error}: {result.detail}"))
        elif result.is_permanent:
            reason: Reason = "unfit" if result.error == "Unfit" else "fetch"
            supply.on_fetch_failed(result.task, BundleAssessment(reason, f"{result.error}: {result.detail}"))
