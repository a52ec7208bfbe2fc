"""Soak of a fleet in real time: many devices, PostgreSQL, two collectors, one of them killed each minute, and a page.

The devices are simulated; broker, database, collectors, dashboard and Chromium are real processes.
"""

from __future__ import annotations

import contextlib
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from outstation.fleet.audit.audit import audit
from outstation.fleet.collector.collector import SESSION_EXPIRY_S, client_id
from outstation.fleet.collector.subscriptions import topic_filters
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.foundation import clock
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import PublishReceipt
from outstation.workbench.testing.broker import MosquittoBroker, free_port
from outstation.workbench.testing.messages import FLEET, MODEL, MessageSender, SignedMessage, new_key
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import OutstationProcess
from scripts.kit import postgres, process_stats
from scripts.soaks import Result

DEVICES, RATE_HZ = 1_000, 10.0
KILL_EVERY_S, _DOWN_S = 60.0, 3.0
_PROBE_EVERY_S = 3.0
MAX_VIEW_S, MAX_CHANGE_S, MAX_PSS_MB = 1.0, 2.0, 60.0
# The settings that `fleet init` writes.
_BROKER = "max_inflight_messages 500\nmax_queued_messages 100000\nmax_queued_bytes 268435456"
_SERVER = "shared_buffers = 128MB\nmax_wal_size = 1GB\n"
_DRAIN_S = 120.0
_PROBE = "pi-0000"
_VIEWPORT = {"width": 1280, "height": 860}


def fleet(
    folder: Path,
    seed: int,
    hours: float,
    report: Callable[[str], None],
    *,
    devices: int = DEVICES,
    kill_every_s: float = KILL_EVERY_S,
) -> Result:
    """Run the fleet; nothing may be lost, and the page may not be late."""
    with postgres.run_server(_SERVER) as server, MosquittoBroker(folder, extra_conf=_BROKER) as broker:
        home = folder / FLEET
        config = init_fleet(home, FLEET, BrokerConfig(url=broker.url))
        url, file = server.create_database(), home / "fleet.toml"
        file.write_text(file.read_text().replace('db = "fleet.db"', f'db = "{url}"'), encoding="utf-8")
        store = FleetStore(url)
        senders = [MessageSender(f"pi-{n:04}", new_key(n + 1)) for n in range(devices)]
        for sender in senders:
            store.enrol(sender.device, sender.key.public, replace=False, now=clock.now_rfc3339())
        for name in ("a", "b"):
            # What is sent before a collector's first start waits in its session.
            filters = topic_filters(FLEET, group=config.fleet.share_group)
            who = client_id(FLEET, name)
            Link(config.broker, who, subscribe=filters, session_expiry_s=SESSION_EXPIRY_S).close()
        collectors = [
            OutstationProcess(folder / f"{name}.log", "fleet", "collect", "--dir", str(home), "--share", name)
            for name in ("a", "b")
        ]
        port = free_port()
        dashboard = OutstationProcess(
            folder / "dashboard.log", "fleet", "dashboard", "--dir", str(home), "--listen", f"127.0.0.1:{port}"
        )
        simulated = _Devices(broker.url, senders, seed)
        run = _Run(store, simulated, collectors, dashboard, f"http://127.0.0.1:{port}", report)
        try:
            for process in (*collectors, dashboard):
                process.start()
            simulated.start()
            run.watch(hours * 3600, kill_every_s)
        finally:
            simulated.stop()
            with contextlib.suppress(AssertionError):
                run.drain()
            for process in (*collectors, dashboard):
                process.kill()
        result = run.finish()
        store.close()
    return result


