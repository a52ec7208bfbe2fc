"""Timekeeping: quality of the wall clock, the time floor, and anchors by which the collector dates rows afterwards.

The time floor is the latest time known to have passed. A clock below it that no time service has synchronized counts as
`unsynced`. Rules:
- the collector's signed time raises the floor, unless it is more than a day ahead of a synchronized clock: one of the
  two is then wrong
- the last synchronized time is stored beside the floor; a later synchronization replaces it, even by an earlier time
- a synchronized clock more than a day below the floor lowers the floor to its own time, and an alert reports it
So an error of the collector or of the time service, by two years or by ten, has no effect after it is corrected.
An anchor is an audit message, event `clock`: what both clocks showed at one moment, in which segment of which boot.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from outstation.device.store.clock_segments import ANCHORED_LOG, QUALITIES, UNANNOUNCED, ClockSegment
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import clock
from outstation.foundation.clock import ClockQuality, ClockReading
from outstation.foundation.errors import StorageError, StorageFull
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.alerts.kinds import CLOCK

log = logging.getLogger("outstation.clock")

# Names in table meta.
FLOOR, SYNCED, STEPS, ALERT = "time floor", "synced time", "clock steps", "clock alert"
_FLOOR_LEAD_US = 86_400_000_000
_REFRESH_S = 60.0
_ANCHOR_INTERVAL_S = 86_400.0
_FULL_RETRY_S = 10.0
# Limits the anchors of a clock that gains and loses its time service every second.
_QUALITY_INTERVAL_S = 60.0
# A time service needs some time after a start; a restored clock is probably right.
_ALERT_DELAY_S = {"unsynced": 120.0, "restored": 3600.0}
_INCIDENT_S = 600.0
_ALERT_INTERVAL_S = 3600.0


def make_clock(store: Store) -> Callable[[], ClockReading]:
    """Return a function that reads both clocks and rates them by the store's time floor."""
    floors = (clock.BUILD_FLOOR_US, 0)
    due_s = float("-inf")

    def now() -> ClockReading:
        nonlocal floors, due_s
        if clock.boot_seconds() >= due_s:
            due_s = clock.boot_seconds() + _REFRESH_S
            with contextlib.suppress(StorageError):
                floors = (max(clock.BUILD_FLOOR_US, int(store.get_meta(FLOOR, "0"))), int(store.get_meta(SYNCED, "0")))
        return clock.read(*floors)

    return now


def is_plausible_time(signed_us: int, now: ClockReading) -> bool:
    """Return True if a signed time may raise the floor."""
    return now.quality != "synced" or signed_us <= now.wall_us + _FLOOR_LEAD_US


def trusted_time_us(store: Store, now: ClockReading) -> int:
    """Return the latest time known to have passed. An unsynced clock that shows an earlier time is wrong."""
    known = (int(store.get_meta(name, "0")) for name in (FLOOR, SYNCED))
    return now.wall_us if now.quality == "synced" else max(now.wall_us, clock.BUILD_FLOOR_US, *known)


class _LastAnchor(msgspec.Struct):
    segment: ClockSegment
    quality: str
    boot_s: float


