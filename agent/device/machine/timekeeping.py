"""Which time it is, how far that can be trusted, and the anchors that let the collector date rows afterwards.

Rules for the latest time known to have passed, under which a clock that nobody vouches for counts as `unsynced`:
- the collector's signed time raises the time floor; not where it lies more than a day ahead of a clock that a time
  service vouches for: one of the two is wrong
- the time a time service gave is kept beside it, and is replaced by what a time service says later, earlier or not
- a time service that vouches for a clock more than a day under the floor takes the floor back to there, and says so
So whoever is wrong, collector or time service, by two years or by ten, does no harm for longer than it lasts.
An anchor is an audit message, event `clock`: what both clocks showed at one moment, in which segment of which boot.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from agent import clock
from agent.clock import Now
from agent.device.store.clock_segments import LOG, QUALITIES, UNANNOUNCED, Segment
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import StorageError, StorageFull

log = logging.getLogger("outstation.clock")

FLOOR, SYNCED, STEPS, ALERT = "time floor", "synced time", "clock steps", "clock alert"
_FLOOR_LEAD_US = 86_400_000_000
_REFRESH_S = 60.0
_DAILY_S = 86_400.0
_FULL_RETRY_S = 10.0
# A clock that gains and loses its time service by the second does not fill the log.
_QUALITY_S = 60.0
# After a start a time service needs a while; a clock that nobody vouches for may be right all the same.
_PATIENCE_S = {"unsynced": 120.0, "restored": 3600.0}
_NEWS_S = 600.0
_ALERT_EVERY_S = 3600.0


def clock_of(store: Store) -> Callable[[], Now]:
    """Both clocks, judged by the times that this store has seen pass."""
    floors = (clock.BUILD_FLOOR_US, 0)
    due_s = float("-inf")

    def now() -> Now:
        nonlocal floors, due_s
        if clock.boot_seconds() >= due_s:
            due_s = clock.boot_seconds() + _REFRESH_S
            with contextlib.suppress(StorageError):
                floors = (max(clock.BUILD_FLOOR_US, int(store.meta(FLOOR, "0"))), int(store.meta(SYNCED, "0")))
        return clock.read(*floors)

    return now


def believable(told_us: int, now: Now) -> bool:
    """Whether the time somebody signed may raise the floor."""
    return now.quality != "synced" or told_us <= now.wall_us + _FLOOR_LEAD_US


class _Last(msgspec.Struct):
    """The last anchor of this run."""

    segment: Segment
    quality: str
    at_s: float


class Timekeeper:
    """Watches both clocks, a turn at a time; writes anchors and the `clock` alert."""

    def __init__(self, store: Store, author: Author) -> None:
        self._store, self._author = store, author
        self._last: _Last | None = None
        self._retry_at = self._alert_at = self._news_at = float("-inf")
        self._unsure_since: tuple[str, float] | None = None
        self._news = ""
        self._vouched = False

    def turn(self, now: Now) -> None:
        """Write what is due at `now`. A full store delays it."""
        if now.boot_s < self._retry_at:
            return
        try:
            why = self._why(now)
            if why is not None:
                self._anchor(now, why)
            self._alert(now)
        except StorageFull as full:
            self._retry_at = now.boot_s + _FULL_RETRY_S
            log.error("%s; the clock's anchor is written once there is room", full)

    def _why(self, now: Now) -> str | None:
        last = self._last
        if last is None:
            return "start"
        if not last.segment.fits(now):
            return "step"
        if last.quality != now.quality and (now.boot_s >= last.at_s + _QUALITY_S or self._is_first_word(now)):
            return now.quality
        if now.boot_s >= last.at_s + _DAILY_S:
            return "daily"
        if self._store.meta(LOG, "") != self._author.log_id:
            return "log"
        # The intake met a segment that was over before this loop came round.
        return "segment" if self._store.meta(UNANNOUNCED, "") else None

    def _is_first_word(self, now: Now) -> bool:
        """The one that dates all rows before it; a clock is often set a moment before it is vouched for."""
        return now.quality == "synced" and not self._vouched

    def _anchor(self, now: Now, why: str) -> None:
        with self._store.transaction() as tx:
            tx.segments.belong_to(self._author.log_id)
            previous = tx.segments.last_announced()
            segment = tx.segments.observe(now)
            for other in tx.segments.unannounced():
                if (other.boot, other.number) != (segment.boot, segment.number):
                    self._write(tx, other, _seen_in(other), "segment", 0, now)
                    tx.segments.announce(other, current=False)
            step = segment.offset_us - previous.offset_us if previous is not None else 0
            before = tx.segments.before() if why == "start" else None
            self._write(tx, segment, now, why, step, now, before)
            tx.segments.announce(segment, current=True)
            if step:
                tx.set_meta(STEPS, f"{segment.boot} {steps(self._store) + 1}")
            told_us = int(tx.meta(FLOOR, "0"))
            disagrees = not believable(told_us, now)
            if now.quality == "synced":
                tx.set_meta(SYNCED, str(now.wall_us))
            if disagrees:
                tx.set_meta(FLOOR, str(now.wall_us))
            tx.segments.forget()
        if step:
            self._note_step(step, now)
        if disagrees:
            self._tell_soon(
                f"The collector said that it was {clock.rfc3339(told_us)}, a time service vouches for "
                f"{clock.rfc3339(now.wall_us)}, which counts: one of the two is wrong.",
                now,
            )
        self._last = _Last(segment, now.quality, now.boot_s)
        self._vouched = self._vouched or now.quality == "synced"

    def _note_step(self, step: int, now: Now) -> None:
        log.warning("the clock was set by %+.1f s, to %s", step / 1e6, clock.rfc3339(now.wall_us))
        if self._last is not None and self._last.quality == "synced":
            self._tell_soon(
                f"The clock was set by {step / 1e6:+.1f} s although a time service had vouched for it.", now
            )

    def _tell_soon(self, news: str, now: Now) -> None:
        """With the next alert; for a while this is the trouble with a clock that is vouched for."""
        log.warning("%s", news)
        self._news_at, self._news = now.boot_s, news

    def _write(
        self,
        tx: Transaction,
        segment: Segment,
        seen: Now,
        why: str,
        step: int,
        now: Now,
        before: tuple[int, int] | None = None,
    ) -> None:
        """`seen`: what both clocks showed in `segment`; `now`: the time of the message."""
        evidence: dict[str, Any] = {
            "why": why,
            "boot": segment.boot,
            "segment": segment.number,
            "boot_us": seen.boot_us,
            "wall_us": seen.wall_us,
            "quality": seen.quality,
            "error_us": seen.error_us,
            "step_us": step,
        }
        if before is not None:
            evidence["before"] = {"boot": before[0], "boot_us": before[1]}
        moved = f" It was set by {step / 1e6:+.1f} s." if step else ""
        within = f", to {seen.error_us / 1e6:.3f} s" if seen.error_us is not None else ""
        summary = f"The clock showed {clock.rfc3339(seen.wall_us)}, {seen.quality}{within}.{moved}"
        self._author.write(tx, "audit", None, {"event": "clock", "summary": summary, "evidence": evidence}, now)

    def _alert(self, now: Now) -> None:
        is_open = self._store.meta(ALERT, "") != ""
        trouble = self._trouble(now)
        if trouble and not is_open and now.boot_s >= self._alert_at:
            self._alert_at = now.boot_s + _ALERT_EVERY_S
            self._tell("raised", "warning", trouble, now)
        elif is_open and not trouble and now.quality == "synced":
            self._tell("cleared", "info", "A time service vouches for the clock again.", now)

    def _trouble(self, now: Now) -> str:
        if now.quality == "synced":
            self._unsure_since = None
        elif self._unsure_since is None or self._unsure_since[0] != now.quality:
            self._unsure_since = (now.quality, now.boot_s)
        elif now.boot_s >= self._unsure_since[1] + _PATIENCE_S[now.quality]:
            wrong = "is wrong: it shows a time that has passed" if now.quality == "unsynced" else "may be wrong"
            return (
                f"The clock ({clock.rfc3339(now.wall_us)}) {wrong}, and no time service has set it. Rows are dated "
                "afterwards, once one does; check systemd-timesyncd or chrony and the way to its server."
            )
        return self._news if now.boot_s < self._news_at + _NEWS_S else ""

    def _tell(self, state: str, severity: str, summary: str, now: Now) -> None:
        body = {"alert": "clock", "subject": "clock", "state": state, "severity": severity, "id": "clock"}
        evidence = {"quality": now.quality, "boot_us": now.boot_us, "wall_us": now.wall_us}
        with self._store.transaction() as tx:
            tx.set_meta(ALERT, state if state == "raised" else "")
            self._author.write(tx, "alerts", None, {**body, "summary": summary, "evidence": evidence}, now)


def report(store: Store, now: Now) -> dict[str, Any]:
    """What health and `outstation status` say of the clock; `synced`: when a time service last vouched for it."""
    synced, floor = int(store.meta(SYNCED, "0")), max(clock.BUILD_FLOOR_US, int(store.meta(FLOOR, "0")))
    return {
        "boot": store.boot,
        "boot_us": now.boot_us,
        "error_us": now.error_us,
        "steps": steps(store),
        "synced": clock.rfc3339(synced) if synced else None,
        "floor": clock.rfc3339(floor),
    }


def steps(store: Store) -> int:
    """How often the wall clock was set in this boot, as far as was seen."""
    boot, count = store.meta(STEPS, "0 0").split()
    return int(count) if int(boot) == store.boot else 0


def _seen_in(segment: Segment) -> Now:
    wall_us = segment.offset_us + segment.last_us
    return Now(wall_us, segment.last_us / 1e6, QUALITIES[segment.quality], segment.error_us)
