"""A metered connection: alerts first, bytes within 24 h, windows, what is given up, restarts and wrong clocks."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import msgspec
import pytest

from outstation.device import config
from outstation.device.capacity.eviction import EXPIRED_COUNTER
from outstation.device.capacity.space import SpaceManager
from outstation.device.uplink import meter
from outstation.device.uplink.mqtt_sink import open_sink, packet_size
from outstation.device.uplink.uplink import Uplink
from outstation.fleet.audit.audit import audit
from outstation.fleet.collector.collector import Collector
from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.config.quantities import Duration, Size, decode_quantity
from outstation.foundation.errors import ConfigError
from outstation.protocol.transport.broker_config import BrokerConfig, MeteredConfig, UplinkBrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.messages import MODEL
from outstation.workbench.testing.patience import wait_until
from tests.device.uplink.test_uplink import DEVICE, FLEET, TIME, World, unexpected

DAY_S = 86_400.0


class MeteredWorld(World):
    def __init__(self, folder: Path, **limits: object) -> None:
        self.limits = limits
        self.row = 0
        super().__init__(folder)

    def new_uplink(self) -> Uplink:
        self.author.urgent_kinds, self.author.max_urgent = meter.URGENT_KINDS, meter.MAX_URGENT
        limits = msgspec.convert(self.limits, MeteredConfig, dec_hook=decode_quantity)
        self.conf = msgspec.structs.replace(self.conf, broker=UplinkBrokerConfig(metered=limits))
        return super().new_uplink()

    def write_results(self, n: int, size: int = 1000) -> None:
        with self.store.transaction() as tx:
            for _ in range(n):
                self.row += 1
                columns = {"row": [self.row], "t": [self.row], "label": ["x" * size]}
                head = {"model": MODEL, "stream": "watch", "rows": [self.row] * 2, "n": 1, "input": ""}
                self.author.append(tx, "results", "exercise", {**head, "columns": columns}, self.air.now())

    def restart(self) -> None:
        self.uplink = self.new_uplink()

    def bytes_sent(self) -> int:
        return sum(packet_size(m) for m in self.air.published if not m.topic.endswith("/ack"))

    def bulk_sent(self) -> int:
        return sum("/results/" in message.topic for message in self.air.published)

    def status(self) -> dict[str, object]:
        assert self.conf.broker.metered is not None
        return meter.build_status(self.conf.broker.metered, self.store, self.air.now())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@contextlib.contextmanager
def world_of(folder: Path, **limits: object) -> Iterator[MeteredWorld]:
    world = MeteredWorld(folder, **limits)
    try:
        yield world
    finally:
        world.store.close()


def test_bulk_stops_at_its_share_and_alerts_still_go(folder: Path) -> None:
    with world_of(folder, budget="400 kB") as world:
        world.write_results(400)
        first = world.raise_alert()
        world.run(lambda: False, 60)
        assert first in world.collector.seqs()
        sent, bulk = world.bytes_sent(), world.bulk_sent()
        assert 0.5 * 400_000 < sent < 0.8 * 400_000
        assert world.status()["bulk"] == "waits for the budget"
        # A restart forgets no byte, and the alert of a day without budget is not late.
        world.restart()
        alert = world.raise_alert()
        world.run(lambda: alert in world.collector.seqs(), 60)
        assert alert in world.collector.seqs()
        assert world.bulk_sent() == bulk
        assert world.bytes_sent() < 400_000
        # A day later the rest goes on, each message once.
        world.air.clock_s += 25 * 3600 + 60
        world.restart()
        world.run(lambda: False, 60)
        assert world.bulk_sent() >= 1.9 * bulk
        assert max(world.collector.arrivals.values()) == 1


def test_the_budget_is_a_limit_for_alerts_too_and_for_being_connected(folder: Path) -> None:
    with world_of(folder, budget="60 kB") as world:
        for _ in range(120):
            world.raise_alert()
        world.run(lambda: False, 200)
        assert 35_000 < world.bytes_sent() < 60_000
        connects = world.air.connects[DEVICE]
        world.restart()
        world.run(lambda: False, 600)
        assert "budget is used up" in world.uplink.state
        assert world.air.connects[DEVICE] == connects
        world.air.clock_s += 25 * 3600 + 60
        world.restart()
        world.run(lambda: False, 60)
        assert world.air.connects[DEVICE] > connects


def test_a_wall_clock_that_jumps_gives_no_second_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with world_of(folder, budget="400 kB") as world:
        world.write_results(400)
        world.run(lambda: False, 60)
        bulk = world.bulk_sent()
        present = world.air.now
        for days in (400, -400):
            monkeypatch.setattr(world.air, "now", partial(move_wall_clock, present, days))
            world.restart()
            world.run(lambda: False, 30)
            assert world.bulk_sent() == bulk


def move_wall_clock(present: Callable[[], ClockReading], days: int) -> ClockReading:
    return msgspec.structs.replace(present(), wall_us=present().wall_us + round(days * DAY_S * 1e6))


def test_a_power_cut_frees_no_part_of_the_budget(folder: Path) -> None:
    with world_of(folder, budget="400 kB") as world:
        limits, hour_s = MeteredConfig(budget=Size(400_000)), 3600.0
        before = ClockReading(world.air.now().wall_us, 30.2 * hour_s, "synced")
        meter.TrafficMeter(limits, world.store, before).observe(300_000, before)
        # The uptime that was saved last is an hour old, and a day of the wall clock has passed.
        for at_h, expected in ((29.1, 300_000), (40.0, 300_000), (53.9, 300_000), (56.0, 0)):
            now = ClockReading(before.wall_us + 10**11, at_h * hour_s, "synced")
            used = 400_000 * 0.8 - meter.TrafficMeter(limits, world.store, now).room(now, urgent=False)
            assert expected <= used <= expected * 1.1
            assert meter.build_status(limits, world.store, now)["used"] == used


def local_window(world: MeteredWorld, after_s: float, duration_s: float) -> str:
    begin = world.air.now().wall_us / 1e6 + after_s
    return "-".join(f"{datetime.fromtimestamp(at_s):%H:%M}" for at_s in (begin, begin + duration_s))


def test_bulk_waits_for_its_window_and_alerts_do_not(folder: Path) -> None:
    with world_of(folder) as world:
        world.limits["windows"] = [local_window(world, 3600, 7200)]
        world.restart()
        world.write_results(30)
        alerts = {world.raise_alert() for _ in range(3)}
        world.write_results(30)
        alerts |= {world.raise_alert()}
        world.run(lambda: False, 30)
        assert world.bulk_sent() == 0
        assert world.collector.seqs() >= alerts
        assert world.status()["bulk"] == "waits for a window"
        world.air.clock_s += 2 * 3600
        world.restart()
        world.run(lambda: not world.waiting(), 120)
        assert world.waiting() == set()
        assert max(world.collector.arrivals.values()) == 1


def test_a_device_without_a_clock_sends_its_bulk_once_a_day(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with world_of(folder, windows=["03:00-04:00"]) as world:
        present = world.air.now
        monkeypatch.setattr(world.air, "now", lambda: msgspec.structs.replace(present(), quality="unsynced"))
        sent = []
        # 24 h of uptime begin at 0, and the window has one hour.
        for uptime_s in (1800, 5 * 3600, 23 * 3600, DAY_S + 1800, DAY_S + 4000):
            world.air.clock_s = uptime_s
            world.write_results(5)
            world.restart()
            world.run(lambda: False, 20)
            sent.append(world.bulk_sent())
        assert sent == [5, 5, 5, 20, 20]


def test_what_waited_too_long_is_given_up_declared_and_counted(folder: Path) -> None:
    with world_of(folder, max_age="10 h") as world:
        world.limits["windows"] = [local_window(world, 20 * 3600, 3600)]
        world.restart()
        world.air.tick_callbacks.clear()
        world.collector.leave()
        with FleetStore(folder / "fleet.db") as fleet:
            fleet.enrol(DEVICE, world.key.public, replace=False, now=TIME)
            filters = [f"outstation/{FLEET}/+/{kind}" for kind in ("audit", "health", "alerts/+", "results/+")]
            link = world.air.connect(None, "collector", subscribe=filters, session_expiry_s=60)
            collector = Collector(FLEET, BrokerConfig(), fleet, world.collector_key, open_link=lambda: link)
            world.air.tick_callbacks.append(lambda: collector.tick(link, 0.0))
            space = SpaceManager(world.conf, world.store, world.author, lambda now: None, list)
            world.write_results(700)
            world.raise_alert()
            space.tick(world.air.now())
            world.air.clock_s += 6 * 3600
            world.write_results(10)
            space.tick(world.air.now())
            assert world.status()["expired"] == 0
            # A wall clock that is set years ahead makes nothing old.
            present = world.air.now()
            space.tick(ClockReading(present.wall_us + 10**15, present.boot_s, "synced"))
            assert world.status()["expired"] == 0
            world.air.clock_s += 5 * 3600
            for _ in range(3):
                space.tick(world.air.now())
            assert world.store.counters()[EXPIRED_COUNTER] == 700
            world.run(lambda: False, 30)
            assert world.bulk_sent() == 0
            # The collector has alert and declaration, and knows that the others never come.
            assert [row["declared"] for row in fleet.gaps()].count(True) >= 1
            world.air.clock_s += 9.5 * 3600
            world.restart()
            world.run(lambda: not world.waiting(), 60)
            assert world.waiting() == set()
            assert world.bulk_sent() == 10
            report = audit(fleet)
            assert report.passed
            assert [(gap["from"], gap["to"], gap["declared"]) for gap in report.gaps][:1] == [(1, 700, True)]
            assert all(gap["declared"] for gap in report.gaps)


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        ('budget = "1 kB"', "budget"),
        ('budget = "239 kB"', "budget"),
        ('windows = ["25:00-01:00"]', "windows"),
        ('windows = ["01:00-01:00"]', "windows"),
        ('max_age = "1 s"', "max_age"),
    ],
)
def test_limits_that_cannot_work_are_refused(tmp_path: Path, limits: str, key: str) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(f'[device]\nid = "pi-07"\nfleet = "acme"\n[broker.metered]\n{limits}\n')
    with pytest.raises(ConfigError, match=rf"broker\.metered\.{key}"):
        config.load(file)


class CountingProxy:
    """TCP proxy that counts the bytes of both directions."""

    def __init__(self, port: int) -> None:
        self.bytes, self._target = 0, port
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=ends, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.bytes += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._ends.append(end)


@pytest.mark.broker
def test_a_real_broker_receives_no_byte_more_than_the_budget(folder: Path) -> None:
    budget = 300_000
    with world_of(folder, budget=f"{budget} B") as world, MosquittoBroker(folder) as broker:
        proxy = CountingProxy(broker.port)
        broker_conf = UplinkBrokerConfig(
            url=f"mqtt://127.0.0.1:{proxy.port}", metered=MeteredConfig(budget=Size(budget), max_age=Duration(DAY_S))
        )
        conf = msgspec.structs.replace(
            world.conf, broker=broker_conf, collector=config.CollectorConfig(delivery="broker")
        )
        listener = Link(BrokerConfig(url=broker.url), "listener", subscribe=[f"outstation/{FLEET}/#"])
        world.write_results(600)
        alert = world.raise_alert()
        seen: list[int] = []

        def read(last: float = 0.2) -> int:
            for event in listener.receive(last):
                if isinstance(event, IncomingMessage):
                    listener.acknowledge(event)
                    seen.append(json.loads(event.payload).get("seq", 0))
            return len(seen)

        def has_arrived(seq: int) -> bool:
            read()
            return seq in seen

        for again in range(2):
            uplink = Uplink(
                *(conf, world.store, world.author, lambda kid: None, clock.read, unexpected),
                partial(open_sink, conf),
            )
            uplink.start()
            wait_until("the budget holds bulk back", lambda: read() and world.status()["bulk"] != "sent")
            if again:
                alert = world.raise_alert()
            wait_until("the alert arrives", partial(has_arrived, alert))
            uplink.stop(0.2)
        used = world.status()["used"]
        assert isinstance(used, int)
        listener.close()
        proxy.close()
        assert 0.5 * budget < proxy.bytes < budget
        assert proxy.bytes < used < 1.3 * proxy.bytes
        # Alerts went first.
        assert seen.index(601) < 50


def test_a_busy_connection_without_a_budget_commits_its_bytes_once_a_megabyte(folder: Path) -> None:
    with world_of(folder, windows=["00:00-23:59"]) as world:
        assert world.conf.broker.metered is not None
        counted = meter.TrafficMeter(world.conf.broker.metered, world.store, world.air.now())
        stored = set()
        for number in range(1, 1001):
            counted.observe(5000 * number, world.air.now())
            at_s = world.store.uptime_s(world.air.now())
            stored.add(meter.sum_last_day(meter.load_bytes(world.store, at_s), at_s))
        assert len(stored) <= 6
        assert 5_000_000 <= max(stored) <= 6_100_000