class _Devices(threading.Thread):
    """Simulated devices that share a connection: a message every tenth of a second, of each in turn."""

    def __init__(self, url: str, senders: list[MessageSender], seed: int) -> None:
        super().__init__(name="devices", daemon=True)
        self._url, self._senders, self._rng = url, senders, random.Random(seed)
        self._extra: queue.SimpleQueue[SignedMessage] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self.probe, *self._others = senders
        self.sent = 0
        self.error: BaseException | None = None

    def send(self, message: SignedMessage) -> None:
        """Have a message of the probed device sent; called by another thread."""
        self._extra.put(message)

    def stop(self) -> None:
        self._stopping.set()
        self.join(60)

    def run(self) -> None:
        try:
            link = Link(BrokerConfig(url=self._url), "devices")
            self._send_all(link, (_health(sender, 0) for sender in self._others))
            self._send_all(link, self._pace())
            link.close()
        except BaseException as error:
            self.error = error

    def _pace(self) -> Iterator[SignedMessage | None]:
        """Yield the next message, or None when none is due yet."""
        due_s, turn = time.monotonic(), 0
        while not self._stopping.is_set():
            with contextlib.suppress(queue.Empty):
                while True:
                    yield self._extra.get_nowait()
            if time.monotonic() < due_s:
                yield None
                continue
            due_s += 1 / RATE_HZ
            yield self._next(self._others[turn % len(self._others)])
            turn += 1

    def _next(self, sender: MessageSender) -> SignedMessage:
        draw = self._rng.random()
        if draw < 0.03:
            number, state = self._rng.randrange(3), self._rng.choice(("raised", "cleared"))
            return sender.alert(f"{sender.task}/ax/{number}", state, time=clock.now_rfc3339())
        if draw < 0.13:
            return sender.drift(self._rng.choice(("ok", "ok", "drift")), time=clock.now_rfc3339())
        if draw < 0.23:
            return _health(sender, self._rng.randrange(5))
        return sender.results(1, rows=600, time=clock.now_rfc3339())

    def _send_all(self, link: Link, messages: Iterator[SignedMessage | None]) -> None:
        """Send messages and wait until the broker has all of them."""
        waiting = 0
        for message in messages:
            if message is not None:
                link.send(message.to_outgoing())
                self.sent += 1
                waiting += 1
            waiting -= _count_receipts(link, 0.0 if message is not None and waiting < link.window else 0.02)
        while waiting:
            waiting -= _count_receipts(link, 1.0)


def _count_receipts(link: Link, timeout_s: float) -> int:
    return sum(isinstance(event, PublishReceipt) for event in link.receive(timeout_s))


def _health(sender: MessageSender, waiting: int) -> SignedMessage:
    """Return a health message with one task, as a device sends it."""
    tasks = {sender.task: {"stream": "watch", "row": sender.row, "windows": 12, "model": MODEL}}
    streams = {"watch": {"rows": sender.row, "rejected": 0}}
    return sender.append("health", streams=streams, tasks=tasks, outbox=waiting, time=clock.now_rfc3339())


