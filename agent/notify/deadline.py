"""Deadline of one delivery: a server that sends a byte now and then never exceeds a timeout of single reads."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

# Of each read and write, and of one delivery as a whole.
TIMEOUT_S, TOTAL_S = 10.0, 30.0


@contextlib.contextmanager
def limit_total(find_socket: Callable[[], socket.socket | None], seconds: float = TOTAL_S) -> Iterator[None]:
    """Shut the socket down after `seconds`; whatever reads it then fails."""

    def end() -> None:
        if (open_socket := find_socket()) is not None:
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
