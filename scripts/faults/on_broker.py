"""Broker faults: crash, lost state, reduced limits and long outage."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from random import Random

from outstation.device.bootstrap.device import load_config, open_message_log, open_store
from outstation.device.store.message_log import MessageLog
from outstation.device.store.retention import MAX_NEWEST_MESSAGES
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.workbench.testing.patience import wait_until
from scripts.faults import fault, proxy
from scripts.faults.proxy import Cut, Packet, Rule
from scripts.faults.world import Setting, World
from scripts.kit.process_stats import memory_kb

_PROXIED = Setting(proxied=True)
# A long outage leaves more waiting messages than MQTT has packet identifiers.
_BACKLOG = 70_000
_AT_ONCE = 1000
# Without progress.
_STALLED_S = 120.0
# The daemon's send window is a hundred messages; the backlog is about 60 MB.
_MOST_MORE_KB = 48 * 1024


@fault()
def kill_broker(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 1.0))
    world.broker.kill()
    time.sleep(rng.uniform(0.0, 1.0))
    world.broker.start()


@fault(Setting(broker_persistence=True, broker_conf="autosave_interval 1"))
def broker_forgets(world: World, rng: Random) -> None:
    world.kill(world.collector)
    time.sleep(rng.uniform(0.5, 2.0))
    world.broker.kill()
    (world.broker.folder / "data" / "mosquitto.db").unlink(missing_ok=True)
    world.broker.start()
    world.keep(world.collector)


@fault()
def kill_everything(world: World, rng: Random) -> None:
    def broker() -> None:
        world.broker.kill()
        world.broker.start()

    kills: list[Callable[[], None]] = [
        broker,
        lambda: world.restart(world.collector),
        lambda: world.restart(world.device),
    ]
    rng.shuffle(kills)
    for kill in (*kills, rng.choice(kills)):
        time.sleep(rng.uniform(0.0, 0.5))
        kill()


@fault(Setting(collector_toml='delivery = "broker"'), patience_s=6.0)
def control_delete_on_puback(world: World, rng: Random) -> None:
    world.kill(world.collector)
    # Two tasks share the count. The newest messages of each stay on the device; later ones displace several at once.
    enough = _count_results(world) + 2 * (2 * MAX_NEWEST_MESSAGES + rng.randint(4, 12))
    wait_until("results that displace earlier ones", lambda: _count_results(world) >= enough)
    world.broker.kill()
    world.broker.start()
    world.keep(world.collector)


def _count_results(world: World) -> int:
    """Return how many results messages the device ever wrote."""
    with Store.open_read_only(world.device.data_dir) as store:
        return store.counters().get("messages.results", 0)


def _answering(code: int) -> Rule:
    """Run a broker that answers the device's PUBLISH with `code` and forwards nothing."""

    def rule(packet: Packet) -> tuple[bytes, bytes]:
        if packet.up and packet.kind == proxy.PUBLISH:
            return b"", proxy.puback(packet.mid, code)
        return packet.raw, b""

    return rule


def _for_a_while(world: World, rng: Random, rule: Rule) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    with world.device_line.ruled(rule):
        time.sleep(rng.uniform(0.5, 2.5))


@fault(_PROXIED)
def not_authorized(world: World, rng: Random) -> None:
    _for_a_while(world, rng, _answering(0x87))


@fault(_PROXIED)
def quota_exceeded(world: World, rng: Random) -> None:
    _for_a_while(world, rng, _answering(0x97))


@fault(_PROXIED)
def no_subscribers(world: World, rng: Random) -> None:
    _for_a_while(world, rng, _answering(0x10))


@fault(_PROXIED)
def too_large_for_broker(world: World, rng: Random) -> None:
    def rule(packet: Packet) -> tuple[bytes, bytes]:
        if packet.up and packet.kind == proxy.PUBLISH and "/results/in-tens" in packet.topic:
            return b"", proxy.puback(packet.mid, proxy.PACKET_TOO_LARGE)
        return packet.raw, b""

    _for_a_while(world, rng, rule)
    world.device_line.cut()


