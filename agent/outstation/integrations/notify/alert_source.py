"""The protocol of where notifications get their alerts from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from outstation.protocol.alerts.incident import Incident


class AlertSource(Protocol):
    """Alerts of a fleet or of one device. Methods raise StorageError; another thread may write meanwhile."""

    fleet: str
    sender: str
    """Who tells: the fleet, or the device."""

    def changed(self, cursor: int | None) -> tuple[int, list[Incident]]:
        """Return the next cursor, and the alerts with a message after `cursor`; with None all that are open."""

    def load(self, keys: Iterable[str]) -> dict[str, Incident]:
        """Return the alerts with these keys, as text; omit those that are no longer known."""

    def open_alerts(self) -> list[Incident]: ...

    def report_target(self, target: str, problem: str | None) -> None:
        """Raise the alert that a target fails, or clear it if `problem` is None."""
