"""Incident: an alert with all its messages, and what people said about it."""

from __future__ import annotations

import json
from typing import Literal

import msgspec

from outstation.protocol.alerts.alert import AlertKind, Severity
from outstation.protocol.alerts.kinds import find_kind

Status = Literal["raised", "acknowledged", "muted", "cleared"]
# (source, device, log, ID): all messages of an incident have them.
IncidentKey = tuple[str, str, str, str]


class Acknowledgement(msgspec.Struct, frozen=True):
    by: str
    at: str
    note: str


class Mute(msgspec.Struct, frozen=True):
    until: str
    by: str
    at: str
    note: str


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """An alert with all its messages; `device` is empty where it concerns the whole fleet.

    `ref` names it in commands and addresses, empty on a device. `raised`: when it began. `updated`, `seq`: of its
    newest message; `raised_seq`: of the newest that raised it, with `severity` and `summary`, also once cleared.
    `acknowledged` is None once a newer message ended it; `muted` once its time is over. `groups`: of the device, where
    routes of notifications ask for them.
    """

    status: Status
    severity: Severity
    device: str
    task: str | None
    alert: str
    subject: str
    summary: str
    raised: str
    updated: str
    id: str
    seq: int
    raised_seq: int
    ref: str = ""
    revision: int = 1
    source: Literal["device", "collector"] = "device"
    log: str = ""
    cleared: str | None = None
    cleared_summary: str | None = None
    acknowledged: Acknowledgement | None = None
    muted: Mute | None = None
    groups: tuple[str, ...] = ()

    @property
    def key(self) -> IncidentKey:
        return self.source, self.device, self.log, self.id

    @property
    def key_text(self) -> str:
        return json.dumps(self.key)

    @property
    def is_open(self) -> bool:
        return self.status != "cleared"

    @property
    def kind(self) -> AlertKind | None:
        """Return its kind, with meaning and action; None for an alert of a newer version."""
        return find_kind(self.alert, self.subject, self.id, self.task, from_collector=self.source == "collector")
