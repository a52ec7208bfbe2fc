"""Several collector processes of one fleet, with a real PostgreSQL server and a real broker."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outstation.fleet.audit.audit import audit
from outstation.fleet.collector import collector as collecting
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.messages import FLEET, MessageSender
from outstation.workbench.testing.patience import wait_until
from scripts.kit.broker_client import publish_all, receive_messages
from scripts.kit.postgres import FAST_SETTINGS, PostgresServer, run_server
from tests.kit.players import Players

NOW = "2026-11-24T22:20:00.000000Z"
# The setting that `fleet init` writes.
CONF = "max_inflight_messages 500"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(tmp_path, extra_conf=CONF) as item:
        yield item


class Fleet:
    """A fleet's folder, its enrolled devices, and its collector processes."""

    def __init__(self, folder: Path, broker: MosquittoBroker, url: str, devices: int) -> None:
        self.folder, self.config_dir, self.url = folder, folder / FLEET, url
        self.config: FleetConfig = init_fleet(folder / FLEET, FLEET, BrokerConfig(url=broker.url))
        file = folder / FLEET / "fleet.toml"
        file.write_text(file.read_text().replace('db = "fleet.db"', f'db = "{url}"'), encoding="utf-8")
        self.store = FleetStore(url)
        self.senders = [MessageSender(f"pi-{i:02}") for i in range(devices)]
        for sender in self.senders:
            self.store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
        self.processes: list[subprocess.Popen[bytes]] = []

    def collect(self, name: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "outstation",
            "fleet",
            "collect",
            "--dir",
            str(self.folder / FLEET),
            "--share",
            name,
        ]
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        return self._log(name).read_text(encoding="utf-8")

    def connected(self, *names: str) -> bool:
        return all("connected" in self.log(name) for name in names)

    def stored(self, name: str) -> int:
        """Return the number of stored messages that it logged when it stopped."""
        return sum(int(n) for n in re.findall(r"stopped; (\d+) messages", self.log(name)))

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(60)
        self.store.close()

    def _log(self, name: str) -> Path:
        return self.folder / f"collector-{name}.log"


def end(*processes: subprocess.Popen[bytes]) -> list[int]:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    return [process.wait(60) for process in processes]


def require_whole(fleet: Fleet, players: Players) -> None:
    """Check that nothing is lost or duplicated, and that every acknowledged message is stored."""
    store = FleetStore(fleet.url, read_only=True)
    report = audit(store)
    assert report.passed, report.to_dict()
    assert (report.messages, report.gaps, report.duplicates) == (players.total, [], 0)
    store.close()


@pytest.fixture
def fleet(tmp_path: Path, broker: MosquittoBroker, postgres_url: str) -> Iterator[Fleet]:
    made = Fleet(tmp_path, broker, postgres_url, 20)
    yield made
    made.close()


@pytest.mark.parametrize("names", ["ab", "abcde"])
def test_killed_and_restarted_collectors_lose_and_duplicate_nothing(
    fleet: Fleet, broker: MosquittoBroker, names: str
) -> None:
    with Players(broker.url, fleet.senders, 40, are_held=True) as players:
        processes = {name: fleet.collect(name) for name in names}
        connections = dict.fromkeys(names, 0)
        for killed in ("a", "b"):
            seen = players.acknowledged
            enough = min(seen + 100, players.total - 300)
            wait_until("more is acknowledged", lambda enough=enough: players.acknowledged > enough)  # type: ignore[misc]
            os.kill(processes[killed].pid, signal.SIGKILL)
            processes[killed].wait(60)
            connections[killed] = fleet.log(killed).count("connected")
            processes[killed] = fleet.collect(killed)
        players.release()
        wait_until("all is acknowledged", lambda: players.done)
        # One that only starts would die of SIGTERM.
        wait_until(
            "both connect again",
            lambda: all(fleet.log(name).count("connected") > n for name, n in connections.items()),
        )
        assert end(*processes.values()) == [0] * len(names)
    require_whole(fleet, players)


