"""Incidents: each alert from the message that raised it to the one that cleared it, the worst kept, all counted."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from agent import clock
from agent.fleet.evidence.contents import Incident, Place
from agent.fleet.evidence.limits import MOST
from agent.wire.messages import Alerts, Severity

RANK: dict[str, int] = {"critical": 0, "warning": 1, "info": 2}
_STATES = {"open": 0, "unknown": 1, "over": 2}
_CLOCKS = ("synced", "restored", "unsynced")


class Incidents(msgspec.Struct):
    """Messages come by device, log and seq. `newest`: the newest log of each device, in which alone alerts are open.

    `counts`: of (severity, state) over all, also those that are left out.
    """

    at_us: int
    newest: dict[str, str]
    counts: Counter[tuple[str, str]] = msgspec.field(default_factory=Counter)
    kinds: Counter[str] = msgspec.field(default_factory=Counter)
    left_out: int = 0
    _open: dict[str, Incident] = msgspec.field(default_factory=dict)
    _log: tuple[str, str] = ("", "")
    _worst: list[tuple[Any, ...]] = msgspec.field(default_factory=list)
    _n: int = 0

    def add(self, body: Alerts) -> None:
        if (body.device, body.log) != self._log:
            self._end_of_log()
            self._log = (body.device, body.log)
        place = Place(body.device, body.log, body.seq)
        known = self._open.get(body.id)
        if body.state == "raised" and known is None:
            if len(self._open) >= MOST.open_alerts:
                self._keep(self._open.pop(next(iter(self._open))))
            self._open[body.id] = _raised(body, place)
        elif body.state == "raised" and known is not None:
            # Raised anew, with what is known now; it began when it began.
            self._open[body.id] = msgspec.structs.replace(known, severity=_worse(known.severity, body.severity))
        elif known is not None:
            self._keep(_cleared(self._open.pop(body.id), body, place))

    def add_collectors(self, rows: Iterable[dict[str, Any]]) -> None:
        """Alerts that the collector raised or cleared itself, oldest first."""
        self._end_of_log()
        mine: dict[tuple[str, str], Incident] = {}
        for row in rows:
            key = (row["device"], row["id"])
            if row["state"] == "cleared":
                if (known := mine.pop(key, None)) is not None:
                    self._keep(_over(known, row["time"], "synced", None))
                continue
            if key not in mine and len(mine) >= MOST.open_alerts:
                self._keep(mine.pop(next(iter(mine))))
            mine[key] = _of_collector(row)
        for one in mine.values():
            self._keep(one)

    def worst(self) -> list[Incident]:
        """Open ones first, then by severity, then the longest."""
        self._end_of_log()
        return [entry[-1] for entry in sorted(self._worst, reverse=True)]

    def _end_of_log(self) -> None:
        device, log = self._log
        still = "open" if self.newest.get(device) == log else "unknown"
        for one in self._open.values():
            self._keep(msgspec.structs.replace(one, state=still))
        self._open.clear()

    def _keep(self, one: Incident) -> None:
        if one.seconds is None and one.state == "open":
            one = msgspec.structs.replace(one, seconds=_between(one.began, self.at_us))
        self.counts[one.severity, one.state] += 1
        self.kinds[one.alert] += 1
        self._n += 1
        # The last number keeps incidents from being compared.
        entry = (-_STATES[one.state], -RANK[one.severity], one.seconds or 0.0, -self._n, one)
        if len(self._worst) < MOST.incidents:
            heapq.heappush(self._worst, entry)
            return
        heapq.heappushpop(self._worst, entry)
        self.left_out += 1


def _raised(body: Alerts, place: Place) -> Incident:
    return Incident(
        device=body.device,
        task=body.task,
        alert=body.alert,
        subject=body.subject,
        severity=body.severity,
        summary=body.summary,
        state="open",
        began=body.time,
        ended=None,
        seconds=None,
        clock=body.clock,
        source="device",
        raised=place,
    )


def _of_collector(row: dict[str, Any]) -> Incident:
    severity: Severity = row["severity"] if row["severity"] in RANK else "warning"
    return Incident(
        device=row["device"],
        task=row["task"],
        alert=row["alert"],
        subject=row["subject"],
        severity=severity,
        summary=row["summary"],
        state="open",
        began=row["time"],
        ended=None,
        seconds=None,
        clock="synced",
        source="collector",
    )


def _cleared(one: Incident, body: Alerts, place: Place) -> Incident:
    return _over(one, body.time, max(one.clock, body.clock, key=_CLOCKS.index), place)


def _over(one: Incident, time: str, its_clock: Any, place: Place | None) -> Incident:
    seconds = _between(one.began, clock.epoch_us(time))
    changes = {"state": "over", "ended": time, "seconds": seconds, "clock": its_clock, "cleared": place}
    return msgspec.structs.replace(one, **changes)


def _between(began: str, end_us: int) -> float | None:
    """Seconds; None where the end lies before the beginning, because a clock was set back meanwhile."""
    try:
        seconds = (end_us - clock.epoch_us(began)) / 1e6
    except ValueError:
        return None
    return round(seconds, 1) if seconds >= 0 else None


def _worse(one: str, other: str) -> str:
    return min(one, other, key=lambda severity: RANK[severity])
