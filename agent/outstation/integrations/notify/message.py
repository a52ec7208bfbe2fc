"""Notifications: what a person reads, composed once from the states of alerts.

Everything that a device wrote is made printable on one line and cut: no line break reaches a header, no control or
bidirectional character a screen, and nothing is markup.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal
from zoneinfo import ZoneInfo

import msgspec

from outstation.foundation import clock, decoders
from outstation.foundation.text import printable
from outstation.integrations.notify.queue import Pending
from outstation.protocol.alerts.alert import SEVERITY_RANK
from outstation.protocol.alerts.incident import Incident

MAX_ENTRIES, MAX_SUMMARY, MAX_SUBJECT, MAX_NAME = 20, 600, 160, 80

MessageKind = Literal["alerts", "reminder", "recovery", "digest", "test", "open"]


class Change(msgspec.Struct, frozen=True):
    """Change of one alert that a message reports; `number` counts its reminders."""

    alert: Incident
    pending: Pending
    number: int = 0


class Notification(msgspec.Struct, frozen=True):
    """A message to one target; `key` names it, the same for the same states of the same alerts."""

    key: str
    kind: MessageKind
    sender: str
    fleet: str
    time: str
    severity: str
    subject: str
    text: str
    alerts: list[dict[str, str | int | None]]
    omitted: int = 0
    v: int = 1


def encode(message: Notification) -> bytes:
    return msgspec.json.encode(message)


def decode(body: bytes) -> Notification:
    return decoders.from_json(body, Notification)


def shorten(text: str, limit: int) -> str:
    """Return text on one line that no terminal, header or page takes for anything else, cut to `limit` characters."""
    # First cut: escapes of a very long text would only be thrown away.
    safe = printable(" ".join(text[: 2 * limit].split()))
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def compose(
    target: str, changes: Sequence[Change], *, sender: str, fleet: str, zone: ZoneInfo, now_s: float, is_digest: bool
) -> Notification:
    """Compose one message of at least one change, the most severe first."""
    ordered = sorted(changes, key=lambda c: (c.pending == "cleared", -SEVERITY_RANK[c.alert.severity], c.alert.raised))
    states = sorted((c.alert.key_text, c.alert.raised_seq, c.pending, c.number) for c in changes)
    key = hashlib.sha256(msgspec.json.encode([sender, target, states])).hexdigest()[:32]
    shown, omitted = ordered[:MAX_ENTRIES], len(ordered) - MAX_ENTRIES
    pending = {change.pending for change in changes}
    kind: MessageKind = "alerts"
    if is_digest:
        kind = "digest"
    elif pending == {"cleared"}:
        kind = "recovery"
    elif pending == {"reminder"}:
        kind = "reminder"
    lines = [_describe(change, zone) for change in shown]
    if omitted > 0:
        lines.append(f"… and {omitted} more; see `outstation fleet alerts`.")
    severity = max((c.alert.severity for c in changes), key=lambda s: SEVERITY_RANK[s])
    return Notification(
        *(key, kind, sender, fleet, clock.to_rfc3339(round(now_s * 1e6)), severity),
        subject=_subject(kind, ordered, sender),
        text="\n\n".join(lines) + "\n",
        alerts=[_document(change) for change in shown],
        omitted=max(omitted, 0),
    )


def compose_open(alerts: Iterable[Incident], *, sender: str, fleet: str, now_s: float) -> Notification:
    """Compose the retained document of all open alerts; its key changes with them alone."""
    ordered = sorted(alerts, key=lambda alert: (-SEVERITY_RANK[alert.severity], alert.raised, alert.key_text))
    states = [(alert.key_text, alert.raised_seq, alert.status) for alert in ordered]
    key = hashlib.sha256(msgspec.json.encode([sender, states])).hexdigest()[:32]
    severity = ordered[0].severity if ordered else "info"
    return Notification(
        *(key, "open", sender, fleet, clock.to_rfc3339(round(now_s * 1e6)), severity),
        subject=f"{len(ordered)} open alerts",
        text="",
        alerts=[_document(Change(alert, "raised")) for alert in ordered[:MAX_ENTRIES]],
        omitted=max(len(ordered) - MAX_ENTRIES, 0),
    )


def compose_test(target: str, *, sender: str, fleet: str, now_s: float) -> Notification:
    time = clock.to_rfc3339(round(now_s * 1e6))
    key = hashlib.sha256(f"{sender} {target} {time}".encode()).hexdigest()[:32]
    text = f"A test of target {target}, sent by {sender} at {time}. Nothing is wrong.\n"
    return Notification(key, "test", sender, fleet, time, "info", f"{sender}: test of notifications", text, [])


def _subject(kind: MessageKind, ordered: Sequence[Change], sender: str) -> str:
    first = ordered[0].alert
    place = shorten(first.device or sender, MAX_NAME)
    devices = {change.alert.device for change in ordered}
    if kind == "digest":
        text = f"{sender}: {len(ordered)} changes of alerts on {len(devices)} devices"
    elif len(ordered) == 1:
        word = {"cleared": "cleared: ", "reminder": "still open: "}.get(ordered[0].pending, "")
        text = f"[{first.severity}] {place}: {word}{first.summary}"
    elif len(devices) == 1:
        text = f"[{first.severity}] {place}: {len(ordered)} alerts: {first.summary}"
    else:
        text = f"[{first.severity}] {len(ordered)} alerts on {len(devices)} devices, {place}: {first.summary}"
    return shorten(text, MAX_SUBJECT)


def _describe(change: Change, zone: ZoneInfo) -> str:
    alert = change.alert
    where = shorten(alert.device or "the fleet", MAX_NAME) + (
        f", task {shorten(alert.task, MAX_NAME)}" if alert.task else ""
    )
    state = {"raised": alert.severity if alert.revision == 1 else f"{alert.severity}, worse", "reminder": "still open"}
    lines = [f"[{state.get(change.pending, 'cleared')}] {where}: {shorten(alert.summary, MAX_SUMMARY)}"]
    since = f"since {_local(alert.raised, zone)}"
    if change.pending == "cleared" and alert.cleared_summary is not None:
        since += f", cleared {_local(alert.updated, zone)}"
        if alert.cleared_summary:
            since += f": {shorten(alert.cleared_summary, MAX_SUMMARY)}"
    elif change.pending == "cleared":
        since += "; no message cleared it: another log took the place of its log, or the device was removed"
    lines.append("  " + since)
    if alert.kind and change.pending != "cleared":
        lines.append(f"  What to do: {alert.kind.action}")
    if alert.ref and change.pending != "cleared":
        lines.append(f"  Take it: outstation fleet alerts acknowledge {alert.ref}")
    return "\n".join(lines)


def _document(change: Change) -> dict[str, str | int | None]:
    alert = change.alert
    return {
        "id": alert.ref or alert.key_text,
        "device": shorten(alert.device, MAX_NAME),
        "task": None if alert.task is None else shorten(alert.task, MAX_NAME),
        "alert": shorten(alert.alert, MAX_NAME),
        "subject": shorten(alert.subject, MAX_NAME),
        "title": alert.kind.title if alert.kind else "",
        "severity": alert.severity,
        "state": "cleared" if change.pending == "cleared" else alert.status,
        "change": change.pending,
        "summary": shorten(alert.summary, MAX_SUMMARY),
        "raised": alert.raised,
        "updated": alert.updated,
        "revision": alert.revision,
        "action": alert.kind.action if alert.kind else "",
    }


def _local(time: str, zone: ZoneInfo) -> str:
    try:
        moment = clock.to_datetime(clock.parse_rfc3339(time)).astimezone(zone)
    except (ValueError, OverflowError, OSError):
        return shorten(time, MAX_NAME)
    return f"{moment:%Y-%m-%d %H:%M:%S %Z}"
