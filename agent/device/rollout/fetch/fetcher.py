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
from agent.clock import Now
from agent.config import Config, Updates
from agent.device.rollout.fetch import child, here, request, version_floors, window
from agent.device.rollout.fetch.child import Child
from agent.device.rollout.fetch.protocol import PATIENCE_S, Answer, Request, Target
from agent.device.rollout.fetch.version_floors import Floors
from agent.device.store.store import Store
from agent.errors import BadBundle, StorageBusy, StorageFull
from agent.model.bundle import target_metadata
from agent.wire.desired_state import Wanted

log = logging.getLogger("outstation.updates")

# One that takes longer is gone on with by the next child.
_DOWNLOAD_S = 3600.0
_SPREAD_S = 60.0
_FIRST_RETRY_S, _LONGEST_RETRY_S = 30.0, 6 * 3600.0
_LASTING = frozenset({"Unfit", "TooLarge", "NoRoot", "NoSuchTarget"})
# Not there yet: a roll-out may come sooner than the copy of the repository that a device sees.
_UNPUBLISHED = "NoSuchTarget"
_BUSY_S, _CLOSED_S = 1.0, 60.0


class Fetched(msgspec.Struct, frozen=True):
    """An archive on the disk, of the signed length and SHA-256. Its bundle is still to be verified (`bundle.read`)."""

    task: str
    wanted: Wanted
    path: Path
    target: Target


class Failed(msgspec.Struct, frozen=True):
    """A try failed over `error`, the name of what went wrong. Another comes in `again_s`, unless it is stopped.

    `lasting`: it will fail until the device, the repository or its config has changed.
    """

    task: str
    wanted: Wanted
    error: str
    detail: str
    again_s: float
    lasting: bool


class _Errand(msgspec.Struct):
    """What a task wants, and when it is tried next."""

    task: str
    wanted: Wanted
    path: str
    due_s: float
    failures: int = 0


class _Look(msgspec.Struct):
    """When metadata are looked at next, None at the start, and what came of the last time."""

    due_s: float | None = None
    failures: int = 0
    error: str = ""
    detail: str = ""
    at: str | None = None


