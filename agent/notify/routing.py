"""Routing: which alerts a target is told of, and when; pure functions of the config, an alert and the time."""

from __future__ import annotations

from datetime import timedelta
from fnmatch import fnmatchcase

import msgspec

from agent import clock
from agent.config.notify import NotifyConfig, NotifyRoute
from agent.notify.alert_state import SEVERITY_RANK, AlertState


class Delivery(msgspec.Struct, frozen=True):
    """Delivery of an alert to a target: the most urgent of all routes that lead there."""

    digest: bool
    quiet_hours: bool
    recovery: bool
    remind_every_s: float


def find_delivery(config: NotifyConfig, sender: str, target: str, alert: AlertState) -> Delivery | None:
    """Return how `target` of `sender` is told of an alert; None if it is not."""
    if alert.alert == "notify" and alert.subject == target and alert.device in ("", sender):
        # A target that fails is not told so itself; a device's own target may have the same name.
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


def _matches(route: NotifyRoute, alert: AlertState) -> bool:
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