@fault(_PROXIED, patience_s=90.0)
def thrown_out_as_too_large(world: World, rng: Random) -> None:
    def rule(packet: Packet) -> tuple[bytes, bytes]:
        if packet.up and packet.kind == proxy.PUBLISH and "/results/" in packet.topic:
            raise Cut(proxy.disconnect(proxy.PACKET_TOO_LARGE))
        return packet.raw, b""

    _for_a_while(world, rng, rule)


class _Limited:
    """Run a broker that announces a limit at CONNECT and disconnects clients that exceed it."""

    def __init__(self, name: int, limit: int) -> None:
        self.breaches: list[str] = []
        self.connections = 0
        self._name, self._limit = name, limit
        self._flying: set[int] = set()

    def __call__(self, packet: Packet) -> tuple[bytes, bytes]:
        if packet.up and packet.kind == proxy.CONNECT:
            self._flying.clear()
        if not packet.up and packet.kind == proxy.CONNACK:
            self.connections += 1
            return proxy.with_limit(packet.raw, self._name, self._limit), b""
        if not packet.up and packet.kind == proxy.PUBACK:
            self._flying.discard(packet.mid)
        if packet.up and packet.kind == proxy.PUBLISH:
            self._check(packet)
        return packet.raw, b""

    def _check(self, packet: Packet) -> None:
        self._flying.add(packet.mid)
        large = self._name == proxy.MAXIMUM_PACKET_SIZE
        if (len(packet.raw) if large else len(self._flying)) > self._limit:
            self.breaches.append(f"{packet.topic}: {len(packet.raw)} bytes, {len(self._flying)} under way")
            raise Cut(proxy.disconnect(proxy.PACKET_TOO_LARGE if large else proxy.RECEIVE_MAXIMUM_EXCEEDED))


def _limited(world: World, rng: Random, name: int, limit: int) -> None:
    limited = _Limited(name, limit)
    with world.device_line.ruled(limited):
        world.device_line.cut()
        wait_until("a connection with the limit", lambda: limited.connections, 70)
        time.sleep(rng.uniform(0.5, 2.0))
    world.device_line.cut()
    assert not limited.breaches, f"the device ignored the broker's limit: {limited.breaches[:3]}"


@fault(_PROXIED, patience_s=90.0)
def receive_maximum_2(world: World, rng: Random) -> None:
    _limited(world, rng, proxy.RECEIVE_MAXIMUM, 2)


@fault(_PROXIED, patience_s=90.0)
def packet_size_256(world: World, rng: Random) -> None:
    _limited(world, rng, proxy.MAXIMUM_PACKET_SIZE, 256)


@fault(patience_s=120.0)
def backlog_70000(world: World, rng: Random) -> None:
    before = memory_kb(world.device.pid, "VmHWM")
    world.kill(world.device)
    world.broker.kill()
    _write_backlog(world)
    world.broker.start()
    world.keep(world.device)
    # However slow a busy machine is. Each wait is for less than the one before: a backlog that stays must end them.
    for left in range(_BACKLOG, 0, -_AT_ONCE):
        wait_until(f"fewer than {left} messages wait", partial(_is_outbox_below, world, left), _STALLED_S)
    more = memory_kb(world.device.pid, "VmHWM") - before
    assert more < _MOST_MORE_KB, f"the daemon took {more} KB more than before the backlog"


def _is_outbox_below(world: World, size: int) -> bool:
    return world.outbox_size() < size


def _write_backlog(world: World) -> None:
    """Write a backlog with the device's own signing and chaining, as after weeks of operation."""
    file, conf = load_config(str(world.device.config))
    with open_store(conf) as store:
        author = open_message_log(file, conf, store)
        for first in range(0, _BACKLOG, _AT_ONCE):
            _write(store, author, first, clock.read())


def _write(store: Store, author: MessageLog, first: int, now: ClockReading) -> None:
    with store.transaction() as tx:
        for i in range(first, first + _AT_ONCE):
            body = {"event": "waited", "summary": f"Message {i} of a long time without a broker.", "evidence": {}}
            author.append(tx, "audit", None, body, now)
