"""Backlog faults: a long broker outage leaves more waiting messages than MQTT has packet identifiers."""

from __future__ import annotations

from random import Random

from agent import clock
from agent.bootstrap.device import load_config, open_message_log, open_store
from agent.clock import ClockReading
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.testing.process import wait_until
from scripts.faults import fault
from scripts.faults.world import World
from scripts.kit.process_stats import memory_kb

_BACKLOG = 70_000
_AT_ONCE = 1000
_WITHIN_S = 400.0
# The daemon's send window is a hundred messages; the backlog is about 60 MB.
_MOST_MORE_KB = 48 * 1024


@fault(patience_s=120.0)
def backlog_70000(world: World, rng: Random) -> None:
    before = memory_kb(world.device.pid, "VmHWM")
    world.kill(world.device)
    world.broker.kill()
    _write_backlog(world)
    world.broker.start()
    world.keep(world.device)
    wait_until("the backlog delivered", lambda: world.outbox_size() < _AT_ONCE, _WITHIN_S)
    more = memory_kb(world.device.pid, "VmHWM") - before
    assert more < _MOST_MORE_KB, f"the daemon took {more} KB more than before the backlog"


def _write_backlog(world: World) -> None:
    """Write a backlog with the device's own signing and chaining, as after weeks of operation."""
    file, conf = load_config(str(world.device.config))
    store = open_store(conf)
    try:
        author = open_message_log(file, conf, store)
        for first in range(0, _BACKLOG, _AT_ONCE):
            _write(store, author, first, clock.read())
    finally:
        store.close()


def _write(store: Store, author: MessageLog, first: int, now: ClockReading) -> None:
    with store.transaction() as tx:
        for i in range(first, first + _AT_ONCE):
            body = {"event": "waited", "summary": f"Message {i} of a long time without a broker.", "evidence": {}}
            author.append(tx, "audit", None, body, now)
