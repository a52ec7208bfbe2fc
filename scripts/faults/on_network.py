"""Network faults between device, broker and collector: loss, delay, disconnection and half-open connections."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from random import Random

from scripts.faults import fault, proxy
from scripts.faults.proxy import Packet, Rule
from scripts.faults.world import Setting, World

_PROXIED = Setting(proxied=True)
_NAME = "broker.test"
# In its own mount namespace the daemon resolves names from our files; a missing resolver fails at once.
_BIND = 'mount --bind "$0" /etc/hosts && mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'


def _without(kind: int, *, up: bool) -> Rule:
    """Drop packets of this kind in one direction."""
    return lambda packet: (b"" if packet.up == up and packet.kind == kind else packet.raw, b"")


def _lost_acknowledgements(packet: Packet) -> tuple[bytes, bytes]:
    """Drop acknowledgements, while the broker believes the device has received them."""
    if not packet.up and packet.kind == proxy.PUBLISH and packet.topic.endswith("/ack"):
        return b"", proxy.puback(packet.mid, 0)
    return packet.raw, b""


@fault(_PROXIED)
def pubacks_dropped(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    with world.device_line.ruled(_without(proxy.PUBACK, up=False)):
        time.sleep(rng.uniform(0.5, 3.0))


@fault(_PROXIED, patience_s=120.0)
def messages_dropped(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    with world.device_line.ruled(_without(proxy.PUBLISH, up=True)):
        time.sleep(rng.uniform(0.2, 1.5))


@fault(_PROXIED)
def acknowledgements_dropped(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    with world.device_line.ruled(_lost_acknowledgements):
        time.sleep(rng.uniform(1.0, 3.0))
        if rng.random() < 0.5:
            # If the last acknowledgement is among the lost ones, only a repeated request brings it.
            world.producer.pause(10.0)
            time.sleep(1.0)


@fault(_PROXIED, patience_s=120.0)
def half_open_device(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 1.0))
    world.device_line.swallow()


@fault(_PROXIED, patience_s=240.0)
def half_open_collector(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 1.0))
    world.collector_line.swallow()


@fault(_PROXIED, patience_s=90.0)
def network_flapping(world: World, rng: Random) -> None:
    for _ in range(4):
        time.sleep(rng.uniform(0.6, 1.2))
        world.device_line.cut()
        world.collector_line.cut()


@fault(_PROXIED, patience_s=90.0)
def network_down(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    lines = rng.choice([[world.device_line], [world.collector_line], [world.device_line, world.collector_line]])
    for line in lines:
        line.refusing = True
        line.cut()
    time.sleep(rng.uniform(0.5, 3.0))
    for line in lines:
        line.refusing = False


@fault(_PROXIED)
def network_stalled(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    line = rng.choice([world.device_line, world.collector_line])
    line.held = True
    time.sleep(rng.uniform(1.0, 4.0))
    line.held = False


@fault(_PROXIED)
def slow_bytes(world: World, rng: Random) -> None:
    with ExitStack() as after:
        for line in (world.device_line, world.collector_line):
            line.pause_s, line.piece = 0.001, rng.choice([1, 7, 60])
            after.callback(setattr, line, "piece", 0)
        time.sleep(rng.uniform(1.0, 2.5))


def _named(world: World) -> None:
    """Connect the device to the broker by a name that the test controls."""
    config = world.device.config
    url = f"mqtt://{_NAME}:{world.broker.port}"
    text = config.read_text(encoding="utf-8").replace(f'"{world.broker.url}"', f'"{url}"\nallow_plaintext = true')
    config.write_text(text, encoding="utf-8")
    resolver = world.folder / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n", encoding="ascii")
    _resolve(world, known=True)
    words = ("unshare", "-m", "sh", "-c", _BIND, str(_hosts(world)), str(resolver))
    world.device.set_launcher(world.setting.launcher, words)


def _hosts(world: World) -> Path:
    return world.folder / "hosts"


def _resolve(world: World, *, known: bool) -> None:
    # Written in place, because the bind mount refers to the file and not to its name.
    name = f" {_NAME}" if known else ""
    _hosts(world).write_text(f"127.0.0.1 localhost{name}\n", encoding="ascii")


def _no_namespaces() -> str | None:
    usable = os.geteuid() == 0 and shutil.which("unshare") is not None
    return None if usable else "a mount namespace of its own needs root and unshare"


@fault(Setting(prepare=(_named,), missing=_no_namespaces), patience_s=90.0)
def broker_unresolvable(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    _resolve(world, known=False)
    world.broker.kill()
    time.sleep(rng.uniform(0.0, 0.5))
    world.broker.start()
    time.sleep(rng.uniform(1.0, 3.0))
    _resolve(world, known=True)
