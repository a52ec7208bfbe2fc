"""`fleet watch` on the terminal: lines, or a live table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent.fleet.watch import FleetWatcher
from agent.text import printable
from agent.transport.packets import IncomingMessage

# Given a function that shows a line about the connection ("" when it is fine), yields groups of deliveries.
DeliverySource = Callable[[Callable[[str], None]], Iterator[list[IncomingMessage]]]


def show_lines(watcher: FleetWatcher, source: DeliverySource) -> None:
    """One line per message; troubles with the connection go to stderr."""
    for group in source(lambda trouble: print(trouble, file=sys.stderr) if trouble else None):
        for delivery in group:
            print(watcher.verify(delivery).to_line(), flush=True)


def show_table(watcher: FleetWatcher, source: DeliverySource) -> None:
    """A live table of the devices until the source ends."""
    trouble = ""

    def set_trouble(text: str) -> None:
        nonlocal trouble
        trouble = text

    with Live(console=Console(), auto_refresh=False, transient=False) as live:
        for group in source(set_trouble):
            for delivery in group:
                watcher.verify(delivery)
            live.update(_table(watcher, trouble), refresh=True)


def _table(watcher: FleetWatcher, trouble: str) -> Table:
    caption = trouble or f"{watcher.refused} messages refused" if trouble or watcher.refused else None
    title = f"fleet {watcher.fleet}" if watcher.devices else f"fleet {watcher.fleet}: no message yet"
    columns = ("device", "state", "rows", "windows", "results", "drift", "open alerts", "last message")
    table = Table(*columns, title=title, caption=printable(caption) if caption else None, box=box.SIMPLE_HEAD)
    for device, seen in sorted(watcher.devices.items()):
        rows = ", ".join(f"{stream} {row}" for stream, row in sorted(seen.rows.items()))
        numbers = (rows, str(seen.windows), str(seen.results))
        state = f"{seen.state}, clock {seen.clock}" if seen.clock not in ("", "synced") else seen.state
        line = (
            device,
            state,
            *numbers,
            _join_states(seen.drift.items()),
            _summarize_alerts(seen.alerts.values()),
            seen.last_time,
        )
        table.add_row(*(Text(printable(cell)) for cell in line))
    return table


def _join_states(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{task} {state}" for task, state in sorted(pairs))


def _summarize_alerts(summaries: Iterable[str]) -> str:
    listed = list(summaries)
    return f"{len(listed)}: {listed[-1]}" if listed else ""