class _Run:
    """A run: what is killed when, what the page shows when, and the figures."""

    def __init__(
        self,
        store: FleetStore,
        devices: _Devices,
        collectors: list[OutstationProcess],
        dashboard: OutstationProcess,
        url: str,
        report: Callable[[str], None],
    ) -> None:
        self._store, self._devices, self._collectors, self._dashboard = store, devices, collectors, dashboard
        self._url, self._report = url, report
        self._changes: list[float] = []
        self._stored: list[float] = []
        self._views: list[float] = []
        self._pss: list[float] = []
        self._kills = 0
        self._problems: list[str] = []

    def watch(self, seconds: float, kill_every_s: float) -> None:
        with _open_browser() as browser:
            wait_until("the dashboard answers", lambda: "http://" in _read(self._dashboard.log))
            wait_until("the fleet is stored", lambda: self._store.count_messages() >= len(self._devices._others))
            probe = self._devices.probe
            self._devices.send(probe.alert("probe", severity="critical", summary="Probe.", time=clock.now_rfc3339()))
            self._devices.send(_health(probe, 0))
            tab = browser.new_context(viewport=_VIEWPORT).new_page()
            wait_until("the page shows the fleet", lambda: self._shows_probe(tab))
            began, number, views = time.monotonic(), 0, 0
            killer = threading.Thread(target=self._kill_collectors, args=(began, began + seconds, kill_every_s))
            killer.start()
            while (now := time.monotonic()) < began + seconds:
                if now >= began + views * kill_every_s:
                    views += 1
                    self._time_view(browser)
                    self._tell(now - began)
                number += 1
                self._time_change(tab, number % 900 + 1)
                self._pss.append(process_stats.pss_mb(self._dashboard.pid))
                time.sleep(max(0.0, min(_PROBE_EVERY_S, kill_every_s / 4) - (time.monotonic() - now)))
            killer.join()

    def _kill_collectors(self, next_s: float, end_s: float, every_s: float) -> None:
        """Kill one collector and the other in turn, and start it again after a moment."""
        while (next_s := next_s + every_s) < end_s:
            time.sleep(max(0.0, next_s - time.monotonic()))
            collector = self._collectors[self._kills % 2]
            collector.kill()
            self._kills += 1
            # What it had not confirmed waits in its session at the broker.
            time.sleep(min(_DOWN_S, every_s / 4))
            collector.start()

    def _shows_probe(self, tab: Any) -> bool:
        tab.goto(f"{self._url}/fleet")
        return bool(tab.locator(f"#d-{_PROBE} [data-name=Backlog]").count())

    def _time_view(self, browser: Any) -> None:
        """Note when a new visitor sees the page of the fleet: its first contentful paint, from the navigation on."""
        context = browser.new_context(viewport=_VIEWPORT)
        page = context.new_page()
        page.goto(f"{self._url}/fleet")
        page.locator("#rows tbody tr").first.wait_for()
        painted = "performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)"
        if _wait(lambda: bool(page.evaluate(painted))):
            self._views.append(page.evaluate(painted)[0] / 1000)
        else:
            self._problems.append("the page of a new visitor was not painted within 30 s")
        context.close()

    def _time_change(self, tab: Any, waiting: int) -> None:
        """Note how long a message takes into the database, and from there onto the open page."""
        probe, began = self._devices.probe, time.monotonic()
        self._devices.send(_health(probe, waiting))
        key = (probe.device, probe.log, probe.seq, probe.seq)
        if not _wait(lambda: bool([*self._store.message_keys(*key)])):
            self._problems.append(f"message {probe.seq} of {probe.device} was not stored within 30 s")
            return
        stored = time.monotonic()
        self._stored.append(stored - began)
        cell = f"document.querySelector('#d-{_PROBE} [data-name=Backlog]')?.textContent || ''"
        if not _wait(lambda: str(waiting) in tab.evaluate(cell).split()):
            self._problems.append(f"the page did not show {waiting} within 30 s")
        self._changes.append(time.monotonic() - stored)

    def _tell(self, seconds: float) -> None:
        self._report(
            f"{seconds:4.0f} s: {self._devices.sent} sent, {self._kills} killed, page within "
            f"{max(self._changes, default=0):.2f} s, {max(self._pss, default=0):.0f} MB"
        )

    def drain(self) -> None:
        wait_until("all is stored", lambda: self._store.count_messages() >= self._devices.sent, _DRAIN_S)

    def finish(self) -> Result:
        stored, audited = self._store.count_messages(), audit(self._store)
        if self._devices.error is not None:
            self._problems.append(f"the devices stopped: {self._devices.error!r}")
        if stored != self._devices.sent or audited.gaps:
            self._problems.append(f"{self._devices.sent} messages were sent, {stored} are stored")
        if not audited.passed:
            self._problems.append(f"the audit fails: {audited.to_dict()['invalid'][:3]}")
        figures: dict[str, Any] = {
            "messages": stored,
            "kills": self._kills,
            "audit_passed": audited.passed,
            "stored_s": _describe(self._stored),
            "change_s": _describe(self._changes),
            "view_s": _describe(self._views),
            "pss_mb": _describe(self._pss),
        }
        limits = (("change_s", MAX_CHANGE_S), ("view_s", MAX_VIEW_S), ("pss_mb", MAX_PSS_MB))
        for name, limit in limits:
            if figures[name]["max"] > limit:
                self._problems.append(f"{name} reached {figures[name]['max']}, the limit is {limit:g}")
        for name, value in figures.items():
            self._report(f"{name}: {value}")
        return Result(self._problems, figures)


def _describe(values: list[float]) -> dict[str, float]:
    if not values:
        return {"n": 0, "median": 0.0, "max": 0.0}
    return {"n": len(values), "median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def _wait(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def _open_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    from tests.kit.browsers import ARGUMENTS, CHROMIUM

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
