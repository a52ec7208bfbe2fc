"""Live view of a fleet: every message with the result of its verification, as lines or as a table; read-only."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from outstation.fleet.collector import encryption_keys
from outstation.fleet.collector.acknowledger import BACKOFF
from outstation.fleet.collector.encryption_keys import EncryptionKeys
from outstation.fleet.collector.subscriptions import topic_filters
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from outstation.foundation.backoff import Retries
from outstation.foundation.errors import LinkDown, MessageRefused, StorageError, UsageError
from outstation.foundation.text import printable
from outstation.protocol.alerts.alert import SEVERITY_RANK, Alert
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, PublishReceipt
from outstation.protocol.wire import topics
from outstation.protocol.wire.messages import AlertPayload, DriftPayload, LoggedPayload, StatePayload
from outstation.protocol.wire.verification import VerifiedMessage, verify_message

if TYPE_CHECKING:
    from rich.table import Table

# MQTT 5 reason for a client whose id another connection took.
TAKEN_OVER = "taken over"
_AGE_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))
# Title, head and caption of the table.
_LINES_AROUND = 6
_COLUMNS = ("device", "state", "seen", "drift", "alerts")
# Columns by what a line must say first: which device, when it was seen, its state.
_COLUMN_PRIORITY = (0, 2, 1, 3, 4)
# Characters between columns and at both ends.
_GAPS_WIDTH = 3 * (len(_COLUMNS) - 1) + 2
_SEVERITY_STYLES = {"info": "", "warning": "yellow", "critical": "bold red"}
_STATE_STYLES = {"online": "green", "offline": "red", "revoked": "red", "stopped": "dim", "enrolled": "dim"}
# Called with a function that shows the connection's state ("" when connected), yields groups of deliveries.
DeliverySource = Callable[[Callable[[str], None]], Iterator[list[IncomingMessage]]]


class DeviceView(msgspec.Struct):
    """One device: what the database knew when the watch began, then what its messages say.

    `seen_us`: when a message last arrived, epoch µs. `windows`: state of the newest drift window of each task.
    """

    state: str = "?"
    clock: str = ""
    seen_us: int | None = None
    windows: dict[str, str] = msgspec.field(default_factory=dict)
    alerts: dict[str, Alert] = msgspec.field(default_factory=dict)


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

    def load(self, store: FleetStore) -> None:
        """Begin with the state of the fleet in the database. Raises StorageError."""
        for row in store.devices():
            seen = None if row["last_seen"] is None else clock.parse_rfc3339(row["last_seen"])
            self.devices[row["device"]] = DeviceView(row["state"] or "enrolled", row["clock"] or "", seen)
        for row in store.alerts():
            # Of a device; the collector's own alerts about the fleet have none.
            if (view := self.devices.get(row["device"])) is not None and row["state"] == "raised":
                alert = Alert(
                    row["alert"],
                    row["subject"],
                    "raised",
                    row["severity"],
                    row["id"],
                    row["summary"],
                    {},
                    row["revision"],
                )
                view.alerts[f"collector/{alert.id}" if row["source"] == "collector" else alert.id] = alert

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
            # The broker keeps the newest one, however old it is.
            view.state, sent_us = body.state, clock.parse_rfc3339(body.time)
            view.seen_us = sent_us if view.seen_us is None else max(view.seen_us, sent_us)
        if isinstance(body, LoggedPayload):
            view.seen_us, view.clock = clock.read().wall_us, body.clock
        if isinstance(body, DriftPayload):
            view.windows[body.task] = body.state
        elif isinstance(body, AlertPayload) and body.state == "raised":
            alert = Alert(body.alert, body.subject, "raised", body.severity, body.id, body.summary, {}, body.revision)
            view.alerts[body.id] = alert
        elif isinstance(body, AlertPayload):
            view.alerts.pop(body.id, None)
        return VerifiedDelivery(delivery, message)


def receive_deliveries(
    connect: Callable[[], Link], refresh: Callable[[], None], seconds: float | None, report: Callable[[str], None]
) -> Iterator[list[IncomingMessage]]:
    """Yield groups of deliveries, at least an empty one each half second; reconnect; end after `seconds` if given."""
    end = None if seconds is None else time.monotonic() + seconds
    retry = Retries(BACKOFF)
    while end is None or time.monotonic() < end:
        try:
            with contextlib.closing(connect()) as link:
                report("")
                while end is None or time.monotonic() < end:
                    events = link.receive(0.5)
                    refresh()
                    yield [event for event in events if not isinstance(event, PublishReceipt)]
                    for event in events:
                        if isinstance(event, IncomingMessage):
                            link.acknowledge(event)
                    retry.reset()
        except (LinkDown, StorageError) as down:
            if TAKEN_OVER in str(down).lower():
                raise UsageError(
                    "another `fleet devices watch` connected with this certificate; run one at a time"
                ) from None
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

    console = Console()
    first = render_table(watcher, "connecting", width=console.width)
    with Live(first, console=console, auto_refresh=False, transient=False) as live:
        for group in source(set_problem):
            for delivery in group:
                watcher.verify(delivery)
            table = render_table(watcher, problem, console.height - _LINES_AROUND, console.width)
            live.update(table, refresh=True)


def render_table(watcher: FleetWatcher, problem: str, most: int | None = None, width: int = 80) -> Table:
    """Return a row for each device, in `width` characters; the sentence about alerts is cut first, and ends in dots.

    If there are more than `most` devices, those with the worst alerts are shown.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    devices = sorted(watcher.devices.items())
    notes = [problem] if problem else []
    notes += [f"{watcher.refused} messages refused"] if watcher.refused else []
    if most is not None and len(devices) > max(1, most):
        devices = sorted(devices, key=lambda entry: -_rank(entry[1]))[: max(1, most)]
        notes.append(f"{len(watcher.devices) - len(devices)} more; `outstation fleet devices` lists all")
    caption = "; ".join(notes)
    title = f"fleet {watcher.fleet}" if watcher.devices else f"fleet {watcher.fleet}: no device yet"
    # A plain string would be read as markup.
    note = Text(printable(caption), "dim italic") if caption else None
    table = Table(title=title, caption=note, box=box.SIMPLE_HEAD, pad_edge=False)
    now_us = clock.read().wall_us
    rows = [
        [
            Text(printable(text), style)
            for text, style in (
                (device, ""),
                _format_state(view),
                (_format_age(view, now_us), ""),
                _format_drift(view),
                _format_alerts(view),
            )
        ]
        for device, view in devices
    ]
    longest = [max((cells[at].cell_len for cells in rows), default=0) for at in range(len(_COLUMNS))]
    widths = _allocate_widths(longest, width)
    for name, size in zip(_COLUMNS, widths, strict=True):
        if size:
            table.add_column(name, no_wrap=True, overflow="ellipsis", width=size)
    for cells in rows:
        table.add_row(*(cell for cell, size in zip(cells, widths, strict=True) if size))
    return table


