"""Bundle fetcher: run fetch workers one at a time, polled by the daemon's main loop, which never waits for them.

Rules:
- the version floors in a response are committed before anything else in it is used
- a failed fetch is retried with exponential backoff and jitter while the bundle is desired; tasks take turns
- devices that learn of a bundle at the same moment download it at different moments
- with [updates] window, bundles are downloaded from the web within it only; metadata, a few kilobytes, at any time
- expired metadata or an unsynced clock stop no task: they are reported, and no new bundle is accepted
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from outstation.device.config import Config, UpdatesConfig
from outstation.device.machine.timekeeping import trusted_time_us
from outstation.device.rollout.fetch import request as requests
from outstation.device.rollout.fetch import version_floors
from outstation.device.rollout.fetch.protocol import (
    MAX_RESPONSE_BYTES,
    STALL_TIMEOUT_S,
    FetchRequest,
    FetchResponse,
    SignedTarget,
)
from outstation.device.rollout.fetch.version_floors import VersionFloors
from outstation.device.store.store import Store
from outstation.foundation import clock, decoders
from outstation.foundation.backoff import Backoff
from outstation.foundation.clock import ClockReading
from outstation.foundation.day_window import DAY_S
from outstation.foundation.errors import BadBundle, StorageBusy, StorageFull
from outstation.protocol.wire import target_metadata
from outstation.protocol.wire.desired_state import DesiredBundle

log = logging.getLogger("outstation.updates")

# -P: never import an `agent` package from the current folder.
WORKER_COMMAND = (sys.executable, "-P", "-m", "outstation.device.rollout.fetch.worker")
# The worker ends by itself at its timeout; this much later it is killed.
_GRACE_S = 30.0
# The next worker resumes a download that takes longer.
_DOWNLOAD_TIMEOUT_S = 3600.0
_MAX_JITTER_S = 60.0
_RETRY = Backoff(30.0, 6 * 3600.0)
_PERMANENT_ERRORS = frozenset({"Incompatible", "TooLarge", "MissingRoot", "NoSuchTarget"})
# A roll-out may start before the device's mirror of the repository has the bundle.
_UNPUBLISHED_ERROR = "NoSuchTarget"
_BUSY_POLL_S, _CLOSED_POLL_S = 1.0, 60.0


class FetchProcess:
    """A running fetch worker. `now_s` is boot time. Raises OSError if no process can be started."""

    def __init__(self, request: FetchRequest, now_s: float, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._deadline_s, self._killed = now_s + request.timeout_s + _GRACE_S, False
        # Files, not pipes: nothing has to drain them while the worker runs.
        with tempfile.TemporaryFile() as stdin:
            stdin.write(msgspec.json.encode(request))
            stdin.seek(0)
            self._stdout, self._stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
            try:
                self._process = subprocess.Popen(command, stdin=stdin, stdout=self._stdout, stderr=self._stderr)
            except OSError:
                self._close()
                raise

    def has_ended(self, now_s: float) -> bool:
        """Return True if it has ended; kill it once it is overdue."""
        if self._process.poll() is not None:
            return True
        if now_s >= self._deadline_s:
            self.kill()
        return False

    def kill(self) -> None:
        self._killed = True
        self._process.kill()

    def read_response(self) -> FetchResponse:
        """Return the response of an ended worker; without one, the cause of its death as an error."""
        self._stdout.seek(0)
        try:
            response = decoders.from_json(self._stdout.read(MAX_RESPONSE_BYTES), FetchResponse)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            error = "Timeout" if self._killed else "WorkerCrashed"
            if self._killed:
                detail = "the fetch worker did not end in time and was killed; the bytes so far are kept"
            else:
                self._stderr.seek(0)
                text = self._stderr.read(MAX_RESPONSE_BYTES).decode(errors="replace").strip()
                detail = f"the fetch worker ended with {self._process.returncode}: {text[-300:]}"
            response = FetchResponse(error=error, detail=detail, floors=VersionFloors())
        self._close()
        return response

    def kill_and_wait(self) -> None:
        self.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        self._stdout.close()
        self._stderr.close()


class FetchedBundle(msgspec.Struct, frozen=True):
    """An archive on disk with the signed length and SHA-256. Its bundle is not verified yet (`bundle.read`)."""

    task: str
    desired: DesiredBundle
    path: Path
    target: SignedTarget


class FetchFailure(msgspec.Struct, frozen=True):
    """A failed fetch with the name of its error; it is retried in `retry_in_s` unless it is stopped.

    If `is_permanent`, it will fail until the device, its config or the repository changes.
    """

    task: str
    desired: DesiredBundle
    error: str
    detail: str
    retry_in_s: float
    is_permanent: bool


class _PendingFetch(msgspec.Struct):
    """The bundle that a task needs, and when its next fetch is due."""

    task: str
    desired: DesiredBundle
    path: str
    due_s: float
    failures: int = 0


class _MetadataCheck(msgspec.Struct):
    """When metadata are refreshed next (None: not scheduled yet), and the result of the last refresh."""

    due_s: float | None = None
    failures: int = 0
    error: str = ""
    detail: str = ""
    checked_at: str | None = None


class Fetcher:
    """Fetcher of one device, for the main loop only. Close it. Without [updates] it never fetches."""

    def __init__(
        self,
        conf: Config,
        store: Store,
        *,
        command: Sequence[str] = WORKER_COMMAND,
        rng: random.Random | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._conf, self._store, self._command = conf, store, tuple(command)
        self._rng, self._stall_timeout_s = rng or random.Random(), stall_timeout_s
        self._pending: dict[str, _PendingFetch] = {}
        self._metadata_check = _MetadataCheck()
        self._process: FetchProcess | None = None
        self._active: _PendingFetch | None = None

    def start(self, task: str, desired: DesiredBundle, now: ClockReading) -> None:
        """Fetch `desired` for `task` instead of any earlier bundle. Starting the same bundle again has no effect."""
        before = self._pending.get(task)
        if before is not None and _bundle_key(before.desired) == _bundle_key(desired):
            return
        self.stop(task)
        try:
            target_path = target_metadata.target_path(desired.bundle, desired.version, desired.digest)
        except BadBundle:
            target_path = f"{desired.bundle}/{desired.digest.removeprefix('sha256:')}"
        self._pending[task] = _PendingFetch(task, desired, target_path, now.boot_s + self._jitter_s())

    def stop(self, task: str) -> None:
        """Drop the fetch of `task`."""
        dropped = self._pending.pop(task, None)
        if self._process is not None and dropped is not None and dropped is self._active:
            self._process.kill()

    def poll(self, now: ClockReading) -> FetchedBundle | FetchFailure | None:
        """Return the result of a fetch that ended, if one did; else start the next one that is due."""
        if self._conf.updates is None:
            return None
        if self._process is None:
            return self._start_worker(self._conf.updates, now)
        if not self._process.has_ended(now.boot_s):
            return None
        response, pending = self._process.read_response(), self._active
        self._process = self._active = None
        return self._finish(pending, self._commit_floors(response, now), now)

    def wait_s(self, now: ClockReading) -> float:
        """Return the seconds until `poll` may have work."""
        if self._process is not None:
            return _BUSY_POLL_S
        due_s = [now.boot_s if self._metadata_check.due_s is None else self._metadata_check.due_s]
        if self._conf.updates is not None and self._pending:
            is_open = seconds_until_close(self._conf.updates, now) > 0
            due_s += [fetch.due_s if is_open else now.boot_s + _CLOSED_POLL_S for fetch in self._pending.values()]
        return max(0.0, min(due_s) - now.boot_s)

    def report(self, now: ClockReading) -> dict[str, Any] | None:
        """Return the state for health messages and `outstation status`; None without [updates]."""
        if (updates := self._conf.updates) is None:
            return None
        floors = version_floors.load(self._store)
        expires = None if floors.expires_s is None else clock.to_rfc3339(round(floors.expires_s * 1e6))
        if floors.expires_s is None:
            freshness = "unknown"
        elif trusted_time_us(self._store, now) / 1e6 >= floors.expires_s:
            freshness = "expired"
        else:
            freshness = "fresh" if now.quality == "synced" else "unknown"
        return {
            "freshness": freshness,
            "last_checked": self._metadata_check.checked_at,
            "error": self._metadata_check.error,
            "detail": self._metadata_check.detail,
            "metadata_expires": expires,
            "versions": {role: floor.version for role, floor in sorted(floors.roles.items())},
            "downloads": {task: self._describe_wait(fetch, updates, now) for task, fetch in self._pending.items()},
        }

    def close(self) -> None:
        if self._process is not None:
            self._process.kill_and_wait()
            self._process = self._active = None

    # --- one worker ---

    def _start_worker(self, updates: UpdatesConfig, now: ClockReading) -> FetchFailure | None:
        open_s = seconds_until_close(updates, now)
        ready = [fetch for fetch in self._pending.values() if fetch.due_s <= now.boot_s and open_s > 0]
        pending = min(ready, key=lambda fetch: fetch.due_s, default=None)
        if self._metadata_check.due_s is None:
            self._metadata_check.due_s = now.boot_s + self._jitter_s()
        if pending is None and now.boot_s < self._metadata_check.due_s:
            return None
        try:
            self._process = FetchProcess(self._build_request(updates, pending, open_s, now), now.boot_s, self._command)
        except OSError as error:
            detail = f"no fetch worker can be started: {error.strerror}"
            response = FetchResponse(error="WorkerCrashed", detail=detail, floors=VersionFloors())
            failure = self._finish(pending, response, now)
            return failure if isinstance(failure, FetchFailure) else None
        self._active = pending
        return None

    def _build_request(
        self, updates: UpdatesConfig, pending: _PendingFetch | None, open_s: float, now: ClockReading
    ) -> FetchRequest:
        time_us = trusted_time_us(self._store, now)
        metadata_request = msgspec.structs.replace(
            requests.build_metadata_request(self._conf, updates, version_floors.load(self._store), time_us),
            stall_timeout_s=self._stall_timeout_s,
        )
        if pending is None:
            return metadata_request
        return msgspec.structs.replace(
            metadata_request,
            timeout_s=min(_DOWNLOAD_TIMEOUT_S, open_s),
            path=pending.path,
            digest=pending.desired.digest,
            profile=requests.measure_profile(self._conf, pending.task),
        )

    # --- its response ---

    def _commit_floors(self, response: FetchResponse, now: ClockReading) -> FetchResponse:
        """Store the floors and return the response; if they cannot be stored, return a failure instead."""
        if not response.floors.anchor:
            return response
        try:
            with self._store.transaction() as tx:
                version_floors.save(tx, response.floors)
                if now.quality == "synced":
                    tx.raise_time_floor(now.wall_us)
        except (StorageFull, StorageBusy) as problem:
            error, detail = response.error, response.detail
            if not error:
                error, detail = type(problem).__name__, str(problem)
            return FetchResponse(error=error, detail=detail, floors=VersionFloors(), received=response.received)
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
            # An unstable link still makes progress: bytes received reset the backoff.
            pending.failures = 1 if response.received else pending.failures + 1
            is_permanent = response.error in _PERMANENT_ERRORS
            is_hopeless = is_permanent and response.error != _UNPUBLISHED_ERROR
            retry_s = self._backoff_s(64 if is_hopeless else pending.failures)
            pending.due_s = now.boot_s + retry_s
            error, detail = response.error or "WorkerCrashed", response.detail or "the fetch worker returned no archive"
            log.warning("task %s: %s: %s; retry in %.0f s", pending.task, error, detail, retry_s)
            return FetchFailure(pending.task, pending.desired, error, detail, retry_s, is_permanent)
        del self._pending[pending.task]
        return FetchedBundle(pending.task, pending.desired, Path(response.file), response.target)

    def _record_metadata_check(self, response: FetchResponse, now: ClockReading, *, metadata_only: bool) -> None:
        """Record the refresh. Every worker refreshes the metadata, even one that then fails to get a bundle."""
        last = self._metadata_check
        if response.error in ("", _UNPUBLISHED_ERROR) or response.target is not None:
            every_s = self._conf.updates.poll_interval if self._conf.updates else 0.0
            due_s = now.boot_s + every_s * self._rng.uniform(1.0, 1.25)
            self._metadata_check = _MetadataCheck(due_s, checked_at=clock.to_rfc3339(now.wall_us))
            return
        retry_s = self._backoff_s(last.failures + 1)
        self._metadata_check = _MetadataCheck(
            now.boot_s + retry_s, last.failures + 1, response.error, response.detail, last.checked_at
        )
        if metadata_only:
            log.warning(
                "the repository cannot be used: %s: %s; retry in %.0f s", response.error, response.detail, retry_s
            )

    def _jitter_s(self) -> float:
        is_local = self._conf.updates is None or self._conf.updates.is_local
        return 0.0 if is_local else self._rng.uniform(0.0, _MAX_JITTER_S)

    def _backoff_s(self, failures: int) -> float:
        return _RETRY.draw_s(failures, self._rng)

    # --- reports ---

    def _describe_wait(self, pending: _PendingFetch, updates: UpdatesConfig, now: ClockReading) -> str:
        if pending is self._active:
            return "running"
        if not seconds_until_close(updates, now):
            unknown = ", and the clock is not set" if now.quality == "unsynced" else ""
            return f"waits for the window {updates.window}{unknown}"
        return f"retry in {max(0.0, pending.due_s - now.boot_s):.0f} s" if pending.failures else "next"


def seconds_until_close(updates: UpdatesConfig, now: ClockReading) -> float:
    """Return the seconds until the download window closes; 0 while it is closed or the time of day is unknown.

    A repository in a folder has no window.
    """
    window = updates.day_window
    return DAY_S if window is None or updates.is_folder else window.seconds_until_close(now)


def _bundle_key(desired: DesiredBundle) -> tuple[str, str, str]:
    return desired.bundle, desired.version, desired.digest
