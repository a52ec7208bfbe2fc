"""Values of options that name a time: a time, or how long ago."""

from __future__ import annotations

from datetime import UTC, datetime

from agent import clock
from agent.config import parse_duration
from agent.errors import UsageError


def parse_since(option: str, text: str, now_us: int) -> str:
    """Return a time, or the time a duration ago, as RFC 3339. Raises UsageError."""
    try:
        return clock.to_rfc3339(now_us - int(float(parse_duration(text)) * 1e6))
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f'{option} {text!r}: use a duration ("24 h", "7 d") or time (2026-11-24T22:18:00Z)') from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return clock.to_rfc3339(int(moment.timestamp() * 1e6))
