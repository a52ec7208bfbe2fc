"""Notifier of a device whose config has [notify]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from agent.clock import ClockReading
from agent.config import Config
from agent.device.notifications import DeviceAlertSource, NotifyFile, open_notifications
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.notify.notifier import NotifierThread


def build(
    conf: Config, store: Store, message_log: MessageLog, now: Callable[[], ClockReading]
) -> NotifierThread[NotifyFile]:
    """Build the thread, which opens its own file; the store takes turns among threads."""
    source = DeviceAlertSource(store, message_log, conf.device.fleet, conf.device.id, now)
    return NotifierThread(conf.notify, partial(open_notifications, conf.data_dir, source))
