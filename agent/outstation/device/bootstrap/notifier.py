"""Notifier of a device whose config has [notify], and the end of one whose config has it no more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from outstation.device.config import Config
from outstation.device.notifications import DeviceAlertSource, NotifyFile, forget_notifications, open_notifications
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageError
from outstation.integrations.notify.notifier import NotifierThread

logger = logging.getLogger("outstation.notify")


def build(
    conf: Config, store: Store, message_log: MessageLog, now: Callable[[], ClockReading]
) -> NotifierThread[NotifyFile] | None:
    """Build the thread, which opens its own file; the store takes turns among threads. None without targets."""
    source = DeviceAlertSource(store, message_log, conf.device.fleet, conf.device.id, now)
    if not conf.notify.is_on:
        try:
            forget_notifications(conf.data_dir, source)
        except StorageError as error:
            logger.warning("%s; alerts about removed targets are cleared at the next start", error)
        return None
    return NotifierThread(conf.notify, partial(open_notifications, conf.data_dir, source))
