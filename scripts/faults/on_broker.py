"""Broker faults: crash, lost state and reduced limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

from agent.testing.process import wait_until
from scripts.faults import fault, proxy
from scripts.faults.proxy import Cut, Packet, Rule
from scripts.faults.world import Setting, World

_PROXIED = Setting(proxied=True)


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
    time.sleep(rng.uniform(1.0, 2.0))
    world.broker.kill()
    world.broker.start()
    world.keep(world.collector)


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
