"""Local times: texts without a time zone, read as those of one zone, in the order of a file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from outstation.foundation.clock import parse_local
from outstation.foundation.errors import UsageError


class LocalTimes:
    """Converter of a file's times from `zone`; their order decides between the passes of an hour that comes twice."""

    def __init__(self, zone: str) -> None:
        """Raise UsageError if this machine does not know the zone."""
        try:
            self._zone = ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise UsageError(
                f"--timezone {zone!r}: no time zone of this machine, such as Europe/Berlin or UTC"
            ) from None
        self._last_s = float("-inf")

    def convert(self, times: Sequence[Any]) -> list[Any]:
        """Return seconds since 1970 for texts that are local times; leave other values as they are."""
        return [self._convert_one(value) if isinstance(value, str) else value for value in times]

    def _convert_one(self, text: str) -> Any:
        moment = parse_local(text)
        if moment is None:
            return text
        early, late = (moment.replace(tzinfo=self._zone, fold=fold) for fold in (0, 1))
        if early.astimezone(UTC).astimezone(self._zone).replace(tzinfo=None) != moment:
            # The clocks went forward over it.
            return text
        seconds = early.timestamp() if early.timestamp() >= self._last_s else late.timestamp()
        self._last_s = max(self._last_s, seconds)
        return seconds
