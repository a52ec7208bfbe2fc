"""Collector processes with a broker and a database: costs of a message with 1 to 8 of them, and a killed leader."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import psutil
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from outstation.fleet.audit.audit import audit
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage
from scripts import benchmarks, scale_documents
from scripts.benchmarks import Report, Result, Section, benchmark, page
from scripts.kit import postgres
from scripts.kit.broker_client import publish_all
from scripts.kit.postgres import PostgresServer
from scripts.kit.process_stats import cpu_s, running_s
from scripts.scale_documents import CollectorCosts, KillTrial, Measurements

DEVICES, MESSAGES = 200, 6000
_ROUNDS = 3
_COUNTS = (1, 2, 4, 8)
_KILLED_OF = 4
_NOW = "2026-11-24T22:20:00.000000Z"
# The setting that `fleet init` writes.
_CONF = "max_inflight_messages 500\nmax_queued_messages 100000\nmax_queued_bytes 268435456"
_SERVER = "shared_buffers = 128MB\nmax_wal_size = 2GB\n"
_WITHIN_S = 300.0
_POLL_S = 0.05
_LEADS = "this collector is the leader"

MESSAGE_KINDS: dict[str, Callable[[MessageSender], SignedMessage]] = {
    scale_documents.RESULTS: lambda sender: sender.results(40, clocks=[[sender.row + 1, 1, 1, 0]]),
    scale_documents.RESULT: lambda sender: sender.results(1),
    scale_documents.HEALTH: lambda sender: sender.health(),
}


@benchmark("collectors")
def measure_collectors() -> Report:
    """Measure collectors at the messages of 200 devices that wait at the broker; `--rows`: how many messages."""
    mosquitto = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    programs = {"PostgreSQL": postgres.find_binaries(), "Mosquitto": mosquitto}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        raise click.ClickException(f"{' and '.join(missing)} not installed; run scripts/setup system")
    cases = [(False, 1, kind) for kind in MESSAGE_KINDS]
    cases += [(True, count, scale_documents.RESULTS) for count in _COUNTS]
    cases += [(True, 1, kind) for kind in (scale_documents.RESULT, scale_documents.HEALTH)]
    runs: dict[tuple[bool, int, str], list[CollectorCosts]] = {case: [] for case in cases}
    with postgres.run_server(_SERVER) as server:
        for _ in range(_ROUNDS):
            for shared, count, kind in cases:
                with CollectorRun(server if shared else None, count) as run:
                    runs[shared, count, kind].append(run.measure(kind, benchmarks.rows or MESSAGES))
        with CollectorRun(server, _KILLED_OF) as run:
            killed = run.kill_the_leader(benchmarks.rows or MESSAGES)
    costs = [_median(same) for same in runs.values()]
    measured = Measurements(page.describe_run(), page.describe_hardware(), costs, killed)
    return Report(_results(measured), scale_documents.render(measured), _section(measured))


def _results(measured: Measurements) -> list[Result]:
    sqlite = measured.find("SQLite", 1, scale_documents.RESULTS).rate
    single, two = (measured.find("PostgreSQL", count, scale_documents.RESULTS).rate for count in (1, 2))
    where = f"{os.cpu_count()} cores run broker, database and collectors, load {os.getloadavg()[0]:.1f}"
    return [
        Result("collector, postgresql", single, sqlite, "messages/s", 0.5, f"reference: SQLite; {where}"),
        Result("collector, two processes", two, single, "messages/s", 1.8, f"reference: one, both PostgreSQL; {where}"),
    ]


def _section(measured: Measurements) -> Section:
    files = {str(scale_documents.FILE.relative_to(page.ROOT)): scale_documents.to_json(measured)}
    return Section(scale_documents.PAGE, scale_documents.TITLE, scale_documents.render(measured), files)


def _median(runs: Sequence[CollectorCosts]) -> CollectorCosts:
    """Return the run of the median rate, with each cost's own median."""
    middle = sorted(runs, key=lambda run: run.rate)[len(runs) // 2]
    names = ("collector_us", "server_us", "broker_us", "growth_bytes")
    for name in names:
        setattr(middle, name, statistics.median(getattr(run, name) for run in runs))
    return middle


class CollectorRun:
    """Context manager: a broker, 200 devices and `count` connected collectors; without `server` one on SQLite."""

    def __init__(self, server: PostgresServer | None, count: int) -> None:
        self._server, self._count = server, count
        self._cleanup = contextlib.ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> CollectorRun:
        self._folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory()))
        self._broker = self._cleanup.enter_context(MosquittoBroker(self._folder, extra_conf=_CONF))
        self._home = self._folder / FLEET
        config = init_fleet(self._home, FLEET, BrokerConfig(url=self._broker.url))
        where = self._server.create_database() if self._server else config.fleet.db
        file = self._home / "fleet.toml"
        file.write_text(file.read_text().replace('db = "fleet.db"', f'db = "{where}"'), encoding="utf-8")
        self._store = FleetStore(where)
        self._cleanup.callback(self._store.close)
        self._senders = [MessageSender(f"pi-{i:03}") for i in range(DEVICES)]
        for sender in self._senders:
            self._store.enrol(sender.device, sender.key.public, replace=False, now=_NOW)
        self._cleanup.callback(self._stop)
        for i in range(self._count):
            self._start(f"c{i}")
        _wait(lambda: all("connected" in self._log(name) for name in self._processes), "connected collectors")
        if self._server:
            _wait(lambda: self._find_leader() is not None, "a leader")
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def measure(self, kind: str, messages: int) -> CollectorCosts:
        """Store `messages` that wait at the broker, and return the costs of one."""
        sent = self._queue(kind, messages)
        before, size = self._cpu_s(), self._database_bytes()
        began_s = time.monotonic()
        self._signal(signal.SIGCONT)
        self._wait_until_stored(messages)
        seconds = time.monotonic() - began_s
        collector_us, server_us, broker_us = (
            1e6 * (end - begin) / messages for begin, end in zip(before, self._cpu_s(), strict=True)
        )
        lost, doubled = self._count_errors(messages)
        if lost or doubled:
            raise click.ClickException(f"{lost} messages were lost and {doubled} doubled")
        self._stop()
        return CollectorCosts(
            "PostgreSQL" if self._server else "SQLite",
            self._count,
            kind,
            len(sent.payload),
            _count_publish_bytes(sent.to_outgoing()),
            messages / seconds,
            collector_us,
            server_us,
            broker_us,
            (self._database_bytes() - size) / messages,
        )

    def kill_the_leader(self, messages: int) -> KillTrial:
        """Kill the leader (SIGKILL) at half of the messages, and start it again when another one leads."""
        self._queue(scale_documents.RESULTS, messages)
        leader = self._find_leader()
        assert leader is not None
        self._signal(signal.SIGCONT)
        self._wait_until_stored(messages // 2)
        self._processes[leader].kill()
        self._processes.pop(leader).wait()
        killed_s, waiting = time.monotonic(), messages - self._store.count_messages()
        _wait(lambda: self._find_leader() is not None, "another leader")
        elected_s = time.monotonic() - killed_s
        self._start(leader)
        self._wait_until_stored(messages)
        return KillTrial(self._count, messages, waiting, elected_s, *self._count_errors(messages))

    def _queue(self, kind: str, messages: int) -> SignedMessage:
        """Send the messages while the collectors stand still; return one."""
        self._signal(signal.SIGSTOP)
        made = [MESSAGE_KINDS[kind](self._senders[i % DEVICES]) for i in range(messages)]
        _publish(self._broker.url, made)
        return made[-1]

    def _start(self, name: str) -> None:
        command = [sys.executable, "-m", "outstation", "fleet", "collect", "--dir", str(self._home)]
        share = ["--share", name] if self._server else []
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen([*command, *share], stdout=log, stderr=log)

    def _stop(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        for process in self._processes.values():
            process.wait(60)
        self._processes.clear()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            process.send_signal(number)

    def _log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(encoding="utf-8")

    def _find_leader(self) -> str | None:
        """Return the running collector that leads."""
        return next((name for name in self._processes if _LEADS in self._log(name)), None)

    def _cpu_s(self) -> tuple[float, float, float]:
        """Return the processor time of collectors, server (without the backend of this process) and broker."""
        server = 0.0
        if self._server:
            with self._store.snapshot() as db:
                own = db.execute("SELECT pg_backend_pid()").fetchone()[0]
            backends = psutil.Process(self._server.pid).children(recursive=True)
            server = sum(cpu_s(backend.pid) for backend in backends if backend.pid != own)
        return sum(cpu_s(process.pid) for process in self._processes.values()), server, running_s(self._broker.pid)

    def _database_bytes(self) -> int:
        # Not the size of the file, which grows when the log of SQLite is copied into it.
        sql = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        with self._store.snapshot() as db:
            return int(db.execute("SELECT pg_database_size(current_database())" if self._server else sql).fetchone()[0])

    def _wait_until_stored(self, messages: int) -> None:
        _wait(lambda: sum(top for _, _, top in self._store.logs()) >= messages, f"{messages} messages")
        # The newest message of a log may be stored before an older one.
        _wait(lambda: self._store.count_messages() >= messages, f"{messages} messages")

    def _count_errors(self, messages: int) -> tuple[int, int]:
        """Return how many messages are lost, and how many are doubled."""
        report = audit(self._store)
        if report.invalid_count:
            raise click.ClickException(f"{report.invalid_count} messages are invalid: {report.invalid[:3]}")
        return messages - report.messages, report.duplicates


def _wait(condition: Callable[[], bool], description: str) -> None:
    deadline_s = time.monotonic() + _WITHIN_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise click.ClickException(f"no {description} within {_WITHIN_S:.0f} s")
        time.sleep(_POLL_S)


def _count_publish_bytes(message: OutgoingMessage) -> int:
    """Return the size of the PUBLISH packet at QoS 1 (MQTT 5, section 3.3)."""
    properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ContentType = message.content_type
    properties.UserProperty = list(message.properties)
    remaining = 2 + len(message.topic.encode()) + 2 + len(properties.pack()) + len(message.payload)
    return 1 + (remaining.bit_length() + 6) // 7 + remaining


def _publish(url: str, sent: Sequence[SignedMessage]) -> None:
    with Link(BrokerConfig(url=url), "devices") as link:
        publish_all(link, [message.to_outgoing() for message in sent])
