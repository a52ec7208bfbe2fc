"""Throughput of collector processes with a broker and a database, with one and two collectors on PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from agent.config import BrokerConfig
from agent.fleet.collector.collector import SESSION_EXPIRY_S, client_id
from agent.fleet.collector.subscriptions import topic_filters
from agent.fleet.database.store import FleetStore
from agent.fleet.enrolment.enrol import init_fleet
from agent.testing.broker import MosquittoBroker
from agent.testing.messages import FLEET, MessageSender, SignedMessage
from agent.transport.mqtt import Link
from agent.transport.packets import PublishReceipt
from scripts.benchmarks import Result, benchmark
from scripts.kit import postgres
from scripts.kit.postgres import PostgresServer

DEVICES, MESSAGES = 200, 6000
_ROUNDS = 3
_NOW = "2026-11-24T22:20:00.000000Z"
# The setting that `fleet init` writes.
_CONF = "max_inflight_messages 500\nmax_queued_messages 100000\nmax_queued_bytes 268435456"
_SERVER = "shared_buffers = 128MB\nmax_wal_size = 2GB\n"
_WITHIN_S = 300.0


@benchmark("collectors")
def measure_parallel_collectors() -> list[Result]:
    """Measure how fast collectors store the messages of 200 devices that wait at the broker."""
    mosquitto = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    programs = {"PostgreSQL": postgres.find_binaries(), "Mosquitto": mosquitto}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        raise click.ClickException(f"{' and '.join(missing)} not installed; run scripts/setup system")
    seen: dict[str, list[float]] = {"file": [], "one": [], "two": []}
    with postgres.run_server(_SERVER) as server:
        for _ in range(_ROUNDS):
            seen["file"].append(flow(None, (), results_message))
            seen["one"].append(flow(server, ("a",), results_message))
            seen["two"].append(flow(server, ("a", "b"), results_message))
    sqlite, single, two = (statistics.median(seen[name]) for name in ("file", "one", "two"))
    where = f"{os.cpu_count()} cores run broker, database and collectors, load {os.getloadavg()[0]:.1f}"
    return [
        Result("collector, postgresql", single, sqlite, "messages/s", 0.5, f"reference: SQLite; {where}"),
        Result("collector, two processes", two, single, "messages/s", 1.8, f"reference: one, both PostgreSQL; {where}"),
    ]


def results_message(sender: MessageSender) -> SignedMessage:
    """Build a message of forty results, as a device sends it."""
    return sender.results(40, clocks=[[sender.row + 1, 1, 1, 0]])


def flow(
    server: PostgresServer | None,
    names: Sequence[str],
    make: Callable[[MessageSender], SignedMessage],
    messages: int = MESSAGES,
) -> float:
    """Return the messages per second of the collectors `names` on `server`; without it, of one collector on SQLite."""
    with tempfile.TemporaryDirectory() as made, MosquittoBroker(Path(made), extra_conf=_CONF) as broker:
        home = Path(made) / FLEET
        config = init_fleet(home, FLEET, BrokerConfig(url=broker.url))
        where = server.create_database() if server else config.fleet.db
        file = home / "fleet.toml"
        file.write_text(file.read_text().replace('db = "fleet.db"', f'db = "{where}"'), encoding="utf-8")
        store = FleetStore(where)
        senders = [MessageSender(f"pi-{i:03}") for i in range(DEVICES)]
        for sender in senders:
            store.enrol(sender.device, sender.key.public, replace=False, now=_NOW)
        for name in names or (None,):
            who = client_id(FLEET, name)
            group = config.fleet.share_group if name is not None else None
            filters = topic_filters(FLEET, group=group)
            Link(config.broker, who, subscribe=filters, session_expiry_s=SESSION_EXPIRY_S).close()
        _publish(broker.url, [make(senders[i % DEVICES]) for i in range(messages)])
        with _running(home, names, Path(made)):
            rate = _measure(store, messages)
        store.close()
    return rate


@contextlib.contextmanager
def _running(home: Path, names: Sequence[str], folder: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "agent", "fleet", "collect", "--dir", str(home)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "collectors.log").open("ab") as log:
            for extra in [["--share", name] for name in names] or [[]]:
                started.append(subprocess.Popen([*command, *extra], stdout=log, stderr=log))
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)


def _measure(store: FleetStore, messages: int) -> float:
    """Time the messages that follow the first stored ones, so that startup is excluded; return messages per second."""
    first, first_s = 0, 0.0
    deadline = time.monotonic() + _WITHIN_S
    while (through := sum(top for _, _, top in store.logs())) < messages or store.count_messages() < messages:
        if through and not first:
            first, first_s = store.count_messages(), time.monotonic()
        if time.monotonic() > deadline:
            raise click.ClickException(f"not all of {messages} messages arrived within {_WITHIN_S:.0f} s")
        time.sleep(0.1)
    return (messages - first) / (time.monotonic() - first_s)


def _publish(url: str, sent: Sequence[SignedMessage]) -> None:
    link = Link(BrokerConfig(url=url), "devices")
    waiting = 0
    for message in sent:
        link.send(message.to_outgoing())
        waiting += 1
        while waiting >= link.window:
            waiting -= sum(isinstance(event, PublishReceipt) for event in link.receive(1.0))
    while waiting:
        waiting -= sum(isinstance(event, PublishReceipt) for event in link.receive(1.0))
    link.close()
