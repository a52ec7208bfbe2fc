"""Shared parts of `demo` and `fleet simulate`: the folder, the exit on signals, the audit line."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from outstation.foundation.cli.options import PATH
from outstation.foundation.cli.output import echo, echo_styled
from outstation.foundation.errors import UsageError
from outstation.foundation.text import pluralize

dir_option = click.option("--dir", "folder", type=PATH, help="Keep everything here; default a temporary folder.")


def exit_on_signals() -> None:
    """Exit on SIGTERM and SIGHUP as on Ctrl-C, so that started processes end."""
    for number in _list_handled(signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: _exit_on(number))


@contextlib.contextmanager
def deferred_exit() -> Iterator[Callable[[], None]]:
    """Provide a function that exits if a signal has come; a second signal exits at once.

    An exception inside a transaction would leave its end to the garbage collector, when the database is closed.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            _exit_on(number)
        received.append(number)

    def leave() -> None:
        if received:
            _exit_on(received[0])

    handled = _list_handled(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in handled}
    try:
        yield leave
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _list_handled(*numbers: signal.Signals) -> list[signal.Signals]:
    """Return the signals that this process does not ignore, as under nohup."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _exit_on(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@contextlib.contextmanager
def open_folder(requested: Path | None) -> Iterator[Path]:
    """Provide the requested folder, or a temporary one. Raises UsageError if it is not empty."""
    if requested is None:
        with tempfile.TemporaryDirectory(prefix="outstation-") as made:
            yield Path(made)
        return
    requested.mkdir(parents=True, exist_ok=True)
    if any(requested.iterdir()):
        raise UsageError(f"{requested}: not empty; name a new folder")
    yield requested


def print_audit(audit: dict[str, Any], seconds: float) -> None:
    verdict = click.style("passed", fg="green") if audit["passed"] else click.style("FAILED", fg="red")
    messages, devices = pluralize(audit["messages"], "signed message"), pluralize(audit["devices"], "device")
    echo_styled(f"audit {verdict}: {messages} of {devices}; {seconds:g} s")
    for problem in audit["invalid"][:10]:
        echo(f"  {problem['device']} seq {problem['seq']}: {problem['reason']}")
    for problem in audit.get("invalid_decisions", [])[:10]:
        echo(f"  roll-out {problem['rollout']}, decision {problem['n']}: {problem['reason']}")
