"""Sending: the module of a target's kind, and one worker thread for each target.

A target that hangs delays no other one, and never the thread that plans.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from outstation.foundation.errors import OutstationError
from outstation.integrations.notify.config import AppriseTarget, EmailTarget, Target, WebhookTarget
from outstation.integrations.notify.delivery import SendFailed, read_secret
from outstation.integrations.notify.message import Notification, decode
from outstation.integrations.notify.queue import QueuedMessage

logger = logging.getLogger("outstation.notify")


class Outcome(msgspec.Struct, frozen=True):
    """The end of one attempt; `failure` is None if the target accepted the message."""

    message: QueuedMessage
    failure: SendFailed | None


def send(target: Target, message: Notification) -> None:
    """Deliver a message. Raises SendFailed."""
    try:
        _dispatch(target, message)
    except SendFailed:
        raise
    except OutstationError as error:
        raise SendFailed(str(error)) from None


def _dispatch(target: Target, message: Notification) -> None:
    # Nothing is imported for the kinds that the config does not use.
    if isinstance(target, WebhookTarget):
        from outstation.integrations.notify import webhook

        webhook.send(target, message)
    elif isinstance(target, EmailTarget):
        from outstation.integrations.notify import email

        email.send(target, message)
    elif isinstance(target, AppriseTarget):
        from outstation.integrations.notify import apprise

        apprise.send(target, message)
    else:
        from outstation.integrations.notify import mqtt

        mqtt.send(target, message)


def check(target: Target) -> str:
    """Return a line about a target whose secrets can be read; it sends nothing. Raises UsageError."""
    if isinstance(target, WebhookTarget):
        signed = "signed" if target.secret_file else "not signed: set secret_file"
        if target.secret_file:
            read_secret(target.secret_file, "the shared secret of a webhook")
        return f"webhook at {urlsplit(target.url).netloc}, {signed}"
    if isinstance(target, EmailTarget):
        if target.password_file:
            read_secret(target.password_file, "a mail password")
        return f"mail to {', '.join(target.to)} over {target.host}:{target.effective_port}, {target.security}"
    if isinstance(target, AppriseTarget):
        from outstation.integrations.notify import apprise

        return f"Apprise, service {apprise.load_service(target)[1]}"
    return f"retained document at {target.topic} on {target.broker.shown_url}"


def find_exposed_secret(target: Target) -> str | None:
    """Return the file of a target's secret that every user can read; None without one."""
    for name in ("secret_file", "password_file", "url_file"):
        path = getattr(target, name, None)
        if path is not None and Path(path).stat().st_mode & 0o007:
            return str(path)
    return None


class TargetWorker:
    """Sends one message at a time in a thread of its own, and hands the outcome back."""

    def __init__(
        self, name: str, target: Target, outcomes: queue.SimpleQueue[Outcome], wake: Callable[[], None]
    ) -> None:
        self._target, self._outcomes, self._wake = target, outcomes, wake
        self._inbox: queue.SimpleQueue[QueuedMessage | None] = queue.SimpleQueue()
        self.is_busy = False
        # A daemon thread: a server that hangs must not keep the process from ending; the message is still queued.
        self._thread = threading.Thread(target=self._run, name=f"notify-{name}", daemon=True)
        self._thread.start()

    def start(self, message: QueuedMessage) -> None:
        self.is_busy = True
        self._inbox.put(message)

    def stop(self) -> None:
        self._inbox.put(None)

    def _run(self) -> None:
        while (message := self._inbox.get()) is not None:
            failure = None
            try:
                send(self._target, decode(message.body))
            except SendFailed as failed:
                failure = failed
            except Exception as error:
                logger.exception("notification not sent")
                failure = SendFailed(f"internal error: {type(error).__name__}", is_rejected=True)
            self._outcomes.put(Outcome(message, failure))
            self._wake()
