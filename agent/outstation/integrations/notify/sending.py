"""Sending: the module of a target's kind, and one worker thread for each target.

A target that hangs delays no other one, and never the thread that plans.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from outstation.foundation.errors import OutstationError
from outstation.integrations.notify.config import TARGETS, TargetSection
from outstation.integrations.notify.delivery import SendFailed
from outstation.integrations.notify.message import Notification, decode
from outstation.integrations.notify.queue import QueuedMessage

logger = logging.getLogger("outstation.notify")


class Outcome(msgspec.Struct, frozen=True):
    """The end of one attempt; `failure` is None if the target accepted the message."""

    message: QueuedMessage
    failure: SendFailed | None


class TargetModule(Protocol):
    """Module of one kind of target, of ours or of another package; `target` is its config section.

    That of another package also has the class of the section, `Config`.
    """

    def send(self, target: Any, message: Notification) -> None:
        """Deliver a message within `delivery.TIMEOUT_S`. Raises SendFailed, UsageError."""
        ...

    def check(self, target: Any) -> str:
        """Return a line about a target whose secrets can be read; send nothing. Raises UsageError."""
        ...


def load_module(target: TargetSection) -> TargetModule:
    """Return the module of a target's kind. Raises ConfigError."""
    module: TargetModule = TARGETS.load(target.kind, "notify", "targets.NAME.kind")
    return module


def send(target: TargetSection, message: Notification) -> None:
    """Deliver a message. Raises SendFailed."""
    try:
        load_module(target).send(target, message)
    except SendFailed:
        raise
    except OutstationError as error:
        raise SendFailed(str(error)) from None
    except Exception as error:
        # Code of another package raises anything.
        if TARGETS.is_shipped(target.kind):
            raise
        raise SendFailed(f"{type(error).__name__}: {error}") from error


def find_exposed_secret(target: TargetSection) -> Path | None:
    """Return the file of a target's secret that every user can read; None without one."""
    return next((file for file in target.secret_files if file.stat().st_mode & 0o007), None)


class TargetWorker:
    """Sends one message at a time in a thread of its own, and hands the outcome back."""

    def __init__(
        self, name: str, target: TargetSection, outcomes: queue.SimpleQueue[Outcome], wake: Callable[[], None]
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
