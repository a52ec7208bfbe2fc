"""Child processes that decode or compute for the daemon: how they start, and how their end is described."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping

# Variables that start Python; a password or token in the environment never reaches the child.
_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "PATH", "LC_ALL", "LANG")
# Threads of NumPy's BLAS spin for tens of milliseconds when they start, and our matrices are too small for them.
ONE_BLAS_THREAD = {"OPENBLAS_NUM_THREADS": "1"}


def child_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a process that is to be confined."""
    return {name: environ[name] for name in _ENVIRONMENT if name in environ} | ONE_BLAS_THREAD


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
