"""Traffic meter: bytes that the uplink moves within 24 h, and what may be sent now ([broker.metered]).

- Bytes of a connection are those of the network, both ways: TCP/IP headers, TLS and acknowledgements included. The
  kernel counts them; until it has counted a message, an estimate stands for it.
- Alerts, audit and health messages are urgent: they go at any time, until the budget is used up. Bulk, which is all
  else, leaves `_URGENT_SHARE` of the budget to them and waits for a window.
- 24 h are hours that the device was on, by the boot-time clock over all boots: a wall clock that is set moves no byte
  into another day.
- Bytes are booked in the store before they are sent, a part of the budget at a time. After a crash the rest of that
  part counts as used.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from outstation.device.capacity.eviction import EXPIRED_COUNTER
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.day_window import DAY_S
from outstation.foundation.errors import StorageFull
from outstation.protocol.transport.broker_config import MeteredConfig

log = logging.getLogger("outstation.uplink")

URGENT_KINDS = frozenset({"alerts", "audit", "health"})
# Urgent messages that may be before the others at a time.
MAX_URGENT = 1000
# Name in table meta: [hour of uptime, bytes] of the last day.
_BYTES_BY_HOUR = "metered bytes"
_URGENT_SHARE = 0.2
# For closing a connection, and for what the broker sends at the end.
_GOODBYE_BYTES = 6_000
# For a TLS handshake, the state and the keys of the device.
CONNECTION_BYTES = 8_000
# One commit writes about 28 KB to flash.
_BOOKINGS = 100
_MIN_BOOKING = 4096
# Without a budget the count limits nothing, and may be this much too high after a crash.
_BOOKING_WITHOUT_BUDGET = 1_000_000
# Beside a message: TCP/IP headers of it, of its PUBACK and of both acknowledgements, and two TLS records.
_MESSAGE_OVERHEAD = 4 * 52 + 2 * 22 + 4
_SEGMENT_BYTES, _HEADER_BYTES = 1400, 52
_HOUR_S = 3600.0


class TrafficMeter:
    """Meter of one device; used by the uplink's thread only."""

    def __init__(self, conf: MeteredConfig, store: Store, now: ClockReading) -> None:
        self._conf, self._store = conf, store
        self._bytes_by_hour = load_bytes(store, store.uptime_s(now))
        self._booked = 0
        self._estimated = self._counted = 0

    def begin_connection(self) -> None:
        """Count a new connection from zero."""
        self._estimated = self._counted = 0

    def add_message(self, size: int, now: ClockReading) -> None:
        """Book a message of `size` bytes before it is sent. Raises StorageError."""
        self._estimated += estimate_bytes(size)
        self._count(self._estimated, now)

    def observe(self, connection_bytes: int, now: ClockReading) -> None:
        """Count the bytes that the connection has moved so far, by the kernel. Raises StorageError."""
        self._count(connection_bytes, now)

    def add_failed_connection(self, moved: int, now: ClockReading) -> None:
        """Count a connection that was refused. Raises StorageError."""
        self.begin_connection()
        self._count(moved, now)

    def room(self, now: ClockReading, *, urgent: bool) -> float:
        """Return the bytes that may be moved now; infinite without a budget."""
        if not urgent and not is_window_open(self._conf, self._store, now):
            return 0.0
        if self._conf.budget is None:
            return float("inf")
        used = sum_last_day(self._bytes_by_hour, self._store.uptime_s(now)) - self._booked
        return max(0.0, budget_share(self._conf.budget, urgent=urgent) - used)

    def _count(self, moved: int, now: ClockReading) -> None:
        more, self._counted = max(0, moved - self._counted), max(moved, self._counted)
        self._booked -= more
        if self._booked >= 0:
            return
        at_s = self._store.uptime_s(now)
        hour, first = int(at_s // _HOUR_S), _first_hour(at_s)
        budget = self._conf.budget
        booking = _BOOKING_WITHOUT_BUDGET if budget is None else max(_MIN_BOOKING, int(budget) // _BOOKINGS)
        self._bytes_by_hour = {h: n for h, n in self._bytes_by_hour.items() if h >= first}
        self._bytes_by_hour[hour] = self._bytes_by_hour.get(hour, 0) - self._booked + booking
        self._booked = booking
        try:
            with self._store.transaction(vital=True) as tx:
                tx.set_meta(_BYTES_BY_HOUR, json.dumps(sorted(self._bytes_by_hour.items())))
        except StorageFull as full:
            log.warning("%s; bytes of the metered connection are recorded once there is room", full)


def estimate_bytes(size: int) -> int:
    """Return the bytes on the network of a message of `size` bytes, with its receipt."""
    return size + _MESSAGE_OVERHEAD + size // _SEGMENT_BYTES * _HEADER_BYTES


def budget_share(budget: int, *, urgent: bool) -> float:
    """Return the part of the budget that urgent messages, or bulk, may use up."""
    return budget - _GOODBYE_BYTES if urgent else budget * (1 - _URGENT_SHARE)


def is_window_open(conf: MeteredConfig, store: Store, now: ClockReading) -> bool:
    """Return True if bulk may be sent at this time.

    While the time of day is unknown, the first part of each 24 h that the device was on is a window, as long as all
    windows together: a device without a clock sends its bulk, too.
    """
    windows = conf.day_windows
    if not windows:
        return True
    if now.quality == "unsynced":
        return store.uptime_s(now) % DAY_S < sum(window.duration_s for window in windows)
    return any(window.seconds_until_close(now) > 0 for window in windows)


def build_status(conf: MeteredConfig, store: Store, now: ClockReading) -> dict[str, Any]:
    """Return the member `metered` of status and health: limits, bytes of the last 24 h, and what holds bulk back."""
    at_s = store.uptime_s(now)
    used = sum_last_day(load_bytes(store, at_s), at_s)
    is_open = is_window_open(conf, store, now)
    bulk = "sent" if is_open else "waits for a window"
    if is_open and conf.budget is not None and used >= budget_share(conf.budget, urgent=False):
        bulk = "waits for the budget"
    return {
        "budget": None if conf.budget is None else int(conf.budget),
        "used": used,
        "windows": conf.windows,
        "max_age_s": None if conf.max_age is None else float(conf.max_age),
        "bulk": bulk,
        "expired": store.counters().get(EXPIRED_COUNTER, 0),
    }


def load_bytes(store: Store, at_s: float) -> dict[int, int]:
    """Return hour of uptime → bytes booked, as stored; hours ahead of uptime `at_s` count as the present one.

    A power cut sets uptime back by the minutes since it was saved.
    """
    present = int(at_s // _HOUR_S)
    loaded: dict[int, int] = {}
    for hour, size in json.loads(store.get_meta(_BYTES_BY_HOUR, "[]")):
        loaded[min(hour, present)] = loaded.get(min(hour, present), 0) + size
    return loaded


def sum_last_day(bytes_by_hour: dict[int, int], at_s: float) -> int:
    """Return the bytes of the last 24 h, and of the begun hour before them."""
    return sum(size for hour, size in bytes_by_hour.items() if hour >= _first_hour(at_s))


def _first_hour(at_s: float) -> int:
    return int(at_s // _HOUR_S) - 24
