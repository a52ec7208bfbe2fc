"""Child processes that decode or compute for the daemon: how they start, and how their end is described."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Start a child that ignores stop signals: stopping the daemon must not look like a crash of the child."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def describe_exit(code: int) -> str:
    """Return the signal's name or the exit code; `code` is negative for a signal. Real-time signals have no name."""
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
