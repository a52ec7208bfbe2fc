"""Bundle updater: fetcher, supplies and roll-outs of a running device, as the main loop calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outstation.device.bundles.rollout_state import Reason
from outstation.device.rollout.executor import RolloutExecutor
from outstation.device.rollout.fetch.fetcher import FetchedBundle, Fetcher, FetchFailure
from outstation.device.rollout.state_machine import BundleAssessment
from outstation.device.rollout.supply import BundleSupply
from outstation.foundation.clock import ClockReading

# Errors of a repository that serves older, altered or wrongly signed data.
_UNTRUSTED_ERRORS = frozenset({
    "BadVersionNumberError", "UnsignedMetadataError", "LengthOrHashMismatchError", "DownloadLengthMismatchError",
    "EqualVersionNumberError", "RepositoryError",
})  # fmt: skip


class BundleUpdater:
    def __init__(
        self, rollouts: RolloutExecutor, supplies: Mapping[str, BundleSupply], fetcher: Fetcher | None
    ) -> None:
        self.rollouts, self._supplies, self._fetcher = rollouts, supplies, fetcher

    def tick(self, now: ClockReading) -> bool:
        """Advance downloads and roll-outs; return True if a message was written."""
        if self._fetcher is not None and (result := self._fetcher.poll(now)) is not None:
            self._dispatch(result)
        return self.rollouts.tick(now)

    def wait_s(self, now: ClockReading) -> float:
        """Return the seconds until `tick` may have work."""
        wait_s = self.rollouts.wait_s(now)
        return wait_s if self._fetcher is None else min(wait_s, self._fetcher.wait_s(now))

    def report(self, now: ClockReading) -> dict[str, Any]:
        updates = None if self._fetcher is None else self._fetcher.report(now)
        return {} if updates is None else {"updates": updates}

    def stop(self, now: ClockReading) -> None:
        """Stop with the daemon. Raises StorageError."""
        self.rollouts.stop(now)
        if self._fetcher is not None:
            self._fetcher.close()

    def abort(self) -> None:
        """End all processes and write nothing: the store failed."""
        self.rollouts.abort()
        if self._fetcher is not None:
            self._fetcher.close()

    def _dispatch(self, result: FetchedBundle | FetchFailure) -> None:
        supply = self._supplies.get(result.task)
        if supply is None:
            return
        if isinstance(result, FetchedBundle):
            supply.on_fetched(result.task, result.path)
            return
        reason: Reason = "incompatible" if result.error == "Incompatible" else "download_failed"
        if result.error in _UNTRUSTED_ERRORS:
            reason = "signature"
        elif not result.is_permanent:
            return
        supply.on_fetch_failed(result.task, BundleAssessment(reason, f"{result.error}: {result.detail}"))
