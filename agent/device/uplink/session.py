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

from agent.clock import ClockReading
from agent.device.store.eviction import quarantine_damaged
from agent.device.store.message_log import MessageLog
from agent.device.store.outbox import OutboxMessage
from agent.device.store.store import Store
from agent.device.uplink.acknowledgements import Acknowledgements
from agent.errors import LinkDown
from agent.transport.packets import NO_SUBSCRIBERS, PACKET_TOO_LARGE, IncomingMessage, OutgoingMessage, PublishReceipt
from agent.wire.messages import AckPayload

log = logging.getLogger("outstation.uplink")

CREDIT = 1000
# An acknowledgement always lets so many more go, even one that is stuck at an old message.
MIN_CREDIT = 100
RECEIVE_TIMEOUT_S = 0.5
CONFIRM_TIMEOUT_S = 30.0
RESEND_ROUND_S = 2.0
RESEND_BACKOFF_S = (10.0, 120.0)
# Where the broker itself says that nobody is subscribed, there is nothing to wait for.
NO_SUBSCRIBERS_RETRY_S = 2.0
_RESEND_OLDEST = 20
_PAGE = 100
# A PUBLISH beside topic, payload and user properties: fixed header, packet id, content type, lengths.
_PUBLISH_OVERHEAD_BYTES = 48


