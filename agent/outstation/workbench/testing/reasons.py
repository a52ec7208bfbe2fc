"""Reasons of failed waits: what a collector has of each device, its alerts, and the end of the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from outstation.fleet.database.store import FleetStore
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import UsageError

STATES = ("raised", "cleared")
_MAX_DEVICES, _MAX_ALERTS = 20, 20


def require_device(device: str, devices: Iterable[str]) -> None:
    """Raise UsageError for the name of no device; "" is none."""
    if device and device not in (known := [*devices]):
        raise UsageError(f"no device {device!r}{did_you_mean(device, known)}")


def match_alert(alerts: Sequence[dict[str, Any]], wanted: str, state: str) -> list[dict[str, Any]]:
    """Return the alerts of a kind, or about a subject, in a state. Raises UsageError for a state that no alert has."""
    if state not in STATES:
        raise UsageError(f"state {state!r}: an alert is {' or '.join(STATES)}{did_you_mean(state, STATES)}")
    return [row for row in alerts if row["state"] == state and wanted in ("", row["alert"], row["subject"])]


def describe_fleet(store: FleetStore, is_on: Mapping[str, bool], log: Iterable[str]) -> str:
    """Return what a collector has, one line each: devices with their last state, alerts, and the log."""
    progress = {row["device"]: row for row in store.progress()}
    lines = ["devices:"]
    for name, on in [*is_on.items()][:_MAX_DEVICES]:
        row = progress.get(name)
        power = "" if on else ", without power"
        if row is None:
            lines.append(f"  {name}: nothing has arrived{power}")
            continue
        drift = row["drift"] or "learning or without a window"
        counts = f"{row['messages']} messages, results up to row {row['rows']}, {row['windows']} drift windows"
        lines.append(f"  {name}: {counts}, drift: {drift}{power}")
    if len(is_on) > _MAX_DEVICES:
        lines.append(f"  … and {len(is_on) - _MAX_DEVICES} more")
    alerts = store.alerts(closed=True)
    lines.append(f"alerts: {len(alerts) or 'none'}")
    for row in alerts[-_MAX_ALERTS:]:
        lines.append(
            f"  {row['time']} {row['device']} {row['state']} {row['alert']} {row['subject']}: {row['summary']}"
        )
    tail = [*log]
    if tail:
        lines += ["log:", *(f"  {line}" for line in tail)]
    return "\n".join(lines)
