"""The outbox over one connection: which message is next, what is under way, what is sent again.

- never more under way than the broker's Receive Maximum, nothing above its Maximum Packet Size
- a message leaves the outbox when the collector's signed acknowledgement covers it; with delivery = "broker", when the
  broker has confirmed it and somebody was subscribed
- what an acknowledgement calls missing is sent again, in rounds; where nothing is heard the oldest messages and the
  newest one go again, less and less often: the newest makes a living collector ask for what it lacks
- at most `CREDIT` messages are out unanswered: more would only fill the broker's queue, or go to nobody
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from agent.clock import Now
from agent.device.store.damaged_messages import declare_damaged
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Pending
from agent.device.uplink.acknowledgements import Acknowledgements
from agent.errors import LinkDown
from agent.transport.packets import NO_SUBSCRIBERS, PACKET_TOO_LARGE, Delivery, Outgoing, Receipt
from agent.wire.messages import Ack

log = logging.getLogger("outstation.uplink")

CREDIT = 1000
# An acknowledgement always lets so many more go, even one that is stuck at an old message.
TRICKLE = 100
IDLE_S = 0.5
STALLED_S = 30.0
ROUND_S = 2.0
SILENCE_S = (10.0, 120.0)
# Where the broker itself says that nobody is subscribed, there is nothing to wait for.
NOBODY_S = 2.0
_OLDEST = 20
_PAGE = 100
# A PUBLISH beside topic, payload and user properties: fixed header, packet id, content type, lengths.
_OVERHEAD = 48


class Connection(Protocol):
    """What a session uses of a Link."""

    @property
    def window(self) -> int: ...
    @property
    def max_packet(self) -> int: ...

    def send(self, message: Outgoing) -> int: ...
    def receive(self, timeout_s: float) -> list[Delivery | Receipt]: ...
    def acknowledge(self, delivery: Delivery) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...
    def drop(self) -> None: ...


class Session:
    """From CONNECT until the link is lost or closed. `live` messages go before those of the outbox.

    What comes is an acknowledgement unless `take` takes it.
    """

    def __init__(
        self,
        link: Connection,
        store: Store,
        author: Author,
        acks: Acknowledgements,
        now: Now,
        *,
        by_broker: bool,
        live: Sequence[Outgoing] = (),
        take: Callable[[Delivery, Now], bool] = lambda delivery, now: False,
    ) -> None:
        self._link, self._store, self._author, self._acks, self._by_broker = link, store, author, acks, by_broker
        self._live, self._take = deque(live), take
        self._flying: dict[int, Pending | Outgoing] = {}
        self._again: deque[int] = deque()
        self._held: set[int] = set()
        self._damaged: list[int] = []
        self._sent = 0
        self._out = 0
        self._missing: Sequence[tuple[int, int]] = ()
        self._asked = self._greeted = self._nobody = False
        self._oldest: int | None = None
        self._oldest_s = now.boot_s
        # Whether the collector answered on this connection; a retained answer is an old one.
        self.answered = False
        self._round_at = 0.0
        self._silence_s = SILENCE_S[0]
        self._again_at = now.boot_s + self._silence_s

    def say(self, message: Outgoing) -> None:
        """Send a message that is not of the log, as soon as the window allows."""
        self._live.append(message)

    def said(self) -> bool:
        """Whether the broker has confirmed everything that was to `say`."""
        return not self._live and not any(isinstance(sent, Outgoing) for sent in self._flying.values())

    def empty(self) -> bool:
        """Whether nothing waits that this broker would take."""
        after = 0
        while page := self._store.unsent(after, _PAGE):
            if not all(message.seq in self._held for message in page):
                return False
            after = page[-1].seq
        return True

    def turn(self, now: Now, *, hurry: bool = False) -> None:
        """Fill the window, take what comes, delete what is acknowledged. Raises LinkDown, StorageError."""
        self._plan_repeats(now)
        self._fill()
        for event in self._link.receive(IDLE_S):
            if isinstance(event, Receipt):
                self._settle(event, now)
            else:
                self._link.acknowledge(event)
                if self._take(event, now):
                    continue
                ack = self._acks.take(event, now)
                self._obey(ack, now)
                self.answered |= ack is not None and not event.retained
        # A broker answers in order: what it has retained comes before it confirms what we said first.
        self._greeted = self._greeted or self.said()
        self._put_aside(now)
        self._acks.apply(now, at_once=hurry)
        self._check_stalled(now)

    def _check_stalled(self, now: Now) -> None:
        """Confirmations come in order (MQTT 5, 4.6), so one that was left out never comes, whatever else does."""
        oldest = next(iter(self._flying), None)
        if oldest is None or oldest != self._oldest:
            self._oldest, self._oldest_s = oldest, now.boot_s
        elif now.boot_s - self._oldest_s > STALLED_S:
            raise LinkDown(f"the broker did not confirm a message for {STALLED_S:.0f} s, {len(self._flying)} wait")

    def _fill(self) -> None:
        while (room := self._link.window - len(self._flying)) > 0:
            if self._live:
                self._send_live(self._live.popleft())
            # The retained acknowledgement comes first; most of what waits may be safe already.
            elif not self._greeted or not self._send(self._next(room)):
                return

    def _send_live(self, message: Outgoing) -> None:
        size = _size(message)
        if size <= self._link.max_packet:
            self._flying[self._link.send(message)] = message
            return
        log.error(
            "%s is not sent: its %d bytes are above the broker's limit of %d; raise the broker's limit",
            message.topic,
            size,
            self._link.max_packet,
        )

    def _next(self, room: int) -> list[Pending]:
        """What to send now: repeats first, then the log in order."""
        while self._again:
            wanted = [self._again.popleft() for _ in range(min(room, len(self._again)))]
            if found := self._store.pending(wanted):
                return found
        page = self._store.unsent(self._sent, min(room, CREDIT - self._out))
        if page:
            self._sent = page[-1].seq
            self._out += len(page)
        return page

    def _send(self, page: Sequence[Pending]) -> bool:
        for message in page:
            if not message.intact:
                self._damaged.append(message.seq)
                continue
            outgoing = self._author.outgoing(message)
            size = _size(outgoing)
            if size > self._link.max_packet:
                self._hold(message, f"its {size} bytes are above the broker's limit of {self._link.max_packet}")
                continue
            self._flying[self._link.send(outgoing)] = message
        return bool(page)

    def _put_aside(self, now: Now) -> None:
        if self._damaged:
            declare_damaged(self._store, self._author, self._damaged, now)
            self._damaged = []

    def _settle(self, receipt: Receipt, now: Now) -> None:
        sent = self._flying.pop(receipt.token, None)
        if sent is None:
            return
        if isinstance(sent, Outgoing):
            if not receipt.taken:
                log.error("the broker refuses %s: %s; check its access list", sent.topic, receipt.reason)
        elif receipt.code == PACKET_TOO_LARGE:
            self._hold(sent, f"the broker says {receipt.reason}")
        elif not receipt.taken:
            raise LinkDown(
                f"the broker refuses messages on {sent.topic}: {receipt.reason}; check its access list and quotas"
            )
        elif receipt.code == NO_SUBSCRIBERS:
            if not self._nobody:
                self._nobody, self._silence_s = True, NOBODY_S
                self._again_at = now.boot_s + self._silence_s
        elif self._by_broker:
            self._acks.confirm(sent.seq)
            self._out = max(0, self._out - 1)

    def _hold(self, message: Pending, why: str) -> None:
        if message.seq in self._held:
            return
        self._held.add(message.seq)
        held = len(self._held)
        # The first, the second, the fourth …: a broker that takes none must not fill the journal.
        if held & (held - 1) == 0:
            log.error(
                "message %d on %s is held back, %d by now, others go on: %s; raise the broker's limit, "
                "or lower [broker] max_message_bytes so that later ones are split",
                message.seq,
                message.topic,
                held,
                why,
            )

    def _obey(self, ack: Ack | None, now: Now) -> None:
        if ack is None:
            return
        self._out = max(0, min(self._sent - ack.through, CREDIT - TRICKLE))
        self._missing, self._asked, self._nobody = ack.missing, bool(ack.missing), False
        self._silence_s = SILENCE_S[0]
        self._again_at = now.boot_s + self._silence_s

    def _plan_repeats(self, now: Now) -> None:
        if self._again:
            # What is under way must arrive and be answered before the next list can be believed.
            self._round_at = now.boot_s + ROUND_S
        elif self._missing and now.boot_s >= self._round_at:
            self._again.extend(self._lacking())
            self._missing = ()
        if not self._asked and self._out <= 0:
            self._again_at = now.boot_s + self._silence_s
        elif now.boot_s >= self._again_at:
            self._repeat()
            self._silence_s = min(2 * self._silence_s, SILENCE_S[1])
            self._again_at = now.boot_s + self._silence_s

    def _lacking(self) -> list[int]:
        """The first `CREDIT` seqs that the collector lacks and that were sent."""
        busy = self._held | {sent.seq for sent in self._flying.values() if isinstance(sent, Pending)}
        wanted: list[int] = []
        for first, last in self._missing:
            room = CREDIT - len(wanted)
            wanted += [seq for seq in range(first, min(last, self._sent, first + room - 1) + 1) if seq not in busy]
        return wanted

    def _repeat(self) -> None:
        if self._by_broker:
            self._sent = self._out = 0
            return
        oldest = [message.seq for message in self._store.unsent(0, _OLDEST)]
        chosen = dict.fromkeys([*oldest, self._sent])
        self._again = deque(seq for seq in chosen if seq <= self._sent and seq not in self._held)


def _size(message: Outgoing) -> int:
    """Bytes of the PUBLISH packet, at most."""
    properties = sum(len(name) + len(value) + 5 for name, value in message.properties)
    return len(message.payload) + len(message.topic) + properties + _OVERHEAD