class Timekeeper:
    """Watcher of both clocks; writes anchors and the `clock` alert."""

    def __init__(self, store: Store, message_log: MessageLog) -> None:
        self._store, self._message_log = store, message_log
        self._last_anchor: _LastAnchor | None = None
        self._retry_at = self._next_alert_s = self._incident_s = float("-inf")
        self._not_synced_since: tuple[str, float] | None = None
        self._incident = ""
        self._was_synced = False
        # Quality of the last reading in the present segment: an anchor of a lost synchronization comes later.
        self._segment_quality: ClockQuality = "unsynced"

    def tick(self, now: ClockReading) -> None:
        """Write the anchor and the alert that are due at `now`. A full store delays them."""
        if self._last_anchor is not None and self._last_anchor.segment.fits(now):
            self._segment_quality = now.quality
        if now.boot_s < self._retry_at:
            return
        try:
            reason = self._find_anchor_reason(now)
            if reason is not None:
                self._write_anchor(now, reason)
            is_open = self._store.get_meta(ALERT, "") != ""
            problem = self._find_problem(now)
            if problem and not is_open and now.boot_s >= self._next_alert_s:
                self._next_alert_s = now.boot_s + _ALERT_INTERVAL_S
                self._write_alert(CLOCK.raised(problem, _alert_evidence(now)), now)
            elif is_open and not problem and now.quality == "synced":
                alert = CLOCK.cleared("A time service synchronizes the clock again.", _alert_evidence(now))
                self._write_alert(alert, now)
        except StorageFull as full:
            self._retry_at = now.boot_s + _FULL_RETRY_S
            log.error("%s; the clock's anchor is written once there is room", full)

    def _find_anchor_reason(self, now: ClockReading) -> str | None:
        last = self._last_anchor
        if last is None:
            return "start"
        if not last.segment.fits(now):
            return "step"
        # The first synchronization dates all rows before it.
        is_first_sync = now.quality == "synced" and not self._was_synced
        if last.quality != now.quality and (now.boot_s >= last.boot_s + _QUALITY_INTERVAL_S or is_first_sync):
            return now.quality
        if now.boot_s >= last.boot_s + _ANCHOR_INTERVAL_S:
            return "daily"
        if self._store.get_meta(ANCHORED_LOG, "") != self._message_log.log_id:
            return "log"
        # The intake saw a segment that was over before the main loop looked.
        return "segment" if self._store.get_meta(UNANNOUNCED, "") else None

    def _write_anchor(self, now: ClockReading, reason: str) -> None:
        with self._store.transaction() as tx:
            tx.segments.bind_to_log(self._message_log.log_id)
            previous = tx.segments.last_announced()
            segment = tx.segments.observe(now)
            for other in tx.segments.unannounced():
                if (other.boot, other.number) != (segment.boot, segment.number):
                    self._write_anchor_message(tx, other, _last_reading(other), "segment", 0, now)
                    tx.segments.mark_announced(other, current=False)
            step = segment.offset_us - previous.offset_us if previous is not None else 0
            before = tx.segments.previous_boot_end() if reason == "start" else None
            self._write_anchor_message(tx, segment, now, reason, step, now, before)
            tx.segments.mark_announced(segment, current=True)
            if step:
                tx.set_meta(STEPS, f"{segment.boot} {count_steps(self._store) + 1}")
            floor_us = int(tx.get_meta(FLOOR, "0"))
            disagrees = not is_plausible_time(floor_us, now)
            if now.quality == "synced":
                tx.set_meta(SYNCED, str(now.wall_us))
            if disagrees:
                tx.set_meta(FLOOR, str(now.wall_us))
            tx.segments.prune()
        if step:
            log.warning("the clock was set by %+.1f s, to %s", step / 1e6, clock.to_rfc3339(now.wall_us))
            if self._last_anchor is not None and self._segment_quality == "synced":
                lost = "although it was synchronized" if now.quality == "synced" else "and lost its synchronization"
                self._set_incident(f"The clock was set by {step / 1e6:+.1f} s {lost}.", now)
        if disagrees:
            self._set_incident(
                f"The collector's time was {clock.to_rfc3339(floor_us)}, the time service's is "
                f"{clock.to_rfc3339(now.wall_us)} and counts: one of the two is wrong.",
                now,
            )
        self._last_anchor = _LastAnchor(segment, now.quality, now.boot_s)
        self._segment_quality = now.quality
        self._was_synced = self._was_synced or now.quality == "synced"

    def _set_incident(self, incident: str, now: ClockReading) -> None:
        """Report an incident with the next alert, and for some time as the problem of a synchronized clock."""
        log.warning("%s", incident)
        self._incident_s, self._incident = now.boot_s, incident

    def _write_anchor_message(
        self,
        tx: Transaction,
        segment: ClockSegment,
        reading: ClockReading,
        reason: str,
        step: int,
        now: ClockReading,
        before: tuple[int, int] | None = None,
    ) -> None:
        """Append an anchor; `reading`: both clocks in `segment`; `now`: the time of the message."""
        evidence: dict[str, Any] = {
            "why": reason,
            "boot": segment.boot,
            "segment": segment.number,
            "boot_us": reading.boot_us,
            "wall_us": reading.wall_us,
            "quality": reading.quality,
            "error_us": reading.error_us,
            "step_us": step,
        }
        if before is not None:
            evidence["before"] = {"boot": before[0], "boot_us": before[1]}
        moved = f" It was set by {step / 1e6:+.1f} s." if step else ""
        within = f", to {reading.error_us / 1e6:.3f} s" if reading.error_us is not None else ""
        summary = f"The clock showed {clock.to_rfc3339(reading.wall_us)}, {reading.quality}{within}.{moved}"
        self._message_log.append(tx, "audit", None, {"event": "clock", "summary": summary, "evidence": evidence}, now)

    def _find_problem(self, now: ClockReading) -> str:
        if now.quality == "synced":
            self._not_synced_since = None
        elif self._not_synced_since is None or self._not_synced_since[0] != now.quality:
            self._not_synced_since = (now.quality, now.boot_s)
        elif now.boot_s >= self._not_synced_since[1] + _ALERT_DELAY_S[now.quality]:
            wrong = "is wrong: it shows a time that has passed" if now.quality == "unsynced" else "may be wrong"
            return (
                f"The clock ({clock.to_rfc3339(now.wall_us)}) {wrong}, and no time service has set it. Rows are dated "
                "afterwards, once one does; check systemd-timesyncd or chrony and the connection to its server."
            )
        return self._incident if now.boot_s < self._incident_s + _INCIDENT_S else ""

    def _write_alert(self, alert: Alert, now: ClockReading) -> None:
        with self._store.transaction() as tx:
            tx.set_meta(ALERT, "raised" if alert.state == "raised" else "")
            self._message_log.append(tx, "alerts", None, alert.to_body(), now)


def _alert_evidence(now: ClockReading) -> dict[str, Any]:
    return {"quality": now.quality, "boot_us": now.boot_us, "wall_us": now.wall_us}


def build_report(store: Store, now: ClockReading) -> dict[str, Any]:
    """Return the clock's members of health and `outstation status`; `synced`: time of the last synchronization."""
    synced, floor = int(store.get_meta(SYNCED, "0")), max(clock.BUILD_FLOOR_US, int(store.get_meta(FLOOR, "0")))
    return {
        "boot": store.boot,
        "boot_us": now.boot_us,
        "error_us": now.error_us,
        "steps": count_steps(store),
        "synced": clock.to_rfc3339(synced) if synced else None,
        "floor": clock.to_rfc3339(floor),
    }


def count_steps(store: Store) -> int:
    """Return how often the wall clock was seen to be set in this boot."""
    boot, count = store.get_meta(STEPS, "0 0").split()
    return int(count) if int(boot) == store.boot else 0


def _last_reading(segment: ClockSegment) -> ClockReading:
    wall_us = segment.offset_us + segment.last_us
    return ClockReading(wall_us, segment.last_us / 1e6, QUALITIES[segment.quality], segment.error_us)