class Connection(Protocol):
    """What a session uses of a Link."""

    @property
    def window(self) -> int: ...
    @property
    def max_packet(self) -> int: ...

    def send(self, message: OutgoingMessage) -> int: ...
    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]: ...
    def acknowledge(self, delivery: IncomingMessage) -> None: ...
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
        message_log: MessageLog,
        acks: Acknowledgements,
        now: ClockReading,
        *,
        broker_delivery: bool,
        live: Sequence[OutgoingMessage] = (),
        handle_delivery: Callable[[IncomingMessage, ClockReading], bool] = lambda delivery, now: False,
    ) -> None:
        self._link, self._store, self._message_log, self._acks, self._broker_delivery = (
            link,
            store,
            message_log,
            acks,
            broker_delivery,
        )
        self._live_queue, self._handle_delivery = deque(live), handle_delivery
        self._in_flight: dict[int, OutboxMessage | OutgoingMessage] = {}
        self._resend_queue: deque[int] = deque()
        self._held_back: set[int] = set()
        self._damaged: list[int] = []
        self._last_sent_seq = 0
        self._unanswered = 0
        self._missing_ranges: Sequence[tuple[int, int]] = ()
        self._resend_requested = self._is_greeted = self._has_no_subscribers = False
        self._oldest_in_flight: int | None = None
        self._oldest_since_s = now.boot_s
        # Whether the collector answered on this connection; a retained answer is an old one.
        self.has_collector_answered = False
        self._next_round_s = 0.0
        self._resend_backoff_s = RESEND_BACKOFF_S[0]
        self._next_resend_s = now.boot_s + self._resend_backoff_s

    def enqueue_live(self, message: OutgoingMessage) -> None:
        """Send a message that is not of the log, as soon as the window allows."""
        self._live_queue.append(message)

    def is_live_confirmed(self) -> bool:
        """Whether the broker has confirmed everything that was to `say`."""
        return not self._live_queue and not any(isinstance(sent, OutgoingMessage) for sent in self._in_flight.values())

    def is_empty(self) -> bool:
        """Whether nothing waits that this broker would take."""
        after = 0
        while page := self._store.unacknowledged_messages(after, _PAGE):
            if not all(message.seq in self._held_back for message in page):
                return False
            after = page[-1].seq
        return True

    def tick(self, now: ClockReading, *, is_stopping: bool = False) -> None:
        """Fill the window, take what comes, delete what is acknowledged. Raises LinkDown, StorageError."""
        self._plan_resends(now)
        self._fill_window()
        for event in self._link.receive(RECEIVE_TIMEOUT_S):
            if isinstance(event, PublishReceipt):
                self._handle_receipt(event, now)
            else:
                self._link.acknowledge(event)
                if self._handle_delivery(event, now):
                    continue
                ack = self._acks.receive(event, now)
                self._apply_ack(ack, now)
                self.has_collector_answered |= ack is not None and not event.retained
        # A broker answers in order: what it has retained comes before it confirms what we said first.
        self._is_greeted = self._is_greeted or self.is_live_confirmed()
        self._declare_damaged(now)
        self._acks.apply(now, force=is_stopping)
        self._check_stalled(now)

    def _check_stalled(self, now: ClockReading) -> None:
        """Confirmations come in order (MQTT 5, 4.6), so one that was left out never comes, whatever else does."""
        oldest = next(iter(self._in_flight), None)
        if oldest is None or oldest != self._oldest_in_flight:
            self._oldest_in_flight, self._oldest_since_s = oldest, now.boot_s
        elif now.boot_s - self._oldest_since_s > CONFIRM_TIMEOUT_S:
            raise LinkDown(
                f"the broker did not confirm a message for {CONFIRM_TIMEOUT_S:.0f} s, {len(self._in_flight)} wait"
            )

    def _fill_window(self) -> None:
        while (room := self._link.window - len(self._in_flight)) > 0:
            if self._live_queue:
                self._send_live(self._live_queue.popleft())
            # The retained acknowledgement comes first; most of what waits may be safe already.
            elif not self._is_greeted or not self._send(self._next_messages(room)):
                return

    def _send_live(self, message: OutgoingMessage) -> None:
        size = _packet_size(message)
        if size <= self._link.max_packet:
            self._in_flight[self._link.send(message)] = message
            return
        log.error(
            "%s is not sent: its %d bytes are above the broker's limit of %d; raise the broker's limit",
            message.topic,
            size,
            self._link.max_packet,
        )

    def _next_messages(self, limit: int) -> list[OutboxMessage]:
        """What to send now: repeats first, then the log in order."""
        while self._resend_queue:
            wanted = [self._resend_queue.popleft() for _ in range(min(limit, len(self._resend_queue)))]
            if found := self._store.pending_messages(wanted):
                return found
        page = self._store.unacknowledged_messages(self._last_sent_seq, min(limit, CREDIT - self._unanswered))
        if page:
            self._last_sent_seq = page[-1].seq
            self._unanswered += len(page)
        return page

    def _send(self, page: Sequence[OutboxMessage]) -> bool:
        for message in page:
            if not message.intact:
                self._damaged.append(message.seq)
                continue
            outgoing = self._message_log.to_outgoing(message)
            size = _packet_size(outgoing)
            if size > self._link.max_packet:
                self._hold_back(message, f"its {size} bytes are above the broker's limit of {self._link.max_packet}")
                continue
            self._in_flight[self._link.send(outgoing)] = message
        return bool(page)

    def _declare_damaged(self, now: ClockReading) -> None:
        if self._damaged:
            quarantine_damaged(self._store, self._message_log, self._damaged, now)
            self._damaged = []

    def _handle_receipt(self, receipt: PublishReceipt, now: ClockReading) -> None:
        sent = self._in_flight.pop(receipt.token, None)
        if sent is None:
            return
        if isinstance(sent, OutgoingMessage):
            if not receipt.is_accepted:
                log.error("the broker refuses %s: %s; check its access list", sent.topic, receipt.reason)
        elif receipt.code == PACKET_TOO_LARGE:
            self._hold_back(sent, f"the broker says {receipt.reason}")
        elif not receipt.is_accepted:
            raise LinkDown(
                f"the broker refuses messages on {sent.topic}: {receipt.reason}; check its access list and quotas"
            )
        elif receipt.code == NO_SUBSCRIBERS:
            if not self._has_no_subscribers:
                self._has_no_subscribers, self._resend_backoff_s = True, NO_SUBSCRIBERS_RETRY_S
                self._next_resend_s = now.boot_s + self._resend_backoff_s
        elif self._broker_delivery:
            self._acks.confirm(sent.seq)
            self._unanswered = max(0, self._unanswered - 1)

    def _hold_back(self, message: OutboxMessage, reason: str) -> None:
        if message.seq in self._held_back:
            return
        self._held_back.add(message.seq)
        held = len(self._held_back)
        # The first, the second, the fourth …: a broker that takes none must not fill the journal.
        if held & (held - 1) == 0:
            log.error(
                "message %d on %s is held back, %d by now, others go on: %s; raise the broker's limit, "
                "or lower [broker] max_message_bytes so that later ones are split",
                message.seq,
                message.topic,
                held,
                reason,
            )

    def _apply_ack(self, ack: AckPayload | None, now: ClockReading) -> None:
        if ack is None:
            return
        self._unanswered = max(0, min(self._last_sent_seq - ack.through, CREDIT - MIN_CREDIT))
        self._missing_ranges, self._resend_requested, self._has_no_subscribers = ack.missing, bool(ack.missing), False
        self._resend_backoff_s = RESEND_BACKOFF_S[0]
        self._next_resend_s = now.boot_s + self._resend_backoff_s

    def _plan_resends(self, now: ClockReading) -> None:
        if self._resend_queue:
            # What is under way must arrive and be answered before the next list can be believed.
            self._next_round_s = now.boot_s + RESEND_ROUND_S
        elif self._missing_ranges and now.boot_s >= self._next_round_s:
            self._resend_queue.extend(self._find_missing_seqs())
            self._missing_ranges = ()
        if not self._resend_requested and self._unanswered <= 0:
            self._next_resend_s = now.boot_s + self._resend_backoff_s
        elif now.boot_s >= self._next_resend_s:
            self._resend_unacknowledged()
            self._resend_backoff_s = min(2 * self._resend_backoff_s, RESEND_BACKOFF_S[1])
            self._next_resend_s = now.boot_s + self._resend_backoff_s

    def _find_missing_seqs(self) -> list[int]:
        """The first `CREDIT` seqs that the collector lacks and that were sent."""
        busy = self._held_back | {sent.seq for sent in self._in_flight.values() if isinstance(sent, OutboxMessage)}
        wanted: list[int] = []
        for first, last in self._missing_ranges:
            room = CREDIT - len(wanted)
            wanted += [
                seq for seq in range(first, min(last, self._last_sent_seq, first + room - 1) + 1) if seq not in busy
            ]
        return wanted

    def _resend_unacknowledged(self) -> None:
        if self._broker_delivery:
            self._last_sent_seq = self._unanswered = 0
            return
        oldest = [message.seq for message in self._store.unacknowledged_messages(0, _RESEND_OLDEST)]
        chosen = dict.fromkeys([*oldest, self._last_sent_seq])
        self._resend_queue = deque(seq for seq in chosen if seq <= self._last_sent_seq and seq not in self._held_back)


def _packet_size(message: OutgoingMessage) -> int:
    """Bytes of the PUBLISH packet, at most."""
    properties = sum(len(name) + len(value) + 5 for name, value in message.properties)
    return len(message.payload) + len(message.topic) + properties + _PUBLISH_OVERHEAD_BYTES
