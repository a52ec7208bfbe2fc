"""Bridge thread: runs one broker session after another beside a collector or a daemon, which never waits for it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from outstation.foundation.backoff import Backoff
from outstation.foundation.errors import OutstationError
from outstation.protocol.transport.mqtt import Link

logger = logging.getLogger("outstation.bridge")

_BACKOFF = Backoff(1.0, 60.0)
_STOP_TIMEOUT_S = 5.0


class BridgeThread:
    """Runs sessions inside its `with` block. It raises nothing, and connects again after every failure."""

    def __init__(
        self, name: str, run_session: Callable[[BridgeThread], None], is_active: Callable[[], bool] = lambda: True
    ) -> None:
        """`run_session` runs until `is_wanted` ends. `is_active`: as only one of several collectors publishes."""
        self._name, self._run_session, self._is_active = name, run_session, is_active
        self._stopping = threading.Event()
        self._link: Link | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread; its session says that nobody publishes any more."""
        self._stopping.set()
        if (link := self._link) is not None:
            link.wake()
        self._thread.join(_STOP_TIMEOUT_S)

    @property
    def is_wanted(self) -> bool:
        return not self._stopping.is_set() and self._is_active()

    @contextlib.contextmanager
    def connect(self, link: Link) -> Iterator[Link]:
        """Lend the link of a session, which the end of the thread wakes; close it afterwards."""
        self._link = link
        try:
            yield link
        finally:
            self._link = None
            link.close()

    def _main(self) -> None:
        failures, last_problem = 0, ""
        while not self._stopping.is_set():
            if not self._is_active():
                self._stopping.wait(1.0)
                continue
            began = time.monotonic()
            try:
                self._run_session(self)
                failures = 0
            except OutstationError as error:
                failures = 1 if time.monotonic() - began > _BACKOFF.longest_s else failures + 1
                if str(error) != last_problem:
                    logger.warning("%s: %s; trying again until it works", self._name, error)
                last_problem = str(error)
                self._stopping.wait(_BACKOFF.wait_s(failures))
            except Exception:
                logger.exception("%s: the bridge failed; it starts again in %g s", self._name, _BACKOFF.longest_s)
                self._stopping.wait(_BACKOFF.longest_s)
