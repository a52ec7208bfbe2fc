"""Signals: flags that other threads and signal handlers set for the main loop of the daemon."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable

import msgspec

from outstation.device.config import Config
from outstation.device.machine.systemd import notify


class Signals(msgspec.Struct):
    """Flags that other threads and signal handlers set for the main loop."""

    is_stopping: bool = False
    # No daemon follows in this process, also if this one stops for a reload or a new log.
    is_terminating: bool = False
    failure: Exception | None = None
    is_reload_requested: bool = False
    # Reads the config again; None if it is invalid, and the daemon keeps its own.
    read_config: Callable[[], Config | None] = lambda: None
    # Config of the daemon that follows this one in the same process.
    next_config: Config | None = None
    # While the first models load, nothing else feeds the watchdog of a daemon that reloads.
    on_model_wait: Callable[[], None] = lambda: notify("WATCHDOG=1")
    # Not a threading.Event: a signal handler that runs inside Event.wait can deadlock on the Event's lock.
    _wake_queue: queue.SimpleQueue[None] = msgspec.field(default_factory=queue.SimpleQueue)

    def wake(self) -> None:
        if self._wake_queue.empty():
            self._wake_queue.put(None)

    @property
    def is_quiet(self) -> bool:
        """Return True if `wake` was not called since the last `wait`."""
        return self._wake_queue.empty()

    def wait(self, timeout_s: float) -> None:
        """Return at the next `wake`, at once after one since the last `wait`, or after `timeout_s`."""
        with contextlib.suppress(queue.Empty):
            self._wake_queue.get(timeout=max(0.0, timeout_s))

    def fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self.request_stop()

    def request_stop(self) -> None:
        self.is_stopping = True
        self.wake()

    def terminate(self) -> None:
        self.is_terminating = True
        self.next_config = None
        self.request_stop()

    def request_reload(self) -> None:
        self.is_reload_requested = True
        self.wake()

    def begin_reload(self) -> None:
        """Read the config again, and stop for a daemon with it; an invalid one changes nothing."""
        self.is_reload_requested = False
        self.next_config = self.read_config()
        if self.is_terminating:
            # Since the config was read: `terminate` runs between any two instructions.
            self.next_config = None
        elif self.next_config is not None:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=")
            self.request_stop()
