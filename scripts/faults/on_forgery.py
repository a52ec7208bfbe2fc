"""Forgery faults: forged, replayed or excessive acknowledgements and messages on the broker."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from random import Random

from outstation.foundation import clock
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage, PublishReceipt
from outstation.protocol.wire import jws, keys
from outstation.protocol.wire.jws import encode
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.testing.fleet import FLEET
from outstation.workbench.testing.messages import new_key
from outstation.workbench.testing.patience import pause, wait_until
from scripts.faults import fault
from scripts.faults.world import DEVICE, World
from scripts.kit.broker_client import publish_all

_BASE = f"outstation/{FLEET}/{DEVICE}"
_ACK = f"{_BASE}/ack"
_FLOOD = 5000


def _ack(key: SigningKey, log: str, through: int) -> OutgoingMessage:
    now = clock.now_rfc3339()
    members = {"v": 1, "kind": "ack", "device": DEVICE, "log": log, "through": through, "missing": [], "time": now}
    payload = encode(members)
    return OutgoingMessage(_ACK, payload, (("jws", jws.sign(key, _ACK, payload)),))


def _collector_key(world: World) -> SigningKey:
    return keys.load_private(world.fleet.home / "collector.key")


def _log(world: World) -> tuple[str, int]:
    """Return the device's log, and its last seq."""
    with world.device_store() as store:
        return store.log_id, store.outbox_size()[1]


def _refused(world: World) -> int:
    with world.device_store() as store:
        return sum(n for name, n in store.counters().items() if "refused" in name)


def _publish(world: World, hostile: Sequence[OutgoingMessage]) -> None:
    """Publish as an authorized client that respects its send window."""
    with Link(world.fleet.config.broker, f"stranger-{uuid.uuid4()}") as link:
        publish_all(link, hostile)


def _forge(world: World, rng: Random, make: Callable[[str, int], OutgoingMessage]) -> None:
    """Forge messages while the collector is down and the outbox grows; the outbox must not shrink."""
    world.kill(world.collector)
    time.sleep(rng.uniform(0.2, 0.8))
    wait_until("something in the outbox", world.outbox_size)
    before, log = _settled(world), _log(world)
    _publish(world, [make(*log) for _ in range(rng.randint(1, 5))])
    pause(rng.uniform(0.3, 0.8))
    after = world.outbox_size()
    assert after >= before, f"{before} messages waited, {after} after the forged acknowledgement"
    world.keep(world.collector)


def _settled(world: World) -> int:
    """Return the number of waiting messages after the last genuine acknowledgement has arrived."""
    before = world.outbox_size()
    while True:
        time.sleep(0.5)
        now = world.outbox_size()
        if now >= before:
            return now
        before = now


def _counted(world: World, before: int) -> None:
    """Wait for the count of refusals, which is written once a minute at most, and when the device stops."""
    world.leave(world.device)
    code = world.device.stop()
    assert code == 0, f"exit code {code}"
    world.keep(world.device)
    assert _refused(world) > before, "what was refused is not counted"


def _alerted_once(world: World, source: str = "device") -> None:
    """Check for a single alert over all rounds; it clears only after a quiet hour."""
    where = "device = ? AND alert = 'security' AND subject = 'refused' AND source = ?"
    sql = f"SELECT count(*) FROM alerts WHERE {where}"
    wait_until(f"a security alert of the {source}", lambda: world.fleet.query(sql, DEVICE, source)[0][0])
    assert world.fleet.query(sql, DEVICE, source) == [(1,)]


@fault()
def ack_forged(world: World, rng: Random) -> None:
    before = _refused(world)
    _forge(world, rng, lambda log, last: _ack(new_key(), log, last))
    _counted(world, before)
    _alerted_once(world)


@fault()
def ack_for_another_log(world: World, rng: Random) -> None:
    before = _refused(world)
    _forge(world, rng, lambda log, last: _ack(_collector_key(world), str(uuid.uuid4()), last))
    _counted(world, before)


@fault(damages=True)
def ack_beyond_the_log(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 0.8))
    log, last = _log(world)
    _publish(world, [_ack(_collector_key(world), log, last + rng.randint(1000, 10**6))])
    wait_until("a new log", lambda: _log(world)[0] != log)


@fault()
def ack_unsigned(world: World, rng: Random) -> None:
    before = _refused(world)

    def make(log: str, last: int) -> OutgoingMessage:
        other = _ack(_collector_key(world), log, 0)
        genuine = _ack(new_key(), log, last)
        return OutgoingMessage(_ACK, genuine.payload, rng.choice([(), other.properties]))

    _forge(world, rng, make)
    _counted(world, before)
    _alerted_once(world)


@fault()
def ack_replayed(world: World, rng: Random) -> None:
    link = Link(world.fleet.config.broker, f"listener-{uuid.uuid4()}", subscribe=[_ACK])
    old = None
    try:
        deadline = time.monotonic() + 20
        while old is None and time.monotonic() < deadline:
            old = next((event for event in link.receive(1.0) if not isinstance(event, PublishReceipt)), None)
    finally:
        link.close()
    assert old is not None, "no acknowledgement within 20 s"
    again = OutgoingMessage(_ACK, old.payload, tuple(("jws", token) for token in old.tokens), retain=rng.random() < 0.5)
    time.sleep(rng.uniform(0.5, 1.5))
    _forge(world, rng, lambda log, last: again)


@fault()
def ack_garbage_retained(world: World, rng: Random) -> None:
    before = _refused(world)
    _forge(
        world, rng, lambda log, last: OutgoingMessage(_ACK, rng.randbytes(1_000_000), (("jws", "a..b"),), retain=True)
    )
    _counted(world, before)
    _alerted_once(world)


@fault(patience_s=90.0)
def flood(world: World, rng: Random) -> None:
    before = _refused(world)
    topics = [_ACK, f"{_BASE}/cmd", f"{_BASE}/results/often", f"{_BASE}/health", f"{_BASE}/state"]
    stranger = new_key()
    log, last = _log(world)
    forged = _ack(stranger, log, last)
    hostile = [
        OutgoingMessage(
            rng.choice(topics),
            forged.payload if rng.random() < 0.5 else rng.randbytes(rng.randint(0, 2000)),
            rng.choice([(), forged.properties, (("jws", "x"),)]),
        )
        for _ in range(_FLOOD)
    ]
    _publish(world, hostile)
    _counted(world, before)
    _alerted_once(world)
    _alerted_once(world, "collector")
