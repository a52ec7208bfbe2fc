"""Outbox to broker, acknowledgements back: a sliding window over the log, on one thread that owns the link.

A message leaves the outbox on the collector's signed acknowledgement (or on PUBACK, with delivery = "broker"), never
because it was sent: brokers lose what they have confirmed. What was sent and not acknowledged in time is sent again;
the collector drops what it has.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from agent import clock, config, link
from agent.clock import Now
from agent.device.author import Author
from agent.device.store import Store
from agent.device.transaction import Pending
from agent.errors import LinkDown, Refused, StorageFull
from agent.link import Delivery, Link, Receipt
from agent.wire import jws, messages, topics
from agent.wire.keys import PublicKey

log = logging.getLogger("outstation.uplink")

_PAGE = 200
_IDLE_S = 0.5
_RESEND_S = 30.0
# Each deletion is a commit of some 28 KB on flash; acknowledgements are cumulative, so the newest of a while serves.
_APPLY_S = 1.0
_BACKOFF_S = (0.5, 60.0)


@dataclass
class Progress:
    """Where sending stands on one connection."""

    sent_through: int
    again: deque[int] = field(default_factory=deque)
    flying: dict[int, Pending] = field(default_factory=dict)
    last_progress_s: float = 0.0
    held: set[int] = field(default_factory=set)
    ack: messages.Ack | None = None
    applied_s: float = 0.0


class Uplink:
    """Sends the outbox and takes acknowledgements, for as long as it runs."""

    def __init__(
        self,
        conf: config.Config,
        store: Store,
        author: Author,
        collector: PublicKey | None,
        now: Callable[[], Now],
        failed: Callable[[Exception], None],
    ) -> None:
        self._conf, self._store, self._author, self._now, self._failed = conf, store, author, now, failed
        self._signer = jws.Signer("collector", collector) if collector else None
        self._ack_topic = str(topics.Topic(author.fleet, author.device, "ack"))
        self._stopping = threading.Event()
        self._link: Link | None = None
        self._drain_until_s = 0.0
        self.state = "not connected yet"
        self.connected = False
        self._thread = threading.Thread(target=self._main, name="uplink", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something new to send."""
        current = self._link
        if current is not None:
            current.wake()

    def stop(self, drain_s: float = 3.0) -> None:
        """Give the outbox up to `drain_s` to empty, say `stopped`, and leave."""
        self._drain_until_s = self._now().boot_s + drain_s
        self._stopping.set()
        self.wake()
        self._thread.join(drain_s + 5)

    def _main(self) -> None:
        try:
            self._keep_connected()
        except Exception as error:
            self._failed(error)

    def _keep_connected(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            began = self._now().boot_s
            try:
                self._session()
            except (LinkDown, StorageFull) as down:
                attempt = 0 if self._now().boot_s - began > 60 else attempt + 1
                self.connected = False
                if str(down) != self.state:
                    log.warning("broker: %s; trying again, readings and results are kept", down)
                self.state = str(down)
                low, high = _BACKOFF_S
                # Full jitter: a fleet that lost its broker together must not come back together.
                self._stopping.wait(random.uniform(low, min(high, low * 2 ** min(attempt, 10))))

    def _session(self) -> None:
        """One connection, from CONNECT until it is lost or the device stops."""
        now = self._now()
        will = self._author.live("state", {"state": "offline", "boot": self._author.boot}, now)
        current = Link(self._conf.broker, self._author.device, subscribe=[self._ack_topic], will=will)
        self._link = current
        try:
            log.info("broker: connected to %s", self._conf.broker.url)
            self.connected, self.state = True, "connected"
            current.send(self._author.live("keys", {"keys": [self._author.key.public.jwk]}, now))
            current.send(self._author.live("state", {"state": "online", "boot": self._author.boot}, now))
            progress = Progress(0, last_progress_s=now.boot_s)
            while not self._finished(progress):
                now = self._now()
                turn(current, self._store, self._author, progress, now, self._check_ack, by_broker=self._by_broker)
                if progress.ack and (self._stopping.is_set() or now.boot_s - progress.applied_s > _APPLY_S):
                    apply(progress.ack, self._store, progress, now)
            stopped = self._author.live("state", {"state": "stopped", "boot": self._author.boot}, self._now())
            token = current.send(stopped)
            _await_receipt(current, token)
            current.close()
        except BaseException:
            current.drop()
            raise
        finally:
            self._link = None

    @property
    def _by_broker(self) -> bool:
        return self._conf.collector.delivery == "broker"

    def _finished(self, progress: Progress) -> bool:
        if not self._stopping.is_set():
            return False
        waiting, _ = self._store.outbox_size()
        return waiting == len(progress.held) or self._now().boot_s > self._drain_until_s

    def _check_ack(self, delivery: Delivery) -> messages.Ack | None:
        """The acknowledgement in `delivery`, or None where it is not one to obey."""
        try:
            ack = self._open(delivery)
            _, last = self._store.outbox_size()
            if ack.through > last:
                raise Refused("beyond the log", f"acknowledges {ack.through}, the last message is {last}")
        except Refused as refusal:
            log.warning("acknowledgement refused: %s", refusal)
            with self._store.transaction() as tx:
                tx.count("acknowledgements refused", 1)
            return None
        return ack

    def _open(self, delivery: Delivery) -> messages.Ack:
        signer = self._signer
        if signer is None:
            raise Refused("unknown key", "no [collector] key is configured")
        opened = messages.open_message(delivery.topic, delivery.payload, delivery.tokens, {signer.key.kid: signer}.get)
        if not isinstance(opened.body, messages.Ack) or delivery.topic != self._ack_topic:
            raise Refused("other kind", delivery.topic)
        if opened.body.log != self._author.log_id:
            raise Refused("other log", opened.body.log)
        return opened.body


def turn(
    current: Link,
    store: Store,
    author: Author,
    progress: Progress,
    now: Now,
    check_ack: Callable[[Delivery], messages.Ack | None],
    *,
    by_broker: bool,
) -> None:
    """Fill the window, then take what comes. Raises LinkDown, StorageError."""
    if now.boot_s - progress.last_progress_s > _RESEND_S and not progress.flying:
        # All was sent and confirmed, and yet nothing is acknowledged: a broker may have lost it.
        progress.sent_through, progress.last_progress_s = 0, now.boot_s
        progress.again.clear()
    for pending in _next(store, progress, current.window - len(progress.flying)):
        outgoing = author.outgoing(pending)
        if len(outgoing.payload) + len(outgoing.topic) + 1_000 > current.max_packet:
            log.error("message %d is above the broker's limit of %d bytes; held back", pending.seq, current.max_packet)
            progress.held.add(pending.seq)
            continue
        progress.flying[current.send(outgoing)] = pending
    confirmed: list[int] = []
    for event in current.receive(0.0 if progress.again else _IDLE_S):
        if isinstance(event, Receipt):
            done = progress.flying.pop(event.token, None)
            if done is not None:
                _settle(event, done, progress, confirmed)
                progress.last_progress_s = now.boot_s
        else:
            current.acknowledge(event)
            progress.ack = check_ack(event) or progress.ack
    if confirmed and by_broker:
        with store.transaction() as tx:
            tx.forget(confirmed)


def apply(ack: messages.Ack, store: Store, progress: Progress, now: Now) -> None:
    """What `ack` covers leaves the outbox; what it misses is sent again."""
    with store.transaction() as tx:
        tx.acknowledge(ack.through, ack.missing)
        tx.raise_floor(clock.epoch_us(ack.time))
    progress.ack, progress.applied_s = None, now.boot_s
    on_the_way = {pending.seq for pending in progress.flying.values()} | set(progress.again)
    for first, last in ack.missing:
        wanted = range(first, min(last, progress.sent_through, first + _PAGE) + 1)
        progress.again.extend(seq for seq in wanted if seq not in on_the_way)


def _next(store: Store, progress: Progress, room: int) -> list[Pending]:
    """What to send now: what the collector asked for again first, then the log in order."""
    if room <= 0:
        return []
    if progress.again:
        wanted = [progress.again.popleft() for _ in range(min(room, len(progress.again)))]
        return store.pending(wanted)
    page = store.unsent(progress.sent_through, min(room, _PAGE))
    if page:
        progress.sent_through = page[-1].seq
    return page


def _settle(receipt: Receipt, done: Pending, progress: Progress, confirmed: list[int]) -> None:
    if receipt.taken and receipt.code != link.NO_SUBSCRIBERS:
        confirmed.append(done.seq)
    elif receipt.code == link.PACKET_TOO_LARGE:
        progress.held.add(done.seq)
        log.error("message %d: the broker says %s; it is held back", done.seq, receipt.reason)
    elif not receipt.taken:
        raise LinkDown(f"the broker refuses messages: {receipt.reason}; check the ACL for this device")


def _await_receipt(current: Link, token: int) -> None:
    for _ in range(20):
        if any(isinstance(event, Receipt) and event.token == token for event in current.receive(0.1)):
            return