def test_the_broker_spreads_what_devices_send_over_both(fleet: Fleet, broker: MosquittoBroker) -> None:
    both = [fleet.collect(name) for name in ("a", "b")]
    wait_until("a connection", lambda: fleet.connected("a", "b"))
    with Players(broker.url, fleet.senders, 10) as players:
        wait_until("all is acknowledged", lambda: players.done)
        assert end(*both) == [0, 0]
    require_whole(fleet, players)
    # Each message is new to exactly one collector.
    assert fleet.stored("a") + fleet.stored("b") == players.total
    assert min(fleet.stored("a"), fleet.stored("b")) > 0
    # One of the two remaining sessions is ended; new messages go to the other one.
    collecting.end_session(BrokerConfig(url=broker.url), FLEET, "a")
    names = [collecting.client_id(FLEET, name) for name in ("a", "b")]
    left, other = (Link(BrokerConfig(url=broker.url), name, session_expiry_s=60) for name in names)
    sender = Link(BrokerConfig(url=broker.url), "device")
    publish_all(sender, [fleet.senders[0].health().to_outgoing() for _ in range(4)])
    assert len(receive_messages(other, 4)) == 4
    assert left.receive(0.2) == []
    for link in (left, other, sender):
        link.close()


def test_a_killed_postgresql_server_loses_no_acknowledged_message(tmp_path: Path, broker: MosquittoBroker) -> None:
    with (
        run_server(FAST_SETTINGS.replace("fsync = off\n", "")) as server,
        contextlib.closing(Fleet(tmp_path, broker, server.create_database(), 5)) as fleet,
    ):
        with Players(broker.url, fleet.senders, 80, are_held=True) as players:
            both = [fleet.collect(name) for name in ("a", "b")]
            wait_until("a connection", lambda: fleet.connected("a", "b"))
            wait_until("something is acknowledged", lambda: players.acknowledged > 50)
            fleet.store.close()
            server.kill()
            players.release()
            wait_until(
                "messages come without a database",
                lambda: "nothing is acknowledged" in fleet.log("a") + fleet.log("b"),
            )
            server.start()
            wait_until("all is acknowledged", lambda: players.done)
            assert end(*both) == [0, 0]
        require_whole(fleet, players)


def test_what_a_dead_collector_left_is_taken_over_by_the_other_one(fleet: Fleet, broker: MosquittoBroker) -> None:
    with Players(broker.url, fleet.senders[:3], 30) as players:
        item, other = fleet.collect("a"), fleet.collect("b")
        wait_until("a connection", lambda: fleet.connected("a", "b"))
        wait_until("something is acknowledged", lambda: players.acknowledged > 10)
        item.kill()
        item.wait(60)
        # The broker keeps handing half of the messages to its session; devices send them again.
        wait_until("all is acknowledged", lambda: players.done)
        end(other)
    require_whole(fleet, players)


def test_two_collectors_of_one_name_do_not_disconnect_each_other(fleet: Fleet) -> None:
    first = fleet.collect("a")
    wait_until("a connection", lambda: fleet.connected("a"))
    second = fleet.collect("a")
    wait_until("the refusal", lambda: "named a is already running" in fleet.log("a"))
    assert end(second, first) == [0, 0]
    assert fleet.log("a").count("connected") == 1


def test_one_collector_has_the_duty_and_another_takes_it_over(
    fleet: Fleet, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outstation.fleet.collector import leader
    from outstation.fleet.database.keyring import Keyring

    monkeypatch.setattr(leader, "LEADER_CHECK_S", 0.0)
    stores = [FleetStore(fleet.url) for _ in range(3)]
    duties = [leader.LeaderTasks(store, Keyring(store)) for store in stores]
    for _ in range(2):
        for item in duties:
            item.tick()
        assert [item.is_leader for item in duties] == [True, False, False]
    stores[0].close()

    def having() -> int:
        for item in duties[1:]:
            item.tick()
        return sum(item.is_leader for item in duties[1:])

    # The server notices the closed connection after a while.
    wait_until("one has the lock", lambda: having() == 1)
    assert having() == 1
    for store in stores[1:]:
        store.close()
