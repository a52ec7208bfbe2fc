"""Network faults between device, broker and collector: loss, delay, disconnection and half-open connections."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random

from scripts.faults import fault, proxy
from scripts.faults.proxy import Packet
from scripts.faults.world import Setting, World

_PROXIED = Setting(proxied=True)
_NAME = "broker.test"
_COMES_BACK = "`broker: …; trying again, readings and results are kept` in the device's log, `offline`, later `online`"
# In its own mount namespace the daemon resolves names from our files; a missing resolver fails at once.
_BIND = 'mount --bind "$0" /etc/hosts && mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'


def _lost_pubacks(packet: Packet) -> tuple[bytes, bytes]:
    return (b"" if not packet.up and packet.kind == proxy.PUBACK else packet.raw), b""


def _lost_messages(packet: Packet) -> tuple[bytes, bytes]:
    return (b"" if packet.up and packet.kind == proxy.PUBLISH else packet.raw), b""


def _lost_acknowledgements(packet: Packet) -> tuple[bytes, bytes]:
    """Drop acknowledgements, while the broker believes the device has received them."""
    if not packet.up and packet.kind == proxy.PUBLISH and packet.topic.endswith("/ack"):
        return b"", proxy.puback(packet.mid, 0)
    return packet.raw, b""


@fault(
    "pubacks-dropped",
    means="The broker's PUBACKs are lost for a while, but messages arrive; the connection stays.",
    sees="nothing, or `the broker did not confirm a message for 30 s` in the device's log, and a new connection",
    setting=_PROXIED,
)
def pubacks_dropped(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    with world.device_line.ruled(_lost_pubacks):
        time.sleep(rng.uniform(0.5, 3.0))


@fault(
    "messages-dropped",
    means="The broker silently drops messages for a while, as with throttling; the connection stays.",
    sees="`the broker did not confirm a message for 30 s` in the device's log, and a new connection",
    setting=_PROXIED,
    patience_s=120.0,
)
def messages_dropped(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    with world.device_line.ruled(_lost_messages):
        time.sleep(rng.uniform(0.2, 1.5))


@fault(
    "acknowledgements-dropped",
    means="The collector's acknowledgements do not reach the device for a while.",
    sees="nothing; the device's outbox grows and empties later",
    setting=_PROXIED,
)
def acknowledgements_dropped(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    with world.device_line.ruled(_lost_acknowledgements):
        time.sleep(rng.uniform(1.0, 3.0))
        if rng.random() < 0.5:
            # If the last acknowledgement is among the lost ones, only a repeated request brings it.
            world.producer.pause(10.0)
            time.sleep(1.0)


@fault(
    "half-open-device",
    means="The device's TCP connection is dead without notice: its bytes vanish (lost NAT state).",
    sees="`offline`; `the broker did not confirm a message for 30 s` in the device's log, then `online`",
    setting=_PROXIED,
    patience_s=120.0,
)
def half_open_device(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 1.0))
    world.device_line.swallow()


@fault(
    "half-open-collector",
    means="The collector's TCP connection is dead without notice.",
    sees="nothing arrives for up to two minutes; then `trying again` and `connected` in the collector's log",
    setting=_PROXIED,
    patience_s=240.0,
)
def half_open_collector(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 1.0))
    world.collector_line.swallow()


@fault(
    "network-flapping",
    means="Every connection is reset about once a second.",
    sees=_COMES_BACK,
    setting=_PROXIED,
    patience_s=90.0,
)
def network_flapping(world: World, rng: Random) -> None:
    for _ in range(4):
        time.sleep(rng.uniform(0.6, 1.2))
        world.device_line.cut()
        world.collector_line.cut()


@fault(
    "network-down",
    means="Connections are reset, and new ones refused, for some seconds.",
    sees=_COMES_BACK,
    setting=_PROXIED,
    patience_s=90.0,
)
def network_down(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    lines = rng.choice([[world.device_line], [world.collector_line], [world.device_line, world.collector_line]])
    for line in lines:
        line.refusing = True
        line.cut()
    time.sleep(rng.uniform(0.5, 3.0))
    for line in lines:
        line.refusing = False


@fault(
    "network-stalled",
    means="The network stalls for some seconds; then all held packets arrive at once.",
    sees="nothing; results arrive late",
    setting=_PROXIED,
)
def network_stalled(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    line = rng.choice([world.device_line, world.collector_line])
    line.held = True
    time.sleep(rng.uniform(1.0, 4.0))
    line.held = False


@fault(
    "slow-bytes",
    means="Packets arrive a few bytes at a time, more slowly than results are produced.",
    sees="nothing; results arrive late",
    setting=_PROXIED,
)
def slow_bytes(world: World, rng: Random) -> None:
    with ExitStack() as after:
        for line in (world.device_line, world.collector_line):
            line.pause_s, line.piece = 0.001, rng.choice([1, 7, 60])
            after.callback(setattr, line, "piece", 0)
        time.sleep(rng.uniform(1.0, 2.5))


def _named(world: World) -> Callable[[], None]:
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
    return lambda: None


def _hosts(world: World) -> Path:
    return world.folder / "hosts"


def _resolve(world: World, *, known: bool) -> None:
    # Written in place, because the bind mount refers to the file and not to its name.
    name = f" {_NAME}" if known else ""
    _hosts(world).write_text(f"127.0.0.1 localhost{name}\n", encoding="ascii")


def _no_namespaces() -> str | None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "a mount namespace of its own needs root and unshare"
    return None


@fault(
    "broker-unresolvable",
    means="The broker's host name does not resolve for some seconds after the connection is lost.",
    sees="`broker: mqtt://…: Temporary failure in name resolution; trying again` in the device's log",
    setting=Setting(prepare=_named),
    missing=_no_namespaces,
    patience_s=90.0,
)
def broker_unresolvable(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    _resolve(world, known=False)
    world.broker.kill()
    time.sleep(rng.uniform(0.0, 0.5))
    world.broker.start()
    time.sleep(rng.uniform(1.0, 3.0))
    _resolve(world, known=True)
