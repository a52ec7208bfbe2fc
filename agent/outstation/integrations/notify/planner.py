"""Planner: compares what a target knows with the present alerts, and gives its next message; pure.

Routing decides which alerts a target is notified of, and when.

- An open alert is notified once for each message that raised it, unless it was acknowledged or muted before.
- A muted alert is notified neither when it is raised nor when it is cleared.
- A cleared alert is told if its raising was, or was to be told: an alert that is over before anybody was told still
  happened.
- A reminder is for alerts that nobody acknowledged, and that something will clear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase

import msgspec

from outstation.foundation import clock
from outstation.integrations.notify.config import NotifyConfig, NotifyRoute
from outstation.integrations.notify.message import Change
from outstation.integrations.notify.queue import LedgerEntry
from outstation.protocol.alerts.alert import SEVERITY_RANK
from outstation.protocol.alerts.incident import Incident

# Alerts of one batch arrive together, those of several devices within a moment.
SETTLE_S = 1.0
DIGEST_SLACK_S = 3600.0
# More devices than this share one message.
MAX_SEPARATE_DEVICES = 3


def update_entry(
    entry: LedgerEntry | None, target: str, alert: Incident, delivery: Delivery, now_s: float
) -> LedgerEntry | None:
    """Return the entry as it is to be; None where there is nothing to know or to tell any more."""
    if not alert.is_open:
        return _after_clearing(entry, target, alert, delivery, now_s)
    entry = LedgerEntry(target, alert.key_text) if entry is None else msgspec.structs.replace(entry)
    is_silenced = alert.status != "raised"
    if entry.notified_seq < alert.raised_seq and not is_silenced:
        if entry.pending != "raised":
            entry.pending, entry.pending_since, entry.reminders = "raised", now_s, 0
    elif entry.pending in ("raised", "cleared") or is_silenced:
        entry.pending = entry.pending_since = None
    # A clock that was set back must not delay reminders.
    entry.notified_at = min(entry.notified_at, now_s)
    # A digest goes out a little after its time; the next one, a day later, must not come too early for its reminders.
    due_s = entry.notified_at + delivery.remind_every_s - (DIGEST_SLACK_S if delivery.digest else 0.0)
    is_due = (
        delivery.remind_every_s and entry.notified_seq and due_s <= now_s and not (alert.kind and alert.kind.is_event)
    )
    if is_due and entry.pending is None and not is_silenced:
        entry.pending, entry.pending_since = "reminder", due_s
    if entry.pending is None and not entry.notified_seq:
        return None
    return entry


def _after_clearing(
    entry: LedgerEntry | None, target: str, alert: Incident, delivery: Delivery, now_s: float
) -> LedgerEntry | None:
    was_silenced = alert.muted or (entry is None and alert.acknowledged)
    if was_silenced or (not delivery.recovery and (entry is None or entry.pending != "raised")):
        return None
    if entry is not None and entry.pending == "cleared":
        return entry
    entry = LedgerEntry(target, alert.key_text) if entry is None else msgspec.structs.replace(entry)
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

    `digest_s`: when the last digest was due. `may_compose`: the target got no message for [notify] group_for.
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


def mark_notified(entry: LedgerEntry, alert: Incident, now_s: float) -> LedgerEntry | None:
    """Return the entry after its message was composed; None for an alert that is over."""
    if entry.pending == "cleared":
        return None
    reminders = entry.reminders + (entry.pending == "reminder")
    changes = {"notified_seq": alert.raised_seq, "notified_at": now_s, "reminders": reminders}
    return msgspec.structs.replace(entry, **changes, pending=None, pending_since=None)


def group_changes(changes: Sequence[Change]) -> list[list[Change]]:
    """Return the changes of each device, or all together where they are of many devices."""
    by_device: dict[str, list[Change]] = {}
    for change in changes:
        by_device.setdefault(change.alert.device, []).append(change)
    return [*by_device.values()] if len(by_device) <= MAX_SEPARATE_DEVICES else [list(changes)]


class Delivery(msgspec.Struct, frozen=True):
    """Delivery of an alert to a target: the most urgent of all routes that lead there."""

    digest: bool
    quiet_hours: bool
    recovery: bool
    remind_every_s: float


def find_delivery(config: NotifyConfig, sender: str, target: str, alert: Incident) -> Delivery | None:
    """Return how `target` of `sender` is notified of an alert; None if it is not."""
    if alert.alert == "notify" and alert.subject == target and alert.device in ("", sender):
        # A target that fails is not notified of it; a device's own target may have the same name.
        return None
    routes = [route for route in config.effective_routes() if target in route.targets and _matches(route, alert)]
    if not routes:
        return None
    intervals = [config.remind_every if route.remind_every is None else route.remind_every for route in routes]
    return Delivery(
        digest=all(route.delivery == "digest" for route in routes),
        quiet_hours=all(route.quiet_hours for route in routes) and alert.severity != "critical",
        recovery=any(route.recovery for route in routes),
        remind_every_s=min((float(interval) for interval in intervals if interval), default=0.0),
    )


def is_quiet(config: NotifyConfig, now_s: float) -> bool:
    """Return True if `now_s` (epoch) is in the quiet hours."""
    span = config.quiet_span
    if span is None:
        return False
    now = clock.to_datetime(int(now_s * 1e6)).astimezone(config.zone).time()
    begin, end = span
    return begin <= now < end if begin < end else now >= begin or now < end


def last_digest_s(config: NotifyConfig, now_s: float) -> float:
    """Return when the last digest was due, epoch seconds."""
    now = clock.to_datetime(int(now_s * 1e6)).astimezone(config.zone)
    hour, minute = map(int, config.digest_at.split(":"))
    due = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (due if due <= now else due - timedelta(days=1)).timestamp()


def _matches(route: NotifyRoute, alert: Incident) -> bool:
    if SEVERITY_RANK[alert.severity] < SEVERITY_RANK[route.severity]:
        return False
    kinds = (alert.alert, f"{alert.alert}/{alert.subject}")
    return (
        (not route.devices or _any_match((alert.device,), route.devices))
        and (not route.groups or _any_match(alert.groups, route.groups))
        and (not route.kinds or _any_match(kinds, route.kinds))
    )


def _any_match(names: tuple[str, ...], patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
