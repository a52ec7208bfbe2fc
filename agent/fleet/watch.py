"""Live view of a fleet: every message with the result of its verification, as lines or as a table; read-only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from agent.config import BrokerConfig
from agent.errors import LinkDown, MessageRefused, StorageError, UsageError
from agent.fleet.collector import encryption_keys
from agent.fleet.collector.acknowledger import Backoff
from agent.fleet.collector.encryption_keys import EncryptionKeys
from agent.fleet.collector.subscriptions import topic_filters
from agent.fleet.database.keyring import Keyring
from agent.text import printable
from agent.transport.mqtt import Link
from agent.transport.packets import IncomingMessage, PublishReceipt
from agent.wire import topics
from agent.wire.messages import (
    AlertPayload,
    DriftPayload,
    LoggedPayload,
    ResultsPayload,
    StatePayload,
    VerifiedMessage,
    verify_message,
)

if TYPE_CHECKING:
    from rich.table import Table

# MQTT 5 reason for a client whose id another connection took.
TAKEN_OVER = "taken over"
# Called with a function that shows the connection's state ("" when connected), yields groups of deliveries.
DeliverySource = Callable[[Callable[[str], None]], Iterator[list[IncomingMessage]]]


class DeviceView(msgspec.Struct):
    """One device, from the messages since the watch began."""

    state: str = "?"
    clock: str = ""
    rows: dict[str, int] = msgspec.field(default_factory=dict)
    windows: int = 0
    results: int = 0
    last_time: str = ""
    drift: dict[str, str] = msgspec.field(default_factory=dict)
    alerts: dict[str, str] = msgspec.field(default_factory=dict)


class VerifiedDelivery(msgspec.Struct, frozen=True):
    """A delivery with its verified message, or the reason why it was refused."""

    delivery: IncomingMessage
    message: VerifiedMessage | None
    reason: str = ""

    def to_line(self) -> str:
        """Return `topic payload  [ok]`, with control characters escaped."""
        mark = "[ok]" if self.message else f"[refused: {self.reason}]"
        return f"{printable(self.delivery.topic)} {printable(self.delivery.payload.decode(errors='replace'))}  {mark}"


class FleetWatcher:
    """The state of the fleet, updated one delivery at a time."""

    def __init__(self, fleet: str, keyring: Keyring, encryption_keys: EncryptionKeys | None = None) -> None:
        self.fleet, self._keyring, self._encryption_keys = fleet, keyring, encryption_keys
        self.devices: dict[str, DeviceView] = {}
        self.refused = 0

    def verify(self, delivery: IncomingMessage) -> VerifiedDelivery:
        try:
            delivery = encryption_keys.unseal(delivery, self._encryption_keys)
            message = verify_message(delivery.topic, delivery.payload, delivery.tokens, self._keyring.find)
            self._keyring.require_in_bounds(message)
            # Only the collector signs acknowledgements: the key of another device must not pass for it.
            if topics.KINDS[message.topic.kind].to_device and message.signer.owner != "collector":
                raise MessageRefused("other signer", message.signer.owner)
        except MessageRefused as refused:
            self.refused += 1
            return VerifiedDelivery(delivery, None, str(refused))
        body = message.body
        view = self.devices.setdefault(body.device, DeviceView())
        if isinstance(body, StatePayload):
            view.state = body.state
        if isinstance(body, LoggedPayload):
            view.last_time, view.clock = body.time, body.clock
        if isinstance(body, ResultsPayload):
            view.rows[body.stream] = max(view.rows.get(body.stream, 0), body.rows[1])
            view.windows += body.n
            view.results += len(body.columns)
        elif isinstance(body, DriftPayload):
            view.drift[body.task] = body.state
        elif isinstance(body, AlertPayload) and body.state == "raised":
            view.alerts[body.id] = body.summary
        elif isinstance(body, AlertPayload):
            view.alerts.pop(body.id, None)
        return VerifiedDelivery(delivery, message)


def receive_deliveries(
    connect: Callable[[], Link], refresh: Callable[[], None], seconds: float | None, report: Callable[[str], None]
) -> Iterator[list[IncomingMessage]]:
    """Yield groups of deliveries, at least an empty one each half second; reconnect; end after `seconds` if given."""
    end = None if seconds is None else time.monotonic() + seconds
    retry = Backoff()
    while end is None or time.monotonic() < end:
        try:
            link = connect()
            try:
                report("")
                while end is None or time.monotonic() < end:
                    events = link.receive(0.5)
                    refresh()
                    yield [event for event in events if not isinstance(event, PublishReceipt)]
                    for event in events:
                        if isinstance(event, IncomingMessage):
                            link.acknowledge(event)
                    retry.reset()
            finally:
                link.close()
        except (LinkDown, StorageError) as down:
            if TAKEN_OVER in str(down).lower():
                raise UsageError("another `fleet watch` connected with this certificate; run one at a time") from None
            report(f"{down}; trying again")
            wake = time.monotonic() + retry.next_delay()
            while time.monotonic() < min(wake, end or wake):
                yield []
                time.sleep(0.1)


def connect(broker: BrokerConfig, fleet: str, name: str) -> Link:
    """Connect and subscribe to the topics that the collector reads, and to its acknowledgements."""
    return Link(broker, name, subscribe=[*topic_filters(fleet), f"{topics.ROOT}/{fleet}/+/ack"])


def show_lines(watcher: FleetWatcher, source: DeliverySource) -> None:
    """Print one line per message; problems with the connection go to stderr."""
    for group in source(lambda problem: print(problem, file=sys.stderr) if problem else None):
        for delivery in group:
            print(watcher.verify(delivery).to_line(), flush=True)


def show_table(watcher: FleetWatcher, source: DeliverySource) -> None:
    from rich.console import Console
    from rich.live import Live

    problem = ""

    def set_problem(text: str) -> None:
        nonlocal problem
        problem = text

    with Live(console=Console(), auto_refresh=False, transient=False) as live:
        for group in source(set_problem):
            for delivery in group:
                watcher.verify(delivery)
            live.update(_render_table(watcher, problem), refresh=True)


def _render_table(watcher: FleetWatcher, problem: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = problem or f"{watcher.refused} messages refused" if problem or watcher.refused else None
    title = f"fleet {watcher.fleet}" if watcher.devices else f"fleet {watcher.fleet}: no message yet"
    columns = ("device", "state", "rows", "windows", "results", "drift", "open alerts", "last message")
    table = Table(*columns, title=title, caption=printable(caption) if caption else None, box=box.SIMPLE_HEAD)
    for device, view in sorted(watcher.devices.items()):
        alerts = list(view.alerts.values())
        cells = (
            device,
            f"{view.state}, clock {view.clock}" if view.clock not in ("", "synced") else view.state,
            ", ".join(f"{stream} {row}" for stream, row in sorted(view.rows.items())),
            str(view.windows),
            str(view.results),
            ", ".join(f"{task} {state}" for task, state in sorted(view.drift.items())),
            f"{len(alerts)}: {alerts[-1]}" if alerts else "",
            view.last_time,
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
