"""Fetch bundles, a child process at a time, as the daemon's main loop has a moment; nothing here ever waits.

Rules:
- whatever a child answers, the floors in it are committed before the rest of it counts
- what fails is tried again, later each time and never at a round time, until it is wanted no more; tasks take turns
- devices that are told at one moment do not all come at that moment
- where [updates] has a window, bundles of a web repository come only then; the metadata, a few kilobytes, are looked
  at all day
- metadata that have expired, or a clock that nobody vouches for, stop no task: they are told, and nothing new comes
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent import clock
from agent.clock import ClockReading
from agent.config import Config, UpdatesConfig
from agent.device.rollout.fetch import child, here, request, version_floors, window
from agent.device.rollout.fetch.child import FetchProcess
from agent.device.rollout.fetch.protocol import STALL_TIMEOUT_S, FetchRequest, FetchResponse, SignedTarget
from agent.device.rollout.fetch.version_floors import VersionFloors
from agent.device.store.store import Store
from agent.errors import BadBundle, StorageBusy, StorageFull
from agent.model.bundle import target_metadata
from agent.wire.desired_state import DesiredBundle

log = logging.getLogger("outstation.updates")

# One that takes longer is gone on with by the next child.
_DOWNLOAD_TIMEOUT_S = 3600.0
_MAX_JITTER_S = 60.0
_FIRST_RETRY_S, _LONGEST_RETRY_S = 30.0, 6 * 3600.0
_PERMANENT_ERRORS = frozenset({"Unfit", "TooLarge", "NoRoot", "NoSuchTarget"})
# Not there yet: a roll-out may come sooner than the copy of the repository that a device sees.
_UNPUBLISHED_ERROR = "NoSuchTarget"
_BUSY_POLL_S, _CLOSED_POLL_S = 1.0, 60.0


class FetchedBundle(msgspec.Struct, frozen=True):
    """An archive on the disk, of the signed length and SHA-256. Its bundle is still to be verified (`bundle.read`)."""

    task: str
    desired: DesiredBundle
    path: Path
    target: SignedTarget


class FetchFailure(msgspec.Struct, frozen=True):
    """A try failed over `error`, the name of what went wrong. Another comes in `again_s`, unless it is stopped.

    `lasting`: it will fail until the device, the repository or its config has changed.
    """

    task: str
    desired: DesiredBundle
    error: str
    detail: str
    retry_in_s: float
    is_permanent: bool


class _PendingFetch(msgspec.Struct):
    """What a task wants, and when it is tried next."""

    task: str
    desired: DesiredBundle
    path: str
    due_s: float
    failures: int = 0


class _MetadataCheck(msgspec.Struct):
    """When metadata are looked at next, None at the start, and what came of the last time."""

    due_s: float | None = None
    failures: int = 0
    error: str = ""
    detail: str = ""
    checked_at: str | None = None


class Fetcher:
    """Of one device. All calls are the main loop's; `close` it. Without [updates] nothing is ever fetched."""

    def __init__(
        self,
        conf: Config,
        store: Store,
        *,
        command: Sequence[str] = child.WORKER_COMMAND,
        rng: random.Random | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._conf, self._store, self._command = conf, store, tuple(command)
        self._rng, self._stall_timeout_s = rng or random.Random(), stall_timeout_s
        self._pending: dict[str, _PendingFetch] = {}
        self._metadata_check = _MetadataCheck()
        self._child: FetchProcess | None = None
        self._active: _PendingFetch | None = None

    def start(self, task: str, desired: DesiredBundle, now: ClockReading) -> None:
        """Fetch what is `wanted` for `task`, instead of what was before. The same again changes nothing."""
        before = self._pending.get(task)
        if before is not None and _bundle_key(before.desired) == _bundle_key(desired):
            return
        self.stop(task)
        self._pending[task] = _PendingFetch(task, desired, _target_path(desired), now.boot_s + self._jitter_s())

    def stop(self, task: str) -> None:
        """`task` wants nothing any more."""
        gone = self._pending.pop(task, None)
        if self._child is not None and gone is not None and gone is self._active:
            self._child.kill()

    def poll(self, now: ClockReading) -> FetchedBundle | FetchFailure | None:
        """What came to an end, if anything did; else begins what is due."""
        if self._conf.updates is None:
            return None
        if self._child is None:
            return self._start_child(self._conf.updates, now)
        if not self._child.has_ended(now.boot_s):
            return None
        answer, errand = self._child.read_response(), self._active
        self._child = self._active = None
        return self._finish(errand, self._commit_floors(answer, now), now)

    def wait_s(self, now: ClockReading) -> float:
        """Until `poll` may have something to do."""
        if self._child is not None:
            return _BUSY_POLL_S
        dues = [now.boot_s if self._metadata_check.due_s is None else self._metadata_check.due_s]
        if self._conf.updates is not None and self._pending:
            is_open = window.seconds_until_close(self._conf.updates, now) > 0
            dues += [one.due_s if is_open else now.boot_s + _CLOSED_POLL_S for one in self._pending.values()]
        return max(0.0, min(dues) - now.boot_s)

    def report(self, now: ClockReading) -> dict[str, Any] | None:
        """What health and `outstation status` say; None without [updates]."""
        if (updates := self._conf.updates) is None:
            return None
        known = version_floors.load(self._store)
        return {
            "freshness": self._freshness(known, now),
            "looked": self._metadata_check.checked_at,
            "error": self._metadata_check.error,
            "detail": self._metadata_check.detail,
            "expires": None if known.expires_s is None else clock.to_rfc3339(round(known.expires_s * 1e6)),
            "versions": {role: floor.version for role, floor in sorted(known.roles.items())},
            "fetching": {task: self._describe_wait(one, updates, now) for task, one in self._pending.items()},
        }

    def close(self) -> None:
        """End a child that runs."""
        if self._child is not None:
            self._child.kill_and_wait()
            self._child = self._active = None

    # --- a child ---

    def _start_child(self, updates: UpdatesConfig, now: ClockReading) -> FetchFailure | None:
        open_s = window.seconds_until_close(updates, now)
        ready = [one for one in self._pending.values() if one.due_s <= now.boot_s and open_s > 0]
        errand = min(ready, key=lambda one: one.due_s, default=None)
        if self._metadata_check.due_s is None:
            self._metadata_check.due_s = now.boot_s + self._jitter_s()
        if errand is None and now.boot_s < self._metadata_check.due_s:
            return None
        try:
            self._child = FetchProcess(self._build_request(updates, errand, open_s, now), now.boot_s, self._command)
        except OSError as error:
            answer = FetchResponse(
                error="Died", detail=f"no process to fetch with: {error.strerror}", floors=VersionFloors()
            )
            failed = self._finish(errand, answer, now)
            return failed if isinstance(failed, FetchFailure) else None
        self._active = errand
        return None

    def _build_request(
        self, updates: UpdatesConfig, pending: _PendingFetch | None, open_s: float, now: ClockReading
    ) -> FetchRequest:
        time_us = request.trusted_time_us(self._store, now)
        look = msgspec.structs.replace(
            request.build_metadata_request(self._conf, updates, version_floors.load(self._store), time_us),
            stall_timeout_s=self._stall_timeout_s,
        )
        if pending is None:
            return look
        return msgspec.structs.replace(
            look,
            timeout_s=min(_DOWNLOAD_TIMEOUT_S, open_s),
            path=pending.path,
            digest=pending.desired.digest,
            profile=here.measure_profile(self._conf, pending.task),
        )

    # --- what it said ---

    def _commit_floors(self, response: FetchResponse, now: ClockReading) -> FetchResponse:
        """The answer, once its floors are in the store; where they cannot be, a failure, and nothing of it is used."""
        if not response.floors.anchor:
            return response
        try:
            with self._store.transaction() as tx:
                version_floors.save(tx, response.floors)
                if now.quality == "synced":
                    tx.raise_time_floor(now.wall_us)
        except (StorageFull, StorageBusy) as problem:
            name, detail = (
                (response.error, response.detail) if response.error else (type(problem).__name__, str(problem))
            )
            return FetchResponse(error=name, detail=detail, floors=VersionFloors(), received=response.received)
        return response

    def _finish(
        self, pending: _PendingFetch | None, response: FetchResponse, now: ClockReading
    ) -> FetchedBundle | FetchFailure | None:
        if pending is not None and self._pending.get(pending.task) is not pending:
            return None
        self._record_metadata_check(response, now, metadata_only=pending is None)
        if pending is None:
            return None
        if response.error or response.file is None or response.target is None:
            return self._record_failure(pending, response, now)
        del self._pending[pending.task]
        return FetchedBundle(pending.task, pending.desired, Path(response.file), response.target)

    def _record_metadata_check(self, response: FetchResponse, now: ClockReading, *, metadata_only: bool) -> None:
        """Each child looks at the metadata; one that then fails over a bundle has looked all the same."""
        look = self._metadata_check
        if response.error in ("", _UNPUBLISHED_ERROR) or response.target is not None:
            every_s = self._conf.updates.poll_interval if self._conf.updates else 0.0
            again_s = every_s * self._rng.uniform(1.0, 1.25)
            self._metadata_check = _MetadataCheck(now.boot_s + again_s, checked_at=clock.to_rfc3339(now.wall_us))
            return
        again_s = self._backoff_s(look.failures + 1)
        self._metadata_check = _MetadataCheck(
            now.boot_s + again_s, look.failures + 1, response.error, response.detail, look.checked_at
        )
        if metadata_only:
            log.warning(
                "the repository cannot be used: %s: %s; again in %.0f s", response.error, response.detail, again_s
            )

    def _record_failure(self, pending: _PendingFetch, response: FetchResponse, now: ClockReading) -> FetchFailure:
        # A link that breaks off again and again brings a bundle all the same.
        pending.failures = 1 if response.received else pending.failures + 1
        lasting = response.error in _PERMANENT_ERRORS
        again_s = self._backoff_s(64 if lasting and response.error != _UNPUBLISHED_ERROR else pending.failures)
        pending.due_s = now.boot_s + again_s
        error, detail = response.error or "Died", response.detail or "the child that fetches gave no archive"
        log.warning("task %s: %s: %s; again in %.0f s", pending.task, error, detail, again_s)
        return FetchFailure(pending.task, pending.desired, error, detail, again_s, lasting)

    def _jitter_s(self) -> float:
        near = self._conf.updates is None or self._conf.updates.is_local
        return 0.0 if near else self._rng.uniform(0.0, _MAX_JITTER_S)

    def _backoff_s(self, failures: int) -> float:
        longest_s = min(_LONGEST_RETRY_S, _FIRST_RETRY_S * 2.0 ** min(failures - 1, 20))
        return longest_s * self._rng.uniform(0.5, 1.0)

    # --- what is told ---

    def _describe_wait(self, pending: _PendingFetch, updates: UpdatesConfig, now: ClockReading) -> str:
        if pending is self._active:
            return "under way"
        if not window.seconds_until_close(updates, now):
            unknown = ", and the clock is not set" if now.quality == "unsynced" else ""
            return f"waits for the window {updates.window}{unknown}"
        return f"again in {max(0.0, pending.due_s - now.boot_s):.0f} s" if pending.failures else "next"

    def _freshness(self, known: VersionFloors, now: ClockReading) -> str:
        """`fresh`, `expired`, or `unknown` where nothing was seen, or nobody vouches for the clock."""
        if known.expires_s is None:
            return "unknown"
        if request.trusted_time_us(self._store, now) / 1e6 >= known.expires_s:
            return "expired"
        return "fresh" if now.quality == "synced" else "unknown"


def _bundle_key(desired: DesiredBundle) -> tuple[str, str, str]:
    return desired.bundle, desired.version, desired.digest


def _target_path(desired: DesiredBundle) -> str:
    """The target's; of a version that no repository can have, one that none has."""
    try:
        return target_metadata.target_path(desired.bundle, desired.version, desired.digest)
    except BadBundle:
        return f"{desired.bundle}/{desired.digest.removeprefix('sha256:')}"