class Fetcher:
    """Of one device. All calls are the main loop's; `close` it. Without [updates] nothing is ever fetched."""

    def __init__(
        self,
        conf: Config,
        store: Store,
        *,
        command: Sequence[str] = child.COMMAND,
        chance: random.Random | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._conf, self._store, self._command = conf, store, tuple(command)
        self._chance, self._patience_s = chance or random.Random(), patience_s
        self._errands: dict[str, _Errand] = {}
        self._look = _Look()
        self._child: Child | None = None
        self._serves: _Errand | None = None

    def start(self, task: str, wanted: Wanted, now: Now) -> None:
        """Fetch what is `wanted` for `task`, instead of what was before. The same again changes nothing."""
        before = self._errands.get(task)
        if before is not None and _bundle(before.wanted) == _bundle(wanted):
            return
        self.stop(task)
        self._errands[task] = _Errand(task, wanted, _path(wanted), now.boot_s + self._spread_s())

    def stop(self, task: str) -> None:
        """`task` wants nothing any more."""
        gone = self._errands.pop(task, None)
        if self._child is not None and gone is not None and gone is self._serves:
            self._child.kill()

    def poll(self, now: Now) -> Fetched | Failed | None:
        """What came to an end, if anything did; else begins what is due."""
        if self._conf.updates is None:
            return None
        if self._child is None:
            return self._begin(self._conf.updates, now)
        if not self._child.ended(now.boot_s):
            return None
        answer, errand = self._child.answer(), self._serves
        self._child = self._serves = None
        return self._end(errand, self._committed(answer, now), now)

    def wait_s(self, now: Now) -> float:
        """Until `poll` may have something to do."""
        if self._child is not None:
            return _BUSY_S
        dues = [now.boot_s if self._look.due_s is None else self._look.due_s]
        if self._conf.updates is not None and self._errands:
            is_open = window.open_for_s(self._conf.updates, now) > 0
            dues += [one.due_s if is_open else now.boot_s + _CLOSED_S for one in self._errands.values()]
        return max(0.0, min(dues) - now.boot_s)

    def report(self, now: Now) -> dict[str, Any] | None:
        """What health and `outstation status` say; None without [updates]."""
        if (updates := self._conf.updates) is None:
            return None
        known = version_floors.load(self._store)
        return {
            "freshness": self._freshness(known, now),
            "looked": self._look.at,
            "error": self._look.error,
            "detail": self._look.detail,
            "expires": None if known.expires_s is None else clock.rfc3339(round(known.expires_s * 1e6)),
            "versions": {role: floor.version for role, floor in sorted(known.roles.items())},
            "fetching": {task: self._waits_for(one, updates, now) for task, one in self._errands.items()},
        }

    def close(self) -> None:
        """End a child that runs."""
        if self._child is not None:
            self._child.end()
            self._child = self._serves = None

    # --- a child ---

    def _begin(self, updates: Updates, now: Now) -> Failed | None:
        open_s = window.open_for_s(updates, now)
        ready = [one for one in self._errands.values() if one.due_s <= now.boot_s and open_s > 0]
        errand = min(ready, key=lambda one: one.due_s, default=None)
        if self._look.due_s is None:
            self._look.due_s = now.boot_s + self._spread_s()
        if errand is None and now.boot_s < self._look.due_s:
            return None
        try:
            self._child = Child(self._request(updates, errand, open_s, now), now.boot_s, self._command)
        except OSError as error:
            answer = Answer(error="Died", detail=f"no process to fetch with: {error.strerror}", floors=Floors())
            failed = self._end(errand, answer, now)
            return failed if isinstance(failed, Failed) else None
        self._serves = errand
        return None

    def _request(self, updates: Updates, errand: _Errand | None, open_s: float, now: Now) -> Request:
        time_us = request.latest_us(self._store, now)
        look = msgspec.structs.replace(
            request.look(self._conf, updates, version_floors.load(self._store), time_us), patience_s=self._patience_s
        )
        if errand is None:
            return look
        return msgspec.structs.replace(
            look,
            seconds=min(_DOWNLOAD_S, open_s),
            path=errand.path,
            digest=errand.wanted.digest,
            here=here.measure(self._conf, errand.task),
        )

    # --- what it said ---

    def _committed(self, answer: Answer, now: Now) -> Answer:
        """The answer, once its floors are in the store; where they cannot be, a failure, and nothing of it is used."""
        if not answer.floors.anchor:
            return answer
        try:
            with self._store.transaction() as tx:
                version_floors.save(tx, answer.floors)
                if now.quality == "synced":
                    tx.raise_floor(now.wall_us)
        except (StorageFull, StorageBusy) as problem:
            name, detail = (answer.error, answer.detail) if answer.error else (type(problem).__name__, str(problem))
            return Answer(error=name, detail=detail, floors=Floors(), received=answer.received)
        return answer

    def _end(self, errand: _Errand | None, answer: Answer, now: Now) -> Fetched | Failed | None:
        if errand is not None and self._errands.get(errand.task) is not errand:
            return None
        self._note_look(answer, now, alone=errand is None)
        if errand is None:
            return None
        if answer.error or answer.file is None or answer.target is None:
            return self._failed(errand, answer, now)
        del self._errands[errand.task]
        return Fetched(errand.task, errand.wanted, Path(answer.file), answer.target)

    def _note_look(self, answer: Answer, now: Now, *, alone: bool) -> None:
        """Each child looks at the metadata; one that then fails over a bundle has looked all the same."""
        look = self._look
        if answer.error in ("", _UNPUBLISHED) or answer.target is not None:
            every_s = self._conf.updates.every if self._conf.updates else 0.0
            again_s = every_s * self._chance.uniform(1.0, 1.25)
            self._look = _Look(now.boot_s + again_s, at=clock.rfc3339(now.wall_us))
            return
        again_s = self._retry_s(look.failures + 1)
        self._look = _Look(now.boot_s + again_s, look.failures + 1, answer.error, answer.detail, look.at)
        if alone:
            log.warning("the repository cannot be used: %s: %s; again in %.0f s", answer.error, answer.detail, again_s)

    def _failed(self, errand: _Errand, answer: Answer, now: Now) -> Failed:
        # A link that breaks off again and again brings a bundle all the same.
        errand.failures = 1 if answer.received else errand.failures + 1
        lasting = answer.error in _LASTING
        again_s = self._retry_s(64 if lasting and answer.error != _UNPUBLISHED else errand.failures)
        errand.due_s = now.boot_s + again_s
        error, detail = answer.error or "Died", answer.detail or "the child that fetches gave no archive"
        log.warning("task %s: %s: %s; again in %.0f s", errand.task, error, detail, again_s)
        return Failed(errand.task, errand.wanted, error, detail, again_s, lasting)

    def _spread_s(self) -> float:
        near = self._conf.updates is None or self._conf.updates.is_near
        return 0.0 if near else self._chance.uniform(0.0, _SPREAD_S)

    def _retry_s(self, failures: int) -> float:
        longest_s = min(_LONGEST_RETRY_S, _FIRST_RETRY_S * 2.0 ** min(failures - 1, 20))
        return longest_s * self._chance.uniform(0.5, 1.0)

    # --- what is told ---

    def _waits_for(self, errand: _Errand, updates: Updates, now: Now) -> str:
        if errand is self._serves:
            return "under way"
        if not window.open_for_s(updates, now):
            unknown = ", and the clock is not set" if now.quality == "unsynced" else ""
            return f"waits for the window {updates.window}{unknown}"
        return f"again in {max(0.0, errand.due_s - now.boot_s):.0f} s" if errand.failures else "next"

    def _freshness(self, known: Floors, now: Now) -> str:
        """`fresh`, `expired`, or `unknown` where nothing was seen, or nobody vouches for the clock."""
        if known.expires_s is None:
            return "unknown"
        if request.latest_us(self._store, now) / 1e6 >= known.expires_s:
            return "expired"
        return "fresh" if now.quality == "synced" else "unknown"


def _bundle(wanted: Wanted) -> tuple[str, str, str]:
    return wanted.bundle, wanted.version, wanted.digest


def _path(wanted: Wanted) -> str:
    """The target's; of a version that no repository can have, one that none has."""
    try:
        return target_metadata.target_path(wanted.bundle, wanted.version, wanted.digest)
    except BadBundle:
        return f"{wanted.bundle}/{wanted.digest.removeprefix('sha256:')}"
