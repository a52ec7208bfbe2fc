"""The present state of an alert, as notifications need it, and the protocol of where it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

import msgspec

from outstation.protocol.alerts.alert import Severity

Status = Literal["raised", "acknowledged", "muted", "cleared"]
SEVERITY_RANK = {"info": 1, "warning": 2, "critical": 3}


class AlertState(msgspec.Struct, frozen=True):
    """An alert now. `key` identifies it; `seq` is that of its newest message that raised it.

    `severity` and `summary` are those of the message that raised it, also after it was cleared. `ref`: what a command
    names it by, empty on a device. `is_event`: nothing clears it. `title` and `action`: of its kind.
    """

    key: str
    seq: int
    status: Status
    severity: Severity
    device: str
    task: str | None
    alert: str
    subject: str
    summary: str
    raised: str
    updated: str
    revision: int = 1
    ref: str = ""
    title: str = ""
    action: str = ""
    cleared_summary: str | None = None
    is_muted: bool = False
    is_acknowledged: bool = False
    is_event: bool = False
    groups: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        return self.status != "cleared"


class AlertSource(Protocol):
    """Alerts of a fleet or of one device. Methods raise StorageError; another thread may write meanwhile."""

    fleet: str
    sender: str
    """Who tells: the fleet, or the device."""

    def changed(self, cursor: int | None) -> tuple[int, list[AlertState]]:
        """Return the next cursor, and the alerts with a message after `cursor`; with None all that are open."""

    def load(self, keys: Iterable[str]) -> dict[str, AlertState]:
        """Return the alerts with these keys; omit those that are no longer known."""

    def open_alerts(self) -> list[AlertState]: ...

    def report_target(self, target: str, problem: str | None) -> None:
        """Raise the alert that a target fails, or clear it if `problem` is None."""
