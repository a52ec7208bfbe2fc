"""Session: the outbox over one open sink. It decides which message is next, and which is sent again.

- Messages in flight never exceed the sink's window, and no message exceeds its largest size.
- A message leaves the outbox when the collector's signed acknowledgement covers it; with delivery = "broker", when the
  sink has accepted it and a subscriber was there.
- Messages that an acknowledgement calls missing are sent again, in rounds. Without an acknowledgement the oldest
  messages and the newest are sent again, with exponential back-off: a collector asks for what is missing before the
  newest.
- At most `CREDIT` messages are unanswered: more would only fill the broker's queue, or go to nobody.
- An urgent message, such as an alert, that would wait behind others goes before them. The collector stores it, and what
  is missing arrives in its turn: the order of the log is in the messages, not in their arrival.
- On a metered connection the meter says how many bytes may be sent. Urgent messages go while bulk must wait.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence

from outstation.device.capacity.eviction import quarantine_damaged
from outstation.device.store.message_log import RECENT_URGENT, MessageLog
from outstation.device.store.outbox import OutboxMessage
from outstation.device.store.store import Store
from outstation.device.uplink.acknowledgements import Acknowledgements
from outstation.device.uplink.meter import TrafficMeter, estimate_bytes
from outstation.device.uplink.oversize import OversizeAlert
from outstation.device.uplink.sink import Receipt, Sink
from outstation.foundation.backoff import Backoff
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.capabilities import MAX_PACKET
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire.messages import AckPayload

log = logging.getLogger("outstation.uplink")

CREDIT = 1000
# An acknowledgement always allows this many more, even one that stays at an old message.
MIN_CREDIT = 100
RECEIVE_TIMEOUT_S = 0.5
CONFIRM_TIMEOUT_S = 30.0
RESEND_ROUND_S = 2.0
RESEND_BACKOFF_S = (10.0, 120.0)
# Soon: the broker itself reports that nobody is subscribed.
NO_SUBSCRIBERS_RETRY_S = 2.0
_RESEND_OLDEST = 20
_PAGE = 100
# A metered connection pays for messages to a collector that does not answer.
_METERED_RESEND_OLDEST, _METERED_RESEND_BACKOFF_S = 1, 3600.0
# Urgent messages that are before the others at a time; later ones wait their turn.
MAX_EARLY = 1000
# Until larger messages are tried again. Each trial that fails costs a connection, and doubles the wait.
SHORTEST_S, LONGEST_S = 60.0, 86_400.0


class Session:
    """Sends messages from opening a sink until it is lost or closed. Live messages go before those of the outbox.

    A delivery that `handle_delivery` does not take is an acknowledgement.
    """

    def __init__(
        self,
        sink: Sink,
        store: Store,
        message_log: MessageLog,
        acks: Acknowledgements,
        now: ClockReading,
        *,
        oversize: OversizeAlert,
        sent_early: set[int],
        learned_limit: LearnedLimit,
        broker_delivery: bool,
        meter: TrafficMeter | None = None,
        live: Sequence[OutgoingMessage] = (),
        handle_delivery: Callable[[IncomingMessage, ClockReading], bool] = lambda delivery, now: False,
    ) -> None:
        """Send from the oldest waiting message on.

        `sent_early`: urgent messages that went before messages of lower seqs, also in earlier sessions.
        `learned_limit`: of earlier connections that ended because of a large message.
        """
        self._sink, self._store, self._message_log = sink, store, message_log
        self._oversize, self._learned_limit = oversize, learned_limit
        self._acks, self._broker_delivery, self._meter = acks, broker_delivery, meter
        self._now, self._may_send_bulk = now, True
        self._live_queue, self._handle_delivery = deque(live), handle_delivery
        self._in_flight: dict[int, OutboxMessage | OutgoingMessage] = {}
        self._resend_queue: deque[int] = deque()
        self._held_back: set[int] = set()
        self._damaged: list[int] = []
        self._last_sent_seq = 0
        self._sent_early, self._known_urgent = sent_early, ""
        self._unanswered = 0
        self._missing_ranges: Sequence[tuple[int, int]] = ()
        self._resend_requested = self._is_greeted = self._has_no_subscribers = False
        self._oldest_in_flight: int | None = None
        self._oldest_since_s = now.boot_s
        # By an answer of this session: a retained one may be old.
        self.has_collector_answered = False
        self._next_round_s = 0.0
        self._resend_oldest, self._resend_backoff = _RESEND_OLDEST, Backoff(*RESEND_BACKOFF_S)
        if meter is not None:
            self._resend_oldest = _METERED_RESEND_OLDEST
            self._resend_backoff = Backoff(RESEND_BACKOFF_S[0], _METERED_RESEND_BACKOFF_S)
        self._resend_backoff_s = self._resend_backoff.first_s
        self._next_resend_s = now.boot_s + self._resend_backoff_s

    def enqueue_live(self, message: OutgoingMessage) -> None:
        """Send a message outside the log as soon as the window allows."""
        self._live_queue.append(message)

    def is_live_confirmed(self) -> bool:
        """Return True if the sink has accepted or refused all live messages."""
        return not self._live_queue and not any(isinstance(sent, OutgoingMessage) for sent in self._in_flight.values())

    def is_empty(self) -> bool:
        """Return True if the outbox has no message left that this sink would take."""
        after = 0
        while page := self._store.unacknowledged_messages(after, _PAGE):
            if not all(message.seq in self._held_back for message in page):
                return False
            after = page[-1].seq
        return True

    def largest_in_flight(self) -> int:
        """Return the size of the largest message that the sink has not answered; 0 if there is none."""
        sent = [m for m in self._in_flight.values() if isinstance(m, OutboxMessage)]
        return max((self._sink.measure(self._message_log.to_outgoing(m)) for m in sent), default=0)

    def tick(self, now: ClockReading, *, is_stopping: bool = False) -> None:
        """Fill the window, handle what comes in, delete what is acknowledged. Raises LinkDown, StorageError."""
        self._now = now
        if self._learned_limit.lift(now.boot_s):
            self._resend_queue.extend(sorted(self._held_back))
            self._held_back.clear()
        self._plan_resends(now)
        self._fill_window()
        for event in self._sink.receive(RECEIVE_TIMEOUT_S):
            if isinstance(event, Receipt):
                self._handle_receipt(event, now)
            else:
                self._sink.acknowledge(event)
                if self._handle_delivery(event, now):
                    continue
                ack = self._acks.receive(event, now)
                self._apply_ack(ack, now)
                self.has_collector_answered |= ack is not None and not event.retained
        if self._meter is not None:
            self._meter.observe(self._sink.traffic_bytes, now)
        # A broker answers in order: retained messages come before its receipts for our first messages.
        self._is_greeted = self._is_greeted or self.is_live_confirmed()
        if self._damaged:
            quarantine_damaged(self._store, self._message_log, self._damaged, now)
            self._damaged = []
        self._oversize.tick(now)
        self._acks.apply(now, force=is_stopping)
        self._acks.settle_doubt(now)
        # Receipts come in order (MQTT 5, 4.6), so the oldest one never comes if it is overdue.
        oldest = next(iter(self._in_flight), None)
        if oldest is None or oldest != self._oldest_in_flight:
            self._oldest_in_flight, self._oldest_since_s = oldest, now.boot_s
        elif now.boot_s - self._oldest_since_s > CONFIRM_TIMEOUT_S:
            raise LinkDown(
                f"the broker did not confirm a message for {CONFIRM_TIMEOUT_S:.0f} s, {len(self._in_flight)} wait"
            )

    def _fill_window(self) -> None:
        while (room := self._sink.window - len(self._in_flight)) > 0:
            if self._live_queue:
                message = self._live_queue.popleft()
                size, limit = self._sink.measure(message), self._sink.max_bytes
                if size <= limit:
                    if self._meter is not None:
                        self._meter.add_message(size, self._now)
                    self._in_flight[self._sink.send(message)] = message
                else:
                    log.error(
                        "%s is not sent: its %d bytes are above the broker's limit of %d; raise the broker's limit",
                        *(message.topic, size, limit),
                    )
            # The retained acknowledgement comes first: most of the outbox may be acknowledged already.
            elif not self._is_greeted or not self._send(self._next_messages(room)):
                return

    def _next_messages(self, limit: int) -> list[OutboxMessage]:
        """Return the messages to send now: urgent ones first, then resends, then the log in order."""
        self._may_send_bulk, could = self._room(urgent=False) > 0, self._may_send_bulk
        if could and not self._may_send_bulk:
            # Urgent messages that were next in the log would wait from now on.
            self._known_urgent = ""
        if urgent := self._take_urgent(limit):
            return urgent
        if resends := self._take_resends(limit):
            return resends
        while self._may_send_bulk and (
            page := self._store.unacknowledged_messages(self._last_sent_seq, min(limit, CREDIT - self._unanswered))
        ):
            if not (page := self._affordable(page, urgent=False)):
                self._may_send_bulk, self._known_urgent = False, ""
                return self._take_urgent(limit)
            self._last_sent_seq = page[-1].seq
            self._unanswered += len(page)
            if unsent := [message for message in page if message.seq not in self._sent_early]:
                return unsent
        return []

    def _take_urgent(self, limit: int) -> list[OutboxMessage]:
        """Return new urgent messages that would wait: they are not among the next messages."""
        text = self._store.get_meta(RECENT_URGENT, "")
        if text == self._known_urgent or len(self._sent_early) >= MAX_EARLY:
            return []
        last_of_page = self._last_sent_seq
        if self._may_send_bulk:
            last_of_page += min(limit, CREDIT - self._unanswered)
        waiting = [seq for seq in json.loads(text) if seq > last_of_page and seq not in self._sent_early]
        pending = self._store.pending_messages(waiting[:limit])
        urgent = self._affordable(pending, urgent=True)
        if len(waiting) <= limit and len(urgent) == len(pending):
            self._known_urgent = text
        self._sent_early.update(message.seq for message in urgent)
        return urgent

    def _take_resends(self, limit: int) -> list[OutboxMessage]:
        """Take messages from the queue of resends; while bulk must wait, urgent ones only."""
        while self._resend_queue:
            ready = [seq for seq in self._resend_queue if self._may_send_bulk or seq in self._sent_early][:limit]
            pending = self._store.pending_messages(ready)
            chosen = self._affordable(pending, urgent=not self._may_send_bulk)
            # Of those that are not affordable yet; others are acknowledged or gone.
            later = {message.seq for message in pending[len(chosen) :]}
            taken = {seq for seq in ready if seq not in later}
            self._resend_queue = deque(seq for seq in self._resend_queue if seq not in taken)
            if chosen or not taken:
                return chosen
        return []

    def _room(self, *, urgent: bool) -> float:
        return float("inf") if self._meter is None else self._meter.room(self._now, urgent=urgent)

    def _affordable(self, page: list[OutboxMessage], *, urgent: bool) -> list[OutboxMessage]:
        """Return the first messages of a page, as many as the meter has room for."""
        if self._meter is None:
            return page
        room, count = self._room(urgent=urgent), 0
        for message in page:
            room -= estimate_bytes(self._sink.measure(self._message_log.to_outgoing(message))) if message.intact else 0
            if room < 0:
                break
            count += 1
        return page[:count]

    def _send(self, page: Sequence[OutboxMessage]) -> bool:
        for message in page:
            if not message.intact:
                self._damaged.append(message.seq)
                continue
            outgoing = self._message_log.to_outgoing(message)
            size, limit = self._sink.measure(outgoing), min(self._sink.max_bytes, self._learned_limit.bytes)
            if size > limit:
                self._oversize.add(message.seq, size, limit)
                self._hold_back(message, f"its {size} bytes are above the broker's limit of {limit}")
                continue
            if self._meter is not None:
                self._meter.add_message(size, self._now)
            self._in_flight[self._sink.send(outgoing)] = message
        return bool(page)

    def _handle_receipt(self, receipt: Receipt, now: ClockReading) -> None:
        sent = self._in_flight.pop(receipt.token, None)
        if sent is None:
            return
        if isinstance(sent, OutgoingMessage):
            if receipt.outcome in ("refused", "too large"):
                log.error("the broker refuses %s: %s; check its access list", sent.topic, receipt.reason)
        elif receipt.outcome == "too large":
            self._oversize.add(sent.seq, self._sink.measure(self._message_log.to_outgoing(sent)), 0)
            self._hold_back(sent, f"the broker says {receipt.reason}")
        elif receipt.outcome == "refused":
            raise LinkDown(
                f"the broker refuses messages on {sent.topic}: {receipt.reason}; check its access list and quotas"
            )
        elif receipt.outcome == "no subscribers":
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
        count = len(self._held_back)
        # Logged for the first, second, fourth …: a broker that takes none must not fill the journal.
        if count & (count - 1) == 0:
            log.error(
                "message %d on %s is held back, %d by now, others go on: %s; raise the broker's limit, "
                "or lower [broker] max_message_bytes so that later ones are split",
                *(message.seq, message.topic, count, reason),
            )

    def _apply_ack(self, ack: AckPayload | None, now: ClockReading) -> None:
        if ack is None:
            return
        through, missing = _without_early(ack, self._sent_early)
        self._sent_early -= {seq for seq in self._sent_early if seq <= through}
        self._unanswered = max(0, min(self._last_sent_seq - through, CREDIT - MIN_CREDIT))
        self._missing_ranges, self._resend_requested, self._has_no_subscribers = missing, bool(missing), False
        self._resend_backoff_s = RESEND_BACKOFF_S[0]
        self._next_resend_s = now.boot_s + self._resend_backoff_s

    def _plan_resends(self, now: ClockReading) -> None:
        if self._resend_queue:
            # Messages in flight must arrive and be answered before the next list of missing ones is true.
            self._next_round_s = now.boot_s + RESEND_ROUND_S
        elif self._missing_ranges and now.boot_s >= self._next_round_s:
            busy = self._held_back | {sent.seq for sent in self._in_flight.values() if isinstance(sent, OutboxMessage)}
            missing: list[int] = []
            for first, last in self._missing_ranges:
                end = min(last, self._last_sent_seq, first + CREDIT - len(missing) - 1)
                missing += [seq for seq in range(first, end + 1) if seq not in busy]
            self._resend_queue.extend(missing)
            self._missing_ranges = ()
        if not self._resend_requested and self._unanswered <= 0:
            self._next_resend_s = now.boot_s + self._resend_backoff_s
        elif now.boot_s >= self._next_resend_s:
            if self._broker_delivery:
                self._last_sent_seq = self._unanswered = 0
                self._sent_early.clear()
            else:
                oldest = [message.seq for message in self._store.unacknowledged_messages(0, self._resend_oldest)]
                sent = [seq for seq in (*oldest, self._last_sent_seq) if seq <= self._last_sent_seq]
                seqs = dict.fromkeys([*self._sent_early, *sent])
                self._resend_queue = deque(seq for seq in seqs if seq not in self._held_back)
            self._resend_backoff_s = self._resend_backoff.double_s(self._resend_backoff_s)
            self._next_resend_s = now.boot_s + self._resend_backoff_s


def _without_early(ack: AckPayload, early: Collection[int]) -> tuple[int, list[tuple[int, int]]]:
    """Return (through, missing) of an acknowledgement as if what went before others had not arrived yet.

    What lies between the others and such a message was not lost: it is still to be sent, or under way.
    """
    through, missing = ack.through, list(ack.missing)
    while through in early:
        through -= 1
        if missing and missing[-1][1] == through:
            through = missing.pop()[0] - 1
    return through, missing


def find_sent_early(store: Store) -> set[int]:
    """Return the acknowledged urgent messages that went before messages which still wait."""
    acknowledged = store.acknowledged()
    if not acknowledged.missing:
        return set()
    first_waiting = acknowledged.missing[0][0]
    recent: list[int] = json.loads(store.get_meta(RECENT_URGENT, "[]"))
    return {seq for seq in recent if seq > first_waiting and seq in acknowledged}


class LearnedLimit:
    """Limit in `bytes` of a broker that announces none, learned from lost connections.

    It is lifted for a trial, as the broker's may have been raised.

    Used by the uplink's thread only.
    """

    def __init__(self) -> None:
        self.bytes = MAX_PACKET
        self._wait_s, self._trial_s = SHORTEST_S, float("-inf")

    def lower(self, largest: int, now_s: float) -> None:
        """Note that the broker ended a connection with a message of `largest` bytes under way."""
        if self.bytes == MAX_PACKET:
            is_new = now_s - self._trial_s > self._wait_s
            self._wait_s = SHORTEST_S if is_new else Backoff(SHORTEST_S, LONGEST_S).double_s(self._wait_s)
            self._trial_s = now_s + self._wait_s
        self.bytes = min(self.bytes, largest) - 1

    def lift(self, now_s: float) -> bool:
        """Lift the limit if a trial is due; return True if it was lifted."""
        if self.bytes == MAX_PACKET or now_s < self._trial_s:
            return False
        self.bytes = MAX_PACKET
        return True
