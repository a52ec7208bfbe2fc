"""Subscriptions of the collectors: topic filters, and the group that shares messages among several collectors."""

from __future__ import annotations

import secrets

from outstation.protocol.wire import topics


def make_share_group() -> str:
    """Make the name of the shared subscriptions' group, which nobody can guess."""
    return secrets.token_hex(16)


def logged_filters(fleet: str, *, group: str | None = None) -> list[str]:
    """Return the topic filters of the kinds that a device numbers in its log; they are never retained.

    `group`: name of the shared subscriptions (MQTT 5), None for a single collector.
    """
    kinds = [kind for kind in topics.KINDS.values() if kind.logged]
    share = f"$share/{group}/" if group else ""
    return [f"{share}{topics.ROOT}/{fleet}/+/{kind.name}" + ("/+" if kind.per_task else "") for kind in kinds]


def topic_filters(fleet: str, *, group: str | None = None) -> list[str]:
    """Return the topic filters of everything that collectors receive.

    Retained topics are never shared: the broker sends nothing retained to a shared subscription, and two collectors
    could store the states of a device in the wrong order.
    """
    kinds = [kind for kind in topics.KINDS.values() if kind.retained and not kind.to_device]
    return logged_filters(fleet, group=group) + [f"{topics.ROOT}/{fleet}/+/{kind.name}" for kind in kinds]
