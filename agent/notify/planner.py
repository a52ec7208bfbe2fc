"""Planner: from what a target knows and the present state of alerts to what it is told next; pure.

- An open alert is told once for each message that raised it, unless somebody acknowledged or muted it before.
- A muted alert is told neither when it is raised nor when it is cleared.
- A cleared alert is told if its raising was, or was to be told: an alert that is over before anybody was told still
  happened.
- A reminder is for alerts that nobody acknowledged, and that something will clear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from agent.notify.alert_state import AlertState
from agent.notify.message import Change
from agent.notify.queue import LedgerEntry
from agent.notify.routing import Delivery

# Alerts of one batch arrive together, those of several devices within a moment.
SETTLE_S = 1.0
DIGEST_SLACK_S = 3600.0
# More devices than this share one message.
MAX_SEPARATE_DEVICES = 3


def update_entry(
    entry: LedgerEntry | None, target: str, alert: AlertState, delivery: Delivery, now_s: float
) -> LedgerEntry | None:
    """Return the entry as it is to be; None where there is nothing to know or to tell any more."""
    if not alert.is_open:
        return _after_clearing(entry, target, alert, delivery, now_s)
    entry = LedgerEntry(target, alert.key) if entry is None else msgspec.structs.replace(entry)
    is_silenced = alert.status != "raised"
    if entry.notified_seq < alert.seq and not is_silenced:
        if entry.pending != "raised":
            entry.pending, entry.pending_since, entry.reminders = "raised", now_s, 0
    elif entry.pending in ("raised", "cleared") or is_silenced:
        entry.pending = entry.pending_since = None
    # A clock that was set back must not delay reminders.
    entry.notified_at = min(entry.notified_at, now_s)
    # A digest goes out a little after its time; the next one, a day later, must not come too early for its reminders.
    due_s = entry.notified_at + delivery.remind_every_s - (DIGEST_SLACK_S if delivery.digest else 0.0)
    is_due = delivery.remind_every_s and entry.notified_seq and due_s <= now_s and not alert.is_event
    if is_due and entry.pending is None and not is_silenced:
        entry.pending, entry.pending_since = "reminder", due_s
    if entry.pending is None and not entry.notified_seq:
        return None
    return entry


def _after_clearing(
    entry: LedgerEntry | None, target: str, alert: AlertState, delivery: Delivery, now_s: float
) -> LedgerEntry | None:
    was_silenced = alert.is_muted or (entry is None and alert.is_acknowledged)
    if was_silenced or (not delivery.recovery and (entry is None or entry.pending != "raised")):
        return None
    if entry is not None and entry.pending == "cleared":
        return entry
    entry = LedgerEntry(target, alert.key) if entry is None else msgspec.structs.replace(entry)
    entry.pending, entry.pending_since = "cleared", now_s
    return entry


def select_ready(
    entries: Iterable[LedgerEntry],
    deliveries: Mapping[str, Delivery],
    *,
    now_s: float,
    is_quiet: bool,
    digest_s: float,
    may_compose: bool,
) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
    """Return the pending entries of a target that go out now, and those of its digest.

    `digest_s`: when the last digest was due. `may_compose`: the target was told nothing for [notify] group_for.
    """
    at_once, digest = [], []
    for entry in entries:
        delivery = deliveries.get(entry.alert)
        if delivery is None or entry.pending_since is None:
            continue
        if delivery.digest:
            if entry.pending_since <= digest_s:
                digest.append(entry)
        elif not (is_quiet and delivery.quiet_hours):
            at_once.append(entry)
    # A clock that was set back must not hold anything back.
    settled = any(not now_s - SETTLE_S < (entry.pending_since or 0.0) <= now_s for entry in at_once)
    return (at_once if settled and may_compose else []), digest


def mark_notified(entry: LedgerEntry, alert: AlertState, now_s: float) -> LedgerEntry | None:
    """Return the entry after its message was composed; None for an alert that is over."""
    if entry.pending == "cleared":
        return None
    reminders = entry.reminders + (entry.pending == "reminder")
    changes = {"notified_seq": alert.seq, "notified_at": now_s, "reminders": reminders}
    return msgspec.structs.replace(entry, **changes, pending=None, pending_since=None)


def group_changes(changes: Sequence[Change]) -> list[list[Change]]:
    """Return the changes of each device, or all together where they are of many devices."""
    by_device: dict[str, list[Change]] = {}
    for change in changes:
        by_device.setdefault(change.alert.device, []).append(change)
    return [*by_device.values()] if len(by_device) <= MAX_SEPARATE_DEVICES else [list(changes)]
