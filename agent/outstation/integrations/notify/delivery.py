"""Delivery of one notification: its deadline, the secrets that it needs, its failure, and the back-off after that.

Secrets are in files, read when they are used, so that a changed one counts at once, and never shown. A server that
sends a byte now and then never exceeds a timeout of single reads, so each delivery as a whole has one.
"""

from __future__ import annotations

import contextlib
import smtplib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from outstation.foundation import input_files
from outstation.foundation.backoff import Backoff
from outstation.foundation.errors import OutstationError, UsageError, explain
from outstation.integrations.notify.message import shorten

# Seconds for each read and write, and for one delivery as a whole.
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


MAX_BYTES = 4096


def read_secret(path: str, purpose: str) -> str:
    """Return the text of a file without the line break at its end. Raises UsageError; it names only the file."""
    try:
        data = input_files.read_bytes(Path(path))
        text = data.decode().strip("\r\n")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; it holds {purpose}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; it holds {purpose}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text; it holds {purpose}") from None
    if not text or len(data) > MAX_BYTES or "\n" in text or "\0" in text:
        raise UsageError(f"{path}: must hold one line of at most {MAX_BYTES} bytes: {purpose}")
    return text


MIN_DELAY_S, MAX_DELAY_S = 5.0, 3600.0


class SendFailed(OutstationError):
    """A target did not accept a message. `is_rejected`: it refuses this message, whenever it is sent.

    `retry_after_s`: what the target asks for; None if it asks for nothing.
    """

    def __init__(self, problem: str, *, is_rejected: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(problem)
        self.is_rejected, self.retry_after_s = is_rejected, retry_after_s


def describe(error: Exception) -> str:
    """Return what went wrong on the way to a server, and what to do about it if it is known."""
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError | smtplib.SMTPException):
        return shorten(explain(error, "server"), 200)
    return shorten(str(error) or type(error).__name__, 200)


def backoff_s(failures: int, retry_after_s: float | None = None) -> float:
    """Return seconds until the next attempt: 5 s, 10 s, 20 s … 1 h, less up to half, so that targets do not meet."""
    delay = Backoff(MIN_DELAY_S, MAX_DELAY_S).draw_s(failures)
    return min(max(delay, retry_after_s or 0.0), MAX_DELAY_S)