def _allocate_widths(longest: Sequence[int], width: int) -> list[int]:
    """Return the width of each column; rich would take from every column, and leave none for the device."""
    widest = (max(16, width // 5), 16, 6, 18, width)
    left, widths = width - _GAPS_WIDTH, [0] * len(_COLUMNS)
    for at in _COLUMN_PRIORITY:
        widths[at] = max(0, min(left, widest[at], max(longest[at], len(_COLUMNS[at]))))
        left -= widths[at]
    return widths


def _rank(view: DeviceView) -> int:
    """Return how urgently a device needs attention: by its worst alert, then by whether it is away."""
    worst = max((SEVERITY_RANK[alert.severity] for alert in view.alerts.values()), default=0)
    return 2 * worst + (view.state != "online")


def _format_state(view: DeviceView) -> tuple[str, str]:
    if view.state == "online" and view.clock not in ("", "synced"):
        return f"online, {view.clock}", "yellow"
    return view.state, _STATE_STYLES.get(view.state, "")


def _format_age(view: DeviceView, now_us: int) -> str:
    """Return how long ago the device was seen, in its largest unit."""
    if view.seen_us is None:
        return "never"
    seconds = max(0, now_us - view.seen_us) // 1_000_000
    size, unit = next((entry for entry in _AGE_UNITS if seconds >= entry[0]), (1, "s"))
    return f"{seconds // size} {unit}"


def _format_drift(view: DeviceView) -> tuple[str, str]:
    """Return the subjects with an open fault or drift; else the state of the newest windows."""
    by_kind = {kind: [a.subject for a in view.alerts.values() if a.alert == kind] for kind in ("fault", "drift")}
    parts = [f"{kind} {', '.join(sorted(subjects))}" for kind, subjects in by_kind.items() if subjects]
    if parts:
        return "; ".join(parts), "red" if by_kind["fault"] else "yellow"
    return ", ".join(sorted(set(view.windows.values()))), ""


def _format_alerts(view: DeviceView) -> tuple[str, str]:
    """Return the number of open alerts and the worst of them, the newest of several."""
    if not view.alerts:
        return "", ""
    worst = max(view.alerts.values(), key=lambda alert: SEVERITY_RANK[alert.severity])
    newest = [alert for alert in view.alerts.values() if alert.severity == worst.severity][-1]
    return f"{len(view.alerts)}: {newest.summary}", _SEVERITY_STYLES[worst.severity]
