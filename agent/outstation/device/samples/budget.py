"""Budget of samples: bytes a day of all tasks, in part reserved for alerts and requests.

A day is 24 h during which the device is on: a clock that is set, or a battery that is changed, opens no new budget.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from outstation.device.config import SamplesConfig
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.day_window import DAY_S

Reason = Literal["alert", "uncertain", "requested"]

_META = "samples budget"
# Share of a day's bytes that all reasons together may have used after a message of this one.
SHARES: dict[Reason, float] = {"uncertain": 0.5, "alert": 0.75, "requested": 1.0}
COVERED, _DROPPED = "samples covered", "samples dropped."


class SampleBudget(msgspec.Struct, frozen=True):
    """Bytes of the day that began at the uptime `began_s`."""

    began_s: float
    used: int = 0

    def spend(self, size: int, limit: int, reason: Reason) -> SampleBudget | None:
        """Return the budget after a message of `size` bytes; None if it does not fit."""
        used = self.used + size
        return SampleBudget(self.began_s, used) if used <= limit * SHARES[reason] else None


def load(tx: Transaction, now: ClockReading) -> SampleBudget:
    return _decode(tx.get_meta(_META, ""), tx.uptime_s(now))


def save(tx: Transaction, budget: SampleBudget) -> None:
    tx.set_meta(_META, msgspec.json.encode(budget).decode())


def count_drop(tx: Transaction, reason: str) -> None:
    tx.increment_counter(_DROPPED + reason, 1)


def to_status(store: Store, config: SamplesConfig | None, now: ClockReading) -> dict[str, Any]:
    """Return the member `samples` of health and status: the consent, the limits, and what was sent and dropped."""
    if config is None:
        return {}
    counters = store.counters()
    uptime_s = store.uptime_s(now)
    dropped = {name.removeprefix(_DROPPED): n for name, n in counters.items() if name.startswith(_DROPPED)}
    return {
        "samples": {
            "consent": config.consent,
            "tasks": config.tasks,
            "max_per_day": int(config.max_per_day),
            "bytes_today": _decode(store.get_meta(_META, ""), uptime_s).used,
            "sent": counters.get("messages.samples", 0),
            "covered": counters.get(COVERED, 0),
            "dropped": dropped,
        }
    }


def _decode(text: str, uptime_s: float) -> SampleBudget:
    """Return the budget of the current day; one that cannot be read is used up, until the day after."""
    try:
        budget = decoders.from_json(text, SampleBudget) if text else SampleBudget(uptime_s)
    except msgspec.MsgspecError:
        budget = SampleBudget(uptime_s, 1 << 62)
    return budget if 0 <= uptime_s - budget.began_s < DAY_S else SampleBudget(uptime_s)
