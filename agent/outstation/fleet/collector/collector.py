"""Collector loop: receive → verify → store → acknowledge, in batches.

A message is verified before it is parsed, and committed before the broker gets its PUBACK. The device is acknowledged
last. A batch that cannot be stored is neither: the broker or the device still has it, and the collector tries again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from outstation.fleet.collector import encryption_keys
from outstation.fleet.collector.acknowledger import BACKOFF, Acknowledger, CollectorLink, PendingGaps
from outstation.fleet.collector.encryption_keys import EncryptionKeys
from outstation.fleet.collector.leader import LeaderTasks
from outstation.fleet.collector.quota import DeviceQuotas, Quota
from outstation.fleet.collector.statistics import CollectorStatistics
from outstation.fleet.collector.subscriptions import logged_filters, topic_filters
from outstation.fleet.database.ingest import OVER_QUOTA, Arrival, Refusal
from outstation.fleet.database.interface import LogId
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.store import Acknowledgement, FleetStore
from outstation.fleet.incidents.conditions import Certificate
from outstation.foundation import clock
from outstation.foundation.backoff import Retries
from outstation.foundation.errors import (
    LinkDown,
    MessageRefused,
    OutstationError,
    StorageBusy,
    StorageError,
    UsageError,
)
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.capabilities import BrokerUnsuitable
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, PublishReceipt
from outstation.protocol.wire import jws, key_rotation, topics
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.messages import AckPayload, LoggedPayload
from outstation.protocol.wire.verification import VerifiedMessage, verify_message

logger = logging.getLogger(__name__)

# Messages per commit: a commit waits for the disk once, whatever its size.
BATCH_SIZE = 500
# Limit of messages held while the database fails; beyond it, the broker keeps the rest.
MAX_HELD = 5000
SESSION_EXPIRY_S = 7 * 86_400
CLOSE_TIMEOUT_S = 2.0
REFUSAL_LOG_INTERVAL_S = 10.0
UPKEEP_S = 3600.0


class _Held(msgspec.Struct, frozen=True):
    """A delivery that is not stored yet; `admitted` ones are verified, a `refusal` is counted."""

    delivery: IncomingMessage
    admitted: bool
    refusal: Refusal | None = None


def client_id(fleet: str, share: str | None) -> str:
    return f"outstation-{fleet}-collector" + (f"-{share}" if share else "")


def end_session(broker: BrokerConfig, fleet: str, share: str) -> None:
    """End the MQTT session of a collector that is not coming back. Raises LinkDown.

    The broker drops the queued messages of that session; devices send them again, as no collector acknowledges them.
    """
    Link(broker, client_id(fleet, share)).close()


class Collector:
    """One collector of a fleet: `run` it, or call `tick` with an open link."""

    def __init__(
        self,
        fleet: str,
        broker: BrokerConfig,
        store: FleetStore,
        key: SigningKey,
        *,
        open_link: Callable[[], CollectorLink] | None = None,
        upkeep: Callable[[], None] | None = None,
        share: str | None = None,
        group: str = "",
        quota: Quota | None = None,
        encryption_keys: EncryptionKeys | None = None,
        certificates: Callable[[], Iterable[Certificate]] = lambda: (),
    ) -> None:
        """Call `upkeep` each hour, and log the errors that it raises.

        `share`: name among the collectors that share the fleet's messages, each with its own session at the broker;
        None for a single collector. `group`: name of their subscriptions, [fleet] share_group. `quota`: limit for each
        device, of all collectors together; None for no limit. `encryption_keys` open sealed messages. `certificates`:
        those of the fleet, watched for their end. Raises UsageError if the database cannot be shared.
        """
        if share is not None and not store.shared:
            raise UsageError(
                f"{store.name}: SQLite has one writer, so collectors cannot share it; use a PostgreSQL database in "
                'fleet.toml: [fleet] db = "postgresql://USER@HOST/DB"'
            )
        self.fleet, self.store, self.key, self.share = fleet, store, key, share
        self._broker, self._group = broker, group
        self.keyring = Keyring(store)
        self.acknowledger = Acknowledger(fleet, key)
        self._quotas = DeviceQuotas(quota) if quota is not None else None
        self._encryption_keys = encryption_keys
        self.stored_count = 0
        self.statistics = CollectorStatistics()
        self._open_link = open_link or self._connect
        self._held: list[_Held] = []
        self._retry = Retries(BACKOFF)
        self._retry_at = 0.0
        self._unreported_refusals = 0
        self._pending_gaps = PendingGaps()
        self._leader_tasks = LeaderTasks(store, self.keyring, certificates)
        self._next_refusal_log = 0.0
        self._upkeep = upkeep
        self._next_upkeep = 0.0
        self._stopping = False
        self._link: CollectorLink | None = None
        # Enrolled devices of which no message is stored.
        self._missing_devices: set[str] = set()

    @property
    def is_leader(self) -> bool:
        """True if this collector does what one of them does; it is read from other threads, too."""
        return self._leader_tasks.is_leader

    def run(self) -> None:
        """Collect until `stop`: reconnect after every failure; never raise for a message or a full disk.

        Raises UsageError if collectors share the messages and the broker cannot do that.
        """
        retry = Retries(BACKOFF)
        while not self._stopping:
            try:
                self._link = self._open_link()
                name = f" as {self.share}" if self.share else ""
                self.statistics.is_connected = True
                logger.info("connected; collecting fleet %s%s", self.fleet, name)
                self._collect(self._link, retry)
            except (LinkDown, StorageError) as error:
                if isinstance(error, BrokerUnsuitable) and self.share is not None:
                    # Silence would look like a fleet without messages. Collectors that run unshared wait for the
                    # broker, whose configuration may change meanwhile.
                    raise UsageError(str(error)) from None
                delay = retry.next_delay()
                if retry.failures == 1 or retry.failures % 10 == 0:
                    logger.warning("%s; trying again until it works", error)
                end = clock.boot_seconds() + delay
                while not self._stopping and clock.boot_seconds() < end:
                    time.sleep(0.1)

    def stop(self) -> None:
        """End `run` after the current batch; safe in a signal handler."""
        self._stopping = True
        if self._link is not None:
            self._link.wake()

    def tick(self, link: CollectorLink, timeout_s: float) -> None:
        """Receive for `timeout_s`, store the messages, then acknowledge them to the broker and to their devices."""
        self._receive(link, timeout_s)
        self.statistics.set_held(len(self._held), clock.boot_seconds())
        if self._held and clock.boot_seconds() >= self._retry_at:
            self._store_held(link)
        # Gaps that were reported a while ago and are still open are requested.
        if due := self._pending_gaps.due_logs(clock.boot_seconds()):
            try:
                self._acknowledge(due)
            except StorageError as error:
                logger.error("%s; missing messages are requested later", error)
        self.acknowledger.send(link)
        self._leader_tasks.tick(is_caught_up=not self._held)
        if self._quotas is not None:
            self._quotas.collector_count = self._leader_tasks.collector_count
        self._run_upkeep()

    def _collect(self, link: CollectorLink, retry: Retries) -> None:
        try:
            # The broker sends them again.
            for held in self._held:
                if held.admitted:
                    self._refund(_device_of(held.delivery), held.delivery.payload)
            self._held.clear()
            # Acknowledge each device again: a crash or the broker may have lost the last acknowledgement.
            logs = self.store.newest_logs()
            for start in range(0, len(logs), BATCH_SIZE):
                self._acknowledge(logs[start : start + BATCH_SIZE])
            while not self._stopping:
                self.tick(link, 1.0)
                retry.reset()
            deadline = clock.boot_seconds() + CLOSE_TIMEOUT_S
            while self.acknowledger.has_pending and clock.boot_seconds() < deadline:
                self.tick(link, 0.1)
            retries = f", {self.store.retry_count} transactions retried" if self.store.retry_count else ""
            logger.info("stopped; %d messages stored since the start%s", self.stored_count, retries)
        finally:
            self.acknowledger.requeue_in_flight()
            self.statistics.is_connected = False
            self._link = None
            link.close()

    def _acknowledge(self, logs: Sequence[LogId]) -> None:
        for acknowledgement in self._read_acknowledgements(logs):
            self.acknowledger.add(acknowledgement)

    def _read_acknowledgements(self, logs: Sequence[LogId]) -> list[Acknowledgement]:
        if self.share is None:
            return self.store.acknowledgements(logs)
        now_s = clock.boot_seconds()
        return self.store.acknowledgements(logs, lambda *progress: self._pending_gaps.trim(now_s, *progress))

    def _receive(self, link: CollectorLink, timeout_s: float) -> None:
        if self._held:
            timeout_s = min(timeout_s, max(0.0, self._retry_at - clock.boot_seconds()))
        events = link.receive(timeout_s)
        while events:
            for event in events:
                if isinstance(event, PublishReceipt):
                    self.acknowledger.handle_receipt(event)
                else:
                    self._held.append(self._admit(event))
            if len(self._held) >= BATCH_SIZE:
                break
            events = link.receive(0.0)
        if len(self._held) > MAX_HELD:
            raise LinkDown("the database keeps failing: too many messages are held, and the broker keeps the rest")

    def _store_held(self, link: CollectorLink) -> None:
        batch = self._held[:BATCH_SIZE]
        try:
            refusals = [held.refusal for held in batch if held.refusal is not None]
            arrivals, unverified = self._store([held.delivery for held in batch if held.admitted], refusals)
            bodies = [arrival.message.body for arrival in arrivals]
            touched = sorted({(body.device, body.log) for body in bodies if isinstance(body, LoggedPayload)})
            acknowledgements = self._read_acknowledgements(touched)
        except StorageError as error:
            delay = self._retry.next_delay()
            self._retry_at = clock.boot_seconds() + delay
            self.statistics.storage_failures += 1
            logger.error("%s; nothing is acknowledged, trying again in %.0f s", error, delay)
            return
        self._retry.reset()
        del self._held[: len(batch)]
        self.statistics.waiting_since_s = None
        self.statistics.set_held(len(self._held), clock.boot_seconds())
        for held in batch:
            link.acknowledge(held.delivery)
        if not self._broker.tls:
            # With TLS the broker's access rules prove who sent them; otherwise it may be another sender.
            for refusal in unverified:
                self._refund(refusal.device, refusal.payload)
        for acknowledgement in acknowledgements:
            self.acknowledger.add(acknowledgement)

    def _store(
        self, admitted: Sequence[IncomingMessage], refused: Sequence[Refusal] = ()
    ) -> tuple[list[Arrival], list[Refusal]]:
        """Verify and commit a batch; return the stored messages and those that do not verify. Raises StorageError."""
        arrivals, unverified = self.verify(admitted)
        refusals = [*refused, *unverified]
        now = clock.now_rfc3339()
        try:
            outcomes = self.store.ingest(arrivals, refusals, now)
        except MessageRefused:
            # One by one: only the message with an unstorable value is refused.
            candidates, arrivals, outcomes = arrivals, [], []
            for arrival in candidates:
                try:
                    outcomes += self.store.ingest([arrival], [], now)
                    arrivals.append(arrival)
                except MessageRefused as refused:
                    refusals.append(_build_refusal(refused, arrival.message))
            self.store.ingest([], refusals, now)
        self.stored_count += outcomes.count("new")
        self.statistics.outcomes.update(outcomes)
        self.statistics.refusals.update(refusal.reason for refusal in refusals)
        self._report_refusals(refusals)
        self._leader_tasks.record_batch(arrivals, refusals)
        stored = zip(arrivals, outcomes, strict=True)
        for device in sorted({a.message.body.device for a, outcome in stored if outcome == "conflict"}):
            logger.critical("security: %s signed two messages with one seq; see `outstation fleet alerts`", device)
        return arrivals, unverified

    def _admit(self, delivery: IncomingMessage) -> _Held:
        """Open a sealed delivery, and charge it to its device's quota, once: on receipt.

        Refuse it over quota, retained in a log, or if no key opens it; then nobody acknowledges it.
        """
        topic = delivery.topic.split("/", 4)
        kind = topics.KINDS.get(topic[3]) if len(topic) > 3 else None
        if kind is topics.KINDS["ack"]:
            return _Held(delivery, False, self._acknowledge_nothing(delivery))
        if delivery.retained and kind is not None and kind.logged:
            # An empty one deletes a retained message; it is the collector's own.
            if not delivery.payload:
                return _Held(delivery, False)
            self.acknowledger.clear_retained(delivery.topic)
            detail = "a device retains no message of its log; the collector deletes it at the broker"
            return _Held(delivery, False, _build_refusal(MessageRefused("retained", detail), delivery))
        refusal = None
        try:
            delivery = encryption_keys.unseal(delivery, self._encryption_keys)
        except MessageRefused as refused:
            refusal = _build_refusal(refused, delivery)
            if not self._broker.tls:
                return _Held(delivery, False, refusal)
        if self._quotas is None or self._quotas.admit(
            _device_of(delivery), len(delivery.payload), self.keyring.devices, clock.boot_seconds()
        ):
            return _Held(delivery, refusal is None, refusal)
        return _Held(delivery, False, _build_refusal(MessageRefused(OVER_QUOTA), delivery))

    def _acknowledge_nothing(self, delivery: IncomingMessage) -> Refusal | None:
        """Tell a device that none of its log is stored any more, if a retained acknowledgement names one.

        Return the refusal of an acknowledgement that this collector did not sign. A device that writes nothing would
        not learn of it before its next health message.
        """
        device = _device_of(delivery)
        if not delivery.retained or device not in self._missing_devices:
            return None
        own = {self.key.public.kid: jws.Signer("collector", self.key.public)}
        try:
            body = verify_message(delivery.topic, delivery.payload, delivery.tokens, own.get).body
        except MessageRefused as refused:
            return _build_refusal(refused, delivery)
        if isinstance(body, AckPayload) and body.through:
            self._missing_devices.discard(device)
            self.acknowledger.add(Acknowledgement(device, body.log, 0, []))
        return None

    def _refund(self, device: str, payload: bytes) -> None:
        if self._quotas is not None:
            self._quotas.refund(device, len(payload))

    def _report_refusals(self, refusals: Sequence[Refusal]) -> None:
        """Log at most one line per interval; the database counts refusals and keeps samples."""
        self._unreported_refusals += len(refusals)
        if not self._unreported_refusals or clock.boot_seconds() < self._next_refusal_log:
            return
        last = f", last {refusals[-1].reason} on {refusals[-1].topic!r}" if refusals else ""
        logger.warning("refused %d messages%s; see table refusal_samples", self._unreported_refusals, last)
        self._unreported_refusals, self._next_refusal_log = 0, clock.boot_seconds() + REFUSAL_LOG_INTERVAL_S

    def _run_upkeep(self) -> None:
        if self._upkeep is None or clock.boot_seconds() < self._next_upkeep:
            return
        self._next_upkeep = clock.boot_seconds() + UPKEEP_S
        try:
            self._upkeep()
        except OutstationError as error:
            logger.warning("%s", error)

    def verify(self, batch: Sequence[IncomingMessage]) -> tuple[list[Arrival], list[Refusal]]:
        """Return each delivery as a verified message or a refusal."""
        self.keyring.refresh()
        arrivals, refusals = [], []
        for delivery, opened in zip(batch, self._open_batch(batch), strict=True):
            try:
                if isinstance(opened, MessageRefused):
                    raise opened
                # Last, because a rotation in the same batch may bound the key of earlier deliveries.
                self.keyring.require_in_bounds(opened)
                arrivals.append(Arrival(opened, fresh=not delivery.retained))
            except MessageRefused as refused:
                refusals.append(_build_refusal(refused, delivery))
        return arrivals, refusals

    def _open_batch(self, batch: Sequence[IncomingMessage]) -> list[VerifiedMessage | MessageRefused]:
        """Verify each delivery, also with keys that other deliveries of the batch announce."""
        results: list[VerifiedMessage | MessageRefused] = [MessageRefused("unknown key")] * len(batch)
        pending, has_new_key = list(range(len(batch))), True
        while has_new_key:
            has_new_key = False
            for i in pending:
                try:
                    message = results[i] = self._open_delivery(batch[i])
                    if key_rotation.is_rotation_message(message) and not self.store.has_conflicting_message(message):
                        has_new_key |= self.keyring.add_rotation(message)
                except MessageRefused as refused:
                    results[i] = refused
            pending = [i for i in pending if isinstance(r := results[i], MessageRefused) and r.reason == "unknown key"]
            has_new_key &= bool(pending)
        return results

    def _open_delivery(self, delivery: IncomingMessage) -> VerifiedMessage:
        try:
            message = verify_message(delivery.topic, delivery.payload, delivery.tokens, self.keyring.find)
        except MessageRefused as refused:
            if refused.reason != "revoked key":
                raise
            # A repeat of a message stored before the revocation is acknowledged like any duplicate.
            message = verify_message(delivery.topic, delivery.payload, delivery.tokens, self.keyring.find_stored)
            if not self.store.has_message(message):
                raise refused from None
        if message.topic.fleet != self.fleet:
            raise MessageRefused("other fleet", message.topic.fleet)
        return message

    def _connect(self) -> Link:
        """Connect to the broker. Raises LinkDown, and StorageError if another collector runs under this name."""
        if not self.store.acquire_leadership(f"collector {self.share or ''}"):
            which = f"named {self.share}" if self.share else "without --share"
            raise StorageBusy(
                f"{self.store.name}: a collector {which} is already running, and the broker would hand its session to "
                "this one; stop it, or choose another --share NAME"
            )
        group = self._group if self.share is not None else None
        link = Link(
            self._broker,
            client_id(self.fleet, self.share),
            subscribe=topic_filters(self.fleet, group=group),
            retain_as_published=logged_filters(self.fleet, group=group),
            retains=True,
            session_expiry_s=SESSION_EXPIRY_S,
        )
        if group is not None:
            # A device retains nothing there. What it retains all the same is deleted, see `_admit`.
            link.request_retained(logged_filters(self.fleet))
        self._missing_devices = {*self.store.enrolled_devices()}.difference(log[0] for log in self.store.newest_logs())
        if self._missing_devices:
            # The database may have been made anew.
            link.request_retained([f"{topics.ROOT}/{self.fleet}/+/ack"])
        return link


def _device_of(source: IncomingMessage | VerifiedMessage) -> str:
    """Return the device in the topic, or what is in its place."""
    return (*str(source.topic).split("/", 3), "", "", "")[2]


def _build_refusal(refused: MessageRefused, source: IncomingMessage | VerifiedMessage) -> Refusal:
    token = source.jws if isinstance(source, VerifiedMessage) else "\n".join(source.tokens)[:4096]
    return Refusal(_device_of(source), refused.reason, refused.detail[:500], str(source.topic), source.payload, token)
