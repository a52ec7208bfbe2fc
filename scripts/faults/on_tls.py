"""TLS faults: expired certificates, and other clients that take the device's name at the broker."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

from outstation.device import config as device_config
from outstation.fleet.enrolment import pki
from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.workbench.testing.patience import wait_until
from scripts.faults import fault
from scripts.faults.world import DEVICE, Setting, World
from scripts.kit.certificates import make_expired

_OTHER = "pi-02"


def _with_expired(world: World, rng: Random, certificate: Path, reported: Callable[[], bool]) -> None:
    """Install an expired certificate, restart the broker, wait for the reported error, and restore a valid one."""
    home = world.fleet.home
    valid = certificate.read_bytes()
    certificate.write_bytes(make_expired(valid, pki.load_authority(home / "ca.pem", home / "ca.key")))
    try:
        world.broker.kill()
        world.broker.start()
        wait_until("the expiry in the log", reported)
        time.sleep(rng.uniform(0.0, 1.0))
    finally:
        certificate.write_bytes(valid)


def _counting(log: Path, words: str) -> Callable[[], bool]:
    """Check whether `words` appear once more than now."""

    def count() -> int:
        return log.read_text(encoding="utf-8", errors="replace").count(words)

    before = count()
    return lambda: count() > before


@fault(Setting(tls=True), patience_s=90.0)
def device_certificate_expired(world: World, rng: Random) -> None:
    _with_expired(world, rng, world.device.home / "device.crt", _counting(world.device.log, "device.crt expired on"))


@fault(Setting(tls=True), patience_s=90.0)
def broker_certificate_expired(world: World, rng: Random) -> None:
    reported = _counting(world.device.log, "certificate has expired")
    _with_expired(world, rng, world.fleet.home / "broker" / "server.crt", reported)
    world.broker.kill()
    world.broker.start()


@fault(Setting(tls=True, prepare=(lambda world: world.fleet.add_device(_OTHER),)))
def client_id_stolen(world: World, rng: Random) -> None:
    thrown_off = _counting(world.device.log, "trying again")
    _steal(world.fleet.devices[-1].config, rng)
    assert not thrown_off(), "the device was thrown off by another one's connection"


@fault(patience_s=90.0)
def session_taken_over(world: World, rng: Random) -> None:
    _steal(world.device.config, rng)


def _steal(config: Path, rng: Random) -> None:
    broker: BrokerConfig = device_config.load(config).broker
    for _ in range(4):
        with suppress(LinkDown):
            link = Link(broker, DEVICE)
            end = time.monotonic() + rng.uniform(0.1, 1.0)
            try:
                while time.monotonic() < end:
                    link.receive(0.1)
            finally:
                link.drop()
