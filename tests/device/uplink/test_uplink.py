"""Uplink over a broker in memory that loses, delays, duplicates, reorders and disconnects, from a seed."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from outstation.device import config
from outstation.device.config.config import Config
from outstation.device.recovery.findings import NEW_LOG
from outstation.device.recovery.open import open_store
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.device.uplink import session, uplink
from outstation.device.uplink.mqtt_sink import MqttSink, packet_size
from outstation.device.uplink.session import LONGEST_S, LearnedLimit
from outstation.device.uplink.uplink import Uplink, backoff
from outstation.fleet.audit.audit import audit
from outstation.fleet.collector.collector import Collector
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import LinkDown, PacketTooLarge, StorageForked, StorageFull
from outstation.protocol.transport import mqtt
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.capabilities import MAX_PACKET
from outstation.protocol.transport.packets import GZIP, IncomingMessage, OutgoingMessage, PublishReceipt
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import Signer, encode
from outstation.protocol.wire.keys import SigningKey, b64url_encode
from outstation.protocol.wire.messages import AckPayload, LoggedPayload, StatePayload
from outstation.protocol.wire.topics import topic_matches
from outstation.protocol.wire.verification import verify_message
from outstation.workbench.testing.messages import new_key
from outstation.workbench.testing.simulation.lossy_link import LinkConditions, LossyBroker, LossyLink

FLEET, DEVICE = "acme", "pi-07"
REFUSED = "acknowledgements refused"
ACK_TOPIC = f"outstation/{FLEET}/{DEVICE}/ack"
TIME = "2026-11-24T22:18:01.000000Z"
CALM = LinkConditions()
STORM = LinkConditions(loss=0.1, duplication=0.1, delay_s=2.0, partial_receive=0.5, disconnect=0.01)


def is_empty(world: World) -> bool:
    return not world.waiting()


def signed(key: SigningKey, topic: str, body: dict[str, Any]) -> tuple[bytes, str]:
    payload = encode(body)
    return payload, jws.sign(key, topic, payload)


def unexpected(error: Exception) -> None:
    raise error


def ack_body(log: str, through: int, missing: list[tuple[int, int]], device: str = DEVICE) -> dict[str, Any]:
    head = {"v": 1, "kind": "ack", "device": device, "log": log}
    return {**head, "through": through, "missing": missing, "time": TIME}


@dataclass
class CollectorModel:
    """Minimal collector: stores by (log, seq), and answers each group of messages with one acknowledgement."""

    air: LossyBroker
    key: SigningKey
    device_key: SigningKey
    stored: dict[tuple[str, int], bytes] = field(default_factory=dict)
    arrivals: Counter[int] = field(default_factory=Counter)
    deaf_to: set[int] = field(default_factory=set)
    away: bool = False
    link: LossyLink | None = None

    def turn(self) -> None:
        if self.away:
            return
        try:
            if self.link is None:
                filters = [f"outstation/{FLEET}/+/{kind}" for kind in ("audit", "health", "alerts/+", "results/+")]
                self.link = self.air.connect(None, "collector", subscribe=filters, session_expiry_s=3600)
            self._take(self.link)
        except LinkDown:
            self.link = None

    def leave(self) -> None:
        self.away = True
        if self.link is not None:
            self.link.close()
        self.link = None

    def come(self) -> None:
        self.away = False

    def seqs(self) -> set[int]:
        return {seq for _, seq in self.stored}

    def answer(self, log: str) -> None:
        seqs = sorted(seq for entry, seq in self.stored if entry == log)
        gaps = [(a + 1, b - 1) for a, b in zip([0, *seqs], seqs, strict=False) if b > a + 1]
        through = seqs[-1] if seqs else 0
        if len(gaps) > 100:
            through, gaps = gaps[100][0] - 1, gaps[:100]
        payload, token = signed(self.key, ACK_TOPIC, ack_body(log, through, gaps))
        if self.link is not None:
            self.link.send(OutgoingMessage(ACK_TOPIC, payload, (("jws", token),), retain=True))

    def _take(self, link: LossyLink) -> None:
        logs = set()
        for event in link.receive(0.0):
            if isinstance(event, PublishReceipt):
                continue
            signer = jws.Signer(DEVICE, self.device_key.public)
            body = verify_message(event.topic, event.payload, event.tokens, {signer.key.kid: signer}.get).body
            assert isinstance(body, LoggedPayload)
            self.arrivals[body.seq] += 1
            if body.seq in self.deaf_to:
                self.deaf_to.discard(body.seq)
            else:
                known = self.stored.setdefault((body.log, body.seq), event.payload)
                assert known == event.payload
            link.acknowledge(event)
            logs.add(body.log)
        for log in sorted(logs):
            self.answer(log)


class World:
    """Store and uplink of a device, a lossy broker and a collector; `run` ends with `done` or after `seconds`."""

    def __init__(
        self,
        folder: Path,
        weather: LinkConditions = CALM,
        *,
        seed: int = 0,
        window: int = 20,
        max_packet: int = 1 << 20,
        delivery: Any = "collector",
    ) -> None:
        random.seed(seed)
        self.air = LossyBroker(seed, weather, window=window, max_packet=max_packet)
        self.key, self.collector_key = new_key(1), new_key(2)
        self.store = open_store(folder / "data")
        self.author = MessageLog(FLEET, DEVICE, self.key, self.store.log_id, self.store.boot, 120_000)
        self.collector = CollectorModel(self.air, self.collector_key, self.key)
        self.air.tick_callbacks.append(self.collector.turn)
        self.conf = Config(
            device=config.DeviceConfig(id=DEVICE, fleet=FLEET),
            collector=config.CollectorConfig(key=self.collector_key.public.text, delivery=delivery),
        )
        self.pauses: list[float] = []
        self.done: list[object] = []
        self.changes, self.outbox = -1, set[int]()
        self.uplink = self.new_uplink()

    def new_uplink(self) -> Uplink:
        return Uplink(
            self.conf,
            self.store,
            self.author,
            {self.collector_key.public.kid: Signer("collector", self.collector_key.public)}.get,
            self.air.now,
            unexpected,
            lambda topics, will: MqttSink(self.air.connect(None, DEVICE, subscribe=topics, will=will)),
            pause=self._pause,
        )

    def write(self, n: int, size: int = 0) -> None:
        for start in range(0, n, 500):
            with self.store.transaction() as tx:
                for _ in range(min(500, n - start)):
                    self.author.append(tx, "health", None, {"pad": "x" * size}, self.air.now())

    def raise_alert(self) -> int:
        """Append a critical alert and return its seq."""
        body = {"alert": "fault", "subject": "ax", "state": "raised", "severity": "critical", "summary": "x", "id": "i"}
        with self.store.transaction() as tx:
            return self.author.append(tx, "alerts", None, body, self.air.now())

    def waiting(self) -> set[int]:
        """Return the seqs in the outbox that are not acknowledged."""
        acknowledged = self.store.acknowledged()
        return self.outbox_seqs() - {seq for first, last in acknowledged.ranges for seq in range(first, last + 1)}

    def outbox_seqs(self) -> set[int]:
        # Tests ask for them at every tick, and most ticks change nothing.
        if self.changes != (changes := self.store._db.total_changes):
            self.outbox = {int(row[0]) for row in self.store._fetch_all("SELECT seq FROM outbox")}
            self.changes = changes
        return self.outbox

    def run(self, done: Callable[[], bool], seconds: float, *, drain_s: float = 2.0) -> None:
        """Virtual `seconds` at most; the uplink is stopped then. Whether it was `done` is the caller's to check."""
        end = self.air.clock_s + seconds
        self.collector.turn()

        def watch() -> None:
            if not self.uplink._stopping.is_set() and (done() or self.air.clock_s >= end):
                self.uplink.request_stop(drain_s)

        self.air.tick_callbacks.append(watch)
        try:
            self.uplink.run()
        finally:
            self.air.tick_callbacks.remove(watch)

    def deliver(self, payload: bytes, *tokens: str, topic: str = ACK_TOPIC) -> None:
        """An acknowledgement out of nowhere."""
        self.air.inject(DEVICE, IncomingMessage(topic, payload, tokens, False, 9, 1))

    def health_published(self) -> int:
        return sum(message.topic.endswith("/health") for message in self.air.published)

    def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.air.advance(seconds)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def build(*args: Any, **kwargs: Any) -> World:
        made.append(World(tmp_path / str(len(made)), *args, **kwargs))
        return made[-1]

    yield build
    for world in made:
        world.store.close()


@pytest.fixture
def world(make: Callable[..., World]) -> World:
    return make()


@pytest.mark.parametrize("seed", range(4))
def test_messages_leave_the_outbox_only_when_the_collector_has_them(make: Callable[..., World], seed: int) -> None:
    world = make(STORM, seed=seed, window=[1, 2, 20, 100][seed])
    written = 0

    def write_and_look() -> None:
        nonlocal written
        if written < 240 and world.air.rng.random() < 0.2:
            world.write(20)
            written += 20
        missing = set(range(1, written + 1)) - world.waiting()
        assert missing <= world.collector.seqs(), "left the outbox before the collector had it"

    world.air.tick_callbacks.append(write_and_look)
    world.run(lambda: written == 240 and not world.waiting(), 3000)
    assert world.waiting() == set()
    # Acknowledgements that come again may have been doubted.
    last = int(world.store.get_meta("seq", "0"))
    assert sorted(world.collector.stored) == [(world.store.log_id, seq) for seq in range(1, last + 1)]
    assert last - 240 <= world.air.clock_s / 60
    assert world.air.max_in_flight[DEVICE] <= world.air.window


def test_the_same_seed_gives_the_same_run(make: Callable[..., World]) -> None:
    runs = []
    for _ in range(2):
        world = make(STORM, seed=5)
        world.author = MessageLog(FLEET, DEVICE, world.key, "7e57ab1e-0000-4000-8000-000000000000", 1, 120_000)
        world.write(50)
        world.run(lambda: False, 60)
        runs.append([(message.topic, message.payload) for message in world.air.published])
    assert runs[0] == runs[1]
    assert len(runs[0]) > 50


@pytest.mark.parametrize(("seed", "compress"), [(0, False), (1, False), (2, True)])
def test_the_real_collector_has_every_message_once_and_its_audit_passes(
    make: Callable[..., World], seed: int, compress: bool
) -> None:
    world = make(STORM, seed=seed)
    world.author.compress = compress
    world.air.tick_callbacks.clear()
    fleet = FleetStore(world.store.path.with_name("fleet.db"))
    fleet.enrol(DEVICE, world.key.public, replace=False, now=TIME)

    def connect() -> LossyLink:
        filters = [f"outstation/{FLEET}/+/{kind}" for kind in ("health", "alerts/+")]
        return world.air.connect(None, "collector", subscribe=filters, session_expiry_s=60)

    collector = Collector(FLEET, BrokerConfig(), fleet, world.collector_key, open_link=connect)
    link: LossyLink | None = None

    def turn() -> None:
        nonlocal link
        try:
            link = link or connect()
            collector.tick(link, 0.0)
        except LinkDown:
            collector.acknowledger.requeue_in_flight()
            link = None

    world.air.tick_callbacks.append(turn)
    world.write(150)
    # It goes before the others, so that the collector has a gap for a while.
    world.raise_alert()
    world.run(lambda: not world.waiting(), 1000)
    report = audit(fleet)
    assert (report.passed, report.messages, report.gaps) == (True, 151, [])
    assert any(message.content_type == GZIP for message in world.air.published) == compress
    assert world.waiting() == set()
    fleet.close()


def test_a_broker_that_dies_and_forgets_everything_costs_nothing(world: World) -> None:
    world.write(500)
    deaths = iter((0.3, 1.0, 4.0))
    next_death = world.air.clock_s + next(deaths)

    def die() -> None:
        nonlocal next_death
        if world.air.clock_s >= next_death:
            world.air.restart()
            next_death = world.air.clock_s + next(deaths, 1e9)

    world.air.tick_callbacks.append(die)
    world.run(lambda: not world.waiting() and next_death > 1e8, 600)
    assert world.waiting() == set()
    assert world.collector.seqs() == set(range(1, 501))


def test_without_a_collector_nothing_leaves_and_nobody_is_flooded(world: World) -> None:
    world.collector.leave()
    world.write(5000)
    world.run(lambda: False, 3600)
    assert len(world.waiting()) == 5000
    # All the credit, then the oldest twenty and the newest, ever more rarely.
    assert session.CREDIT <= world.health_published() <= session.CREDIT + 40 * 21


def test_a_collector_that_comes_back_is_noticed_and_served(world: World) -> None:
    world.collector.leave()
    world.write(1000)
    world.air.tick_callbacks.append(partial(once, world, 1500, world.collector.come))
    world.run(lambda: world.air.clock_s > 1500 and not world.waiting(), 3600)
    assert world.waiting() == set()
    assert world.air.clock_s < 1500 + 150


def test_what_the_collector_misses_is_sent_again_and_only_that(world: World) -> None:
    world.collector.deaf_to = {3, 4, 5, 17, 40}
    world.write(60)
    world.run(lambda: not world.waiting(), 60)
    assert world.collector.seqs() == set(range(1, 61))
    again = {seq for seq, times in world.collector.arrivals.items() if times > 1}
    assert again == {3, 4, 5, 17, 40}


def test_a_last_message_that_the_broker_lost_is_sent_again_after_a_while(world: World) -> None:
    world.collector.deaf_to = {3}
    world.write(3)
    began = world.air.clock_s
    world.run(lambda: not world.waiting(), 600)
    assert world.waiting() == set()
    assert 5 < world.air.clock_s - began < 60


def test_a_message_is_not_resent_while_its_acknowledgement_is_in_flight(world: World) -> None:
    world.write(1)
    later = iter(range(20))

    def write() -> None:
        if world.air.clock_s > 1000 + 30 * len(world.collector.stored) and next(later, None) is not None:
            world.write(1)

    world.air.tick_callbacks.append(write)
    world.run(lambda: len(world.collector.stored) == 10, 600)
    assert set(world.collector.arrivals.values()) == {1}


def test_an_acknowledgement_stuck_at_an_old_message_does_not_stop_new_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = CollectorModel.answer

    def stuck(collector: CollectorModel, log: str) -> None:
        everything, collector.stored = collector.stored, {(log, 1): b""}
        answer(collector, log)
        collector.stored = everything

    monkeypatch.setattr(CollectorModel, "answer", stuck)
    world.write(3000)
    world.run(lambda: len(world.collector.stored) == 3000, 300)
    assert world.collector.seqs() == set(range(1, 3001))
    assert len(world.waiting()) == 2999


def test_resends_in_flight_are_not_requested_again(make: Callable[..., World]) -> None:
    world = make(LinkConditions(delay_s=1.5))
    world.write(200)
    world.run(lambda: not world.waiting(), 100)
    assert world.collector.arrivals.total() < 1.4 * 200


def test_what_was_acknowledged_while_the_device_was_away_is_not_sent_again(world: World) -> None:
    world.collector.leave()
    world.write(50)
    payload, token = signed(world.collector_key, ACK_TOPIC, ack_body(world.store.log_id, 49, []))
    world.air.publish(OutgoingMessage(ACK_TOPIC, payload, (("jws", token),), retain=True))
    world.run(lambda: False, 5)
    assert world.waiting() == {50}
    sent = [json.loads(message.payload) for message in world.air.published if message.topic.endswith("/health")]
    assert {body["seq"] for body in sent} == {50}


def test_a_hundred_acknowledgements_a_second_cost_few_transactions(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make(LinkConditions(delay_s=0.3), window=5)
    world.write(400)
    commits = Counter[str]()
    transaction = Store.transaction

    @contextlib.contextmanager
    def counted(store: Store, **_: bool) -> Iterator[Transaction]:
        commits["all"] += 1
        with transaction(store) as tx:
            yield tx

    monkeypatch.setattr(Store, "transaction", counted)
    acks = Counter[str]()
    world.air.reason_code = lambda message: acks.update([message.topic.rsplit("/", 1)[-1]]) or 0
    began = world.air.clock_s
    world.run(lambda: not world.waiting(), 60)
    assert acks["ack"] >= 50
    assert commits["all"] <= 3 + (world.air.clock_s - began)


def unsigned(world: World) -> None:
    world.deliver(encode(ack_body(world.store.log_id, 5, [])))


def forged(world: World) -> None:
    world.deliver(*signed(new_key(99), ACK_TOPIC, ack_body(world.store.log_id, 5, [])))


def signed_by_the_device(world: World) -> None:
    world.deliver(*signed(world.key, ACK_TOPIC, ack_body(world.store.log_id, 5, [])))


def altered(world: World) -> None:
    payload, token = signed(world.collector_key, ACK_TOPIC, ack_body(world.store.log_id, 1, []))
    world.deliver(payload.replace(b'"through":1', b'"through":5'), token)


def claims_the_right_key(world: World) -> None:
    payload = encode(ack_body(world.store.log_id, 5, []))
    head = jws.sign(world.collector_key, ACK_TOPIC, b"other bytes").split("..")[0]
    world.deliver(payload, f"{head}..{b64url_encode(new_key(99).sign(head.encode() + b'.' + payload))}")


def of_another_device(world: World) -> None:
    topic = f"outstation/{FLEET}/pi-08/ack"
    world.deliver(*signed(world.collector_key, topic, ack_body(world.store.log_id, 5, [], "pi-08")))


def of_another_device_on_its_own_topic(world: World) -> None:
    topic = f"outstation/{FLEET}/pi-08/ack"
    world.deliver(*signed(world.collector_key, topic, ack_body(world.store.log_id, 5, [], "pi-08")), topic=topic)


def of_another_log(world: World) -> None:
    world.deliver(
        *signed(world.collector_key, ACK_TOPIC, ack_body("7e57ab1e-0000-4000-8000-000000000000", 5, [])),
    )


def with_a_time_that_is_none(world: World) -> None:
    body = {**ack_body(world.store.log_id, 5, []), "time": "2026-99-99T99:99:99Z"}
    world.deliver(*signed(world.collector_key, ACK_TOPIC, body))


def of_another_kind(world: World) -> None:
    body = {"v": 1, "kind": "state", "device": DEVICE, "state": "online", "boot": 1, "time": TIME}
    world.deliver(*signed(world.collector_key, ACK_TOPIC, body))


def no_json(world: World) -> None:
    world.deliver(b"\xff\x00", jws.sign(world.collector_key, ACK_TOPIC, b"\xff\x00"))


@pytest.mark.parametrize(
    "attack",
    [
        unsigned,
        forged,
        signed_by_the_device,
        altered,
        claims_the_right_key,
        of_another_device,
        of_another_device_on_its_own_topic,
        of_another_log,
        with_a_time_that_is_none,
        of_another_kind,
        no_json,
    ],
    ids=lambda attack: attack.__name__,
)
def test_an_acknowledgement_by_another_key_deletes_nothing(world: World, attack: Callable[[World], None]) -> None:
    world.collector.leave()
    world.write(5)
    attacks = iter([attack] * 3)

    def strike() -> None:
        if world.air.clock_s > 1001 and (next_attack := next(attacks, None)):
            next_attack(world)

    world.air.tick_callbacks.append(strike)
    world.run(lambda: False, 20)
    assert world.waiting() >= {1, 2, 3, 4, 5}
    assert world.store.counters()[REFUSED] == 3
    # Of another log: an honest collector can have known this device before.
    raised = [alert["state"] for alert in world.store.recent_alerts(5)]
    assert raised == ([] if attack is of_another_log else ["raised"])


def test_a_damaged_message_is_not_sent_and_the_others_are(world: World) -> None:
    world.write(5)
    for seq, column in ((2, "payload"), (4, "jws")):
        world.store._db.execute(f"UPDATE outbox SET {column} = CAST(substr({column}, 2) AS BLOB) WHERE seq = ?", (seq,))
    world.run(lambda: {1, 3, 5, 6, 7} <= world.collector.seqs(), 60)
    # 6 declares them; 7 is an alert about it.
    assert world.collector.seqs() == {1, 3, 5, 6, 7}
    assert world.store._fetch_all("SELECT seq FROM quarantined_messages") == [(2,), (4,)]
    bodies = [json.loads(world.collector.stored[key]) for key in sorted(world.collector.stored)]
    [declared] = [body["evidence"]["seq"] for body in bodies if body.get("event") == "evicted"]
    assert declared == [[2, 2], [4, 4]]
    assert [body["subject"] for body in world.store.recent_alerts(5)] == ["outbox"]


def test_a_retained_acknowledgement_of_another_history_stops_sending(world: World) -> None:
    world.collector.leave()
    world.write(5)
    body = {**ack_body(world.store.log_id, 9, [(7, 7)]), "digest": "of a message we never wrote"}
    payload, token = signed(world.collector_key, ACK_TOPIC, body)
    other = world.air.connect(None, "collector", subscribe=[], session_expiry_s=3600)
    other.send(OutgoingMessage(ACK_TOPIC, payload, (("jws", token),), retain=True))
    other.receive(0.0)
    with pytest.raises(StorageForked, match=r"has 9 messages of log .*, this store has written 5"):
        world.run(lambda: False, 20)
    assert world.health_published() == 0
    plan = json.loads(world.store.get_meta(NEW_LOG, ""))
    assert (plan["through"], plan["missing"], plan["common_through"]) == (9, [[7, 7]], 0)


def test_an_old_acknowledgement_that_comes_again_changes_nothing(world: World) -> None:
    world.collector.leave()
    world.write(5)
    log = world.store.log_id
    newest, old = ack_body(log, 4, [(3, 3)]), ack_body(log, 2, [])
    acks = [signed(world.collector_key, ACK_TOPIC, body) for body in (newest, old, old)]
    for clock_s, ack in zip((1001, 1003, 1005), acks, strict=True):
        world.air.tick_callbacks.append(partial(once, world, clock_s, partial(world.deliver, *ack)))
    world.run(lambda: False, 8)
    # The last one is the message that settles the doubt.
    assert world.waiting() == {3, 5, 6}
    assert REFUSED not in world.store.counters()


def test_an_old_acknowledgement_before_an_hour_without_a_collector_costs_one_message(world: World) -> None:
    world.collector.leave()
    world.write(5)
    newest, old = (
        signed(world.collector_key, ACK_TOPIC, ack_body(world.store.log_id, through, [])) for through in (4, 2)
    )
    for clock_s, action in (
        (1001, partial(world.deliver, *newest)),
        (1003, partial(world.deliver, *old)),
        (4600, world.collector.come),
        # The answer to the first message has settled that doubt: this is another one.
        (4650, partial(world.deliver, *old)),
    ):
        world.air.tick_callbacks.append(partial(once, world, clock_s, action))
    waiting: list[set[int]] = []
    world.air.tick_callbacks.append(partial(once, world, 4599, lambda: waiting.append(world.waiting())))
    world.run(lambda: False, 3700)
    assert waiting == [{5, 6}]
    assert (world.waiting(), world.collector.seqs()) == (set(), {1, 2, 3, 4, 5, 6, 7})


def test_a_silent_device_sends_within_seconds_what_it_has_to_a_collector_made_anew(world: World) -> None:
    world.write(5)
    world.run(lambda: not world.waiting(), 20)
    # It has nothing, and says so.
    world.collector.leave()
    world.collector.stored.clear()
    world.collector.come()
    world.uplink = world.new_uplink()
    start_s = world.air.clock_s
    nothing = partial(world.deliver, *signed(world.collector_key, ACK_TOPIC, ack_body(world.store.log_id, 0, [])))
    world.air.tick_callbacks.append(partial(once, world, start_s + 2, nothing))
    world.run(lambda: world.collector.seqs() == {1, 2, 3, 4, 5, 6}, 20)
    assert world.collector.seqs() == {1, 2, 3, 4, 5, 6}
    assert world.air.clock_s - start_s < 15


def test_forged_acknowledgements_wear_out_neither_card_nor_journal(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.collector.leave()
    world.write(5)
    commits = Counter[str]()
    transaction = Store.transaction
    monkeypatch.setattr(Store, "transaction", lambda store, **_: commits.update(["all"]) or transaction(store))
    world.air.tick_callbacks.append(lambda: forged(world) if world.air.clock_s < 1100 else None)
    world.run(lambda: False, 120)
    assert world.store.counters()[REFUSED] > 900
    assert commits["all"] <= 4
    assert 1 <= len([record for record in caplog.records if "acknowledgements refused" in record.message]) <= 3


def test_delivery_broker_deletes_messages_that_a_subscriber_got(
    make: Callable[..., World],
) -> None:
    world = make(delivery="broker")
    world.collector.leave()
    world.write(30)
    subscribed = False

    def come() -> None:
        nonlocal subscribed
        if world.air.clock_s > 1100 and not subscribed:
            assert world.waiting() == set(range(1, 31))
            subscribed = True
            world.air.connect(None, "somebody", subscribe=["outstation/#"], session_expiry_s=9)

    world.air.tick_callbacks.append(come)
    world.run(lambda: subscribed and not world.waiting(), 600)
    assert world.waiting() == set()
    assert world.collector.stored == {}


def test_delivery_collector_keeps_what_the_broker_confirmed(world: World) -> None:
    world.collector.leave()
    world.air.connect(None, "somebody", subscribe=["outstation/#"], session_expiry_s=9)
    world.write(30)
    world.run(lambda: False, 60)
    assert world.waiting() == set(range(1, 31))


def test_a_refusing_broker_is_tried_with_back_off(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.write(5)
    world.air.reason_code = lambda message: 0x87 if message.topic.endswith("/health") else 0
    world.run(lambda: False, 1800)
    assert 1800 / 60 <= world.air.connects[DEVICE] <= 100
    assert world.waiting() == {1, 2, 3, 4, 5}
    [first, *_] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "outstation/acme/pi-07/health" in first.message
    assert "access list" in first.message


def test_a_state_topic_that_is_refused_does_not_stop_the_results(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.write(5)
    world.air.reason_code = lambda message: 0x87 if message.topic.endswith("/state") else 0
    world.run(lambda: not world.waiting(), 60)
    assert world.waiting() == set()
    assert "refuses outstation/acme/pi-07/state" in caplog.text


@pytest.mark.parametrize("delivery", ["collector", "broker"])
def test_an_alert_goes_before_a_backlog_and_costs_no_message_twice(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch, delivery: str
) -> None:
    after_s, doubled = [], []
    for is_early in (True, False):
        if not is_early:
            monkeypatch.setattr(session.Session, "_take_urgent", lambda self, limit: [])
        world = make(LinkConditions(delay_s=0.5), delivery=delivery)
        world.write(1500)
        began_s, alert = world.air.clock_s, world.raise_alert()
        world.run(partial(lambda world, alert: alert in world.collector.seqs(), world, alert), 600, drain_s=0.0)
        after_s.append(world.air.clock_s - began_s)
        # The rest after a restart, which forgets nothing that matters.
        world.uplink = world.new_uplink()
        world.run(partial(is_empty, world), 6000)
        assert world.waiting() == set()
        assert world.collector.seqs() >= set(range(1, 1502))
        doubled.append(sum(n - 1 for n in world.collector.arrivals.values()))
    assert after_s[0] < 3
    assert after_s[1] > 15
    assert doubled[0] <= doubled[1] + 50


@pytest.mark.parametrize("seed", range(2))
def test_alerts_before_a_backlog_survive_a_storm(make: Callable[..., World], seed: int) -> None:
    world = make(STORM, seed=seed)
    for _ in range(10):
        world.write(40)
        world.raise_alert()
    world.run(partial(is_empty, world), 20_000)
    assert world.waiting() == set()
    assert world.collector.seqs() == set(range(1, 411))


def test_alerts_before_a_backlog_pass_the_audit(make: Callable[..., World]) -> None:
    world = make()
    world.write(300)
    seqs = {world.raise_alert() for _ in range(3)}
    world.write(300)
    world.run(lambda: False, 120)
    assert world.collector.seqs() >= seqs
    assert world.waiting() == set()


@pytest.mark.parametrize("delivery", ["collector", "broker"])
def test_a_message_too_large_for_the_broker_is_held_back(
    make: Callable[..., World], caplog: pytest.LogCaptureFixture, delivery: str
) -> None:
    world = make(max_packet=4000, delivery=delivery)
    world.write(3)
    world.write(1, size=4000)
    world.write(3)
    world.run(lambda: False, 300)
    assert world.waiting() == {4}
    assert world.collector.seqs() == {1, 2, 3, 5, 6, 7, 8}
    [alert] = [json.loads(message.payload) for message in world.air.published if "/alerts/" in message.topic]
    assert (alert["id"], alert["evidence"]["seqs"], alert["evidence"]["limit"]) == ("storage/too-large", [4], 4000)
    assert max(len(message.payload) for message in world.air.published) < 4000
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "message 4" in record.message
    assert "max_message_bytes" in record.message


def test_a_message_that_just_fits_is_sent_and_one_byte_more_is_not(make: Callable[..., World]) -> None:
    world = make()
    world.write(1)
    [message] = world.store.unacknowledged_messages(0, 1)
    size = packet_size(world.author.to_outgoing(message))
    for limit, left in ((size, set()), (size - 1, {1})):
        other = make(max_packet=limit)
        other.write(1)
        other.run(partial(is_empty, other), 30)
        # The alert about it does not fit either.
        assert other.waiting() == left | ({2} if left else set())


def test_a_raised_limit_lets_the_held_message_go_and_clears_the_alert(make: Callable[..., World]) -> None:
    world = make(max_packet=4000)
    world.write(1, size=4000)
    world.run(lambda: False, 60)
    assert world.waiting() == {1}
    world.air.max_packet = 1 << 20
    world.uplink = world.new_uplink()
    world.run(lambda: False, 300)
    assert world.waiting() == set()
    states = [json.loads(message.payload)["state"] for message in world.air.published if "/alerts/" in message.topic]
    assert states == ["raised", "cleared"]


class HangingUpBroker:
    """Broker that ends the connection at a message of more than `limit` bytes, and announces no limit."""

    def __init__(self, world: World, limit: int) -> None:
        self.limit, self.refused = limit, 0
        self._world = world
        world.uplink._open_sink = self.open_sink

    def open_sink(self, topics: Sequence[str], will: OutgoingMessage) -> MqttSink:
        link = self._world.air.connect(None, DEVICE, subscribe=topics, will=will)
        send, receive, is_over = link.send, link.receive, False

        def send_or_break(message: OutgoingMessage) -> int:
            nonlocal is_over
            if packet_size(message) > self.limit:
                is_over = True
                return -1
            return send(message)

        def receive_or_break(timeout_s: float) -> Any:
            if is_over:
                self.refused += 1
                link.drop()
                raise PacketTooLarge("connection lost: Packet too large")
            return receive(timeout_s)

        link.send, link.receive = send_or_break, receive_or_break  # type: ignore[method-assign]
        return MqttSink(link)


def test_a_broker_that_hangs_up_at_a_large_message_gets_the_others(make: Callable[..., World]) -> None:
    world = make()
    broker = HangingUpBroker(world, 3000)
    world.write(2)
    world.write(1, size=5000)
    world.write(1, size=9000)
    world.write(2)
    world.run(lambda: False, 900)
    # Two at first, and in trials after 1, 3, 7 and 15 minutes.
    assert world.waiting() == {3, 4}
    assert broker.refused <= 2 * 5


def test_a_broker_that_hung_up_at_large_messages_for_a_while_gets_all(make: Callable[..., World]) -> None:
    world = make()
    broker = HangingUpBroker(world, 3000)
    world.write(2)
    world.write(1, size=5000)
    world.write(1, size=9000)
    held = set[int]()

    def raise_limit() -> None:
        if broker.limit < 10_000 and world.air.clock_s > 1050:
            held.update(world.waiting())
            broker.limit = 10_000

    world.air.tick_callbacks.append(raise_limit)
    world.run(lambda: False, 300)
    assert (held, broker.refused) == ({3, 4}, 2)
    assert world.waiting() == set()
    assert {3, 4} <= world.collector.seqs()
    states = [json.loads(message.payload)["state"] for message in world.air.published if "/alerts/" in message.topic]
    assert states == ["raised", "cleared"]


def test_trials_of_a_learned_limit_become_rare_and_begin_anew_after_a_success() -> None:
    limit, now_s, waits = LearnedLimit(), 1000.0, list[float]()
    for _ in range(15):
        limit.lower(9000, now_s)
        limit.lower(5000, now_s + 1)
        assert limit.bytes == 4999
        began_s = now_s
        while not limit.lift(now_s):
            now_s += 10
        waits.append(now_s - began_s)
        assert limit.bytes == MAX_PACKET
    assert waits[:3] == [60, 120, 240]
    assert waits[-1] == LONGEST_S
    now_s += 2 * LONGEST_S
    limit.lower(9000, now_s)
    assert limit.lift(now_s + 60)


@pytest.mark.parametrize("window", [1, 2, 7])
def test_no_more_is_under_way_than_the_broker_takes_from_hello_to_farewell(
    make: Callable[..., World], window: int
) -> None:
    world = make(LinkConditions(delay_s=0.5), window=window)
    world.write(100)
    world.run(lambda: len(world.collector.stored) > 20, 600, drain_s=0.5)
    assert world.air.max_in_flight[DEVICE] == window
    assert states(world)[-1] == "stopped"


def test_a_broker_that_confirms_nothing_any_more_is_left(world: World) -> None:
    world.write(5)
    world.air.conditions = LinkConditions(no_receipts=True)
    world.collector.away = True
    world.run(lambda: world.air.connects[DEVICE] > 1, 300)
    assert 1000 + session.CONFIRM_TIMEOUT_S < world.air.clock_s < 1000 + 2 * session.CONFIRM_TIMEOUT_S
    assert "did not confirm a message" in world.uplink.state or world.air.connects[DEVICE] == 2


def test_a_message_without_a_receipt_is_sent_again(world: World) -> None:
    def go_on() -> None:
        world.air.conditions = LinkConditions(silent_refusal=1.0) if 1005 < world.air.clock_s < 1007 else CALM
        if world.air.clock_s - 1000 > len(world.outbox_seqs()):
            world.write(1)

    world.air.tick_callbacks.append(go_on)
    world.run(lambda: world.air.clock_s > 1000 + 3 * session.CONFIRM_TIMEOUT_S, 200)
    assert world.air.connects[DEVICE] == 2
    assert min(world.waiting(), default=1000) > 2.5 * session.CONFIRM_TIMEOUT_S


def test_greetings_too_large_for_the_broker_are_left_out(
    make: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    world = make(max_packet=256)
    world.run(lambda: False, 30)
    assert world.air.connects[DEVICE] == 1
    assert [message.topic for message in world.air.published if message.topic.endswith("/keys")] == []
    assert "/keys is not sent: its " in caplog.text


def test_after_an_answered_connection_the_next_one_comes_soon(world: World) -> None:
    def go_on() -> None:
        if world.air.clock_s - 1000 > len(world.outbox_seqs()):
            world.write(1)
        link = world.air._mailboxes[DEVICE].link if DEVICE in world.air._mailboxes else None
        if link is not None and world.air.clock_s > cuts[-1] + 5:
            cuts.append(world.air.clock_s)
            link.disconnect("flapping")

    cuts = [world.air.clock_s]
    world.air.tick_callbacks.append(go_on)
    world.run(lambda: len(cuts) > 12, 600)
    assert len(world.pauses) >= 11
    assert max(world.pauses) <= 4.0


def test_waits_between_tries_grow_to_a_minute_and_are_spread(world: World) -> None:
    assert [backoff(attempt, 0.0) for attempt in (0, 1, 50)] == [0.5, 0.5, 0.5]
    assert [backoff(attempt, 1.0) for attempt in (0, 1, 2, 3, 4, 50)] == [4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    world.air.conditions = LinkConditions(disconnect=1.0)
    world.run(lambda: False, 1800)
    assert 30 <= world.air.connects[DEVICE] <= 100
    assert len(set(world.pauses)) == len(world.pauses)
    assert min(world.pauses) >= 0.5
    assert max(world.pauses) <= 60


def test_a_fleet_that_loses_its_broker_after_a_long_day_comes_back_spread(make: Callable[..., World]) -> None:
    waits = []
    for seed in range(6):
        world = make(seed=seed)
        world.run(partial(once, world, 1100, world.air.restart), 300)
        waits += world.pauses[:1]
    assert max(waits) - min(waits) > 1.0
    assert max(waits) <= 4.0


def test_a_full_disk_delays_deleting_and_stops_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.write(50)
    transaction = Store.transaction

    def full(store: Store, **_: bool) -> contextlib.AbstractContextManager[Transaction]:
        if world.air.clock_s < 1060:
            raise StorageFull("the disk is full")
        return transaction(store)

    monkeypatch.setattr(Store, "transaction", full)
    world.run(lambda: not world.waiting(), 200)
    assert world.waiting() == set()
    assert set(world.collector.arrivals.values()) == {1}
    assert world.air.connects[DEVICE] == 1
    assert "the disk is full" in caplog.text


def once(world: World, clock_s: float, action: Callable[[], object]) -> bool:
    """Call `action` once when the clock reaches the time; return whether the uplink has paused since."""
    if world.air.clock_s >= clock_s and action not in world.done:
        world.done.append(action)
        action()
    return bool(world.pauses)


def states(world: World) -> list[str]:
    """Return the messages published on `state`, verified."""
    collected: list[str] = []
    for message in world.air.published:
        if message.topic.endswith("/state"):
            signer = jws.Signer(DEVICE, world.key.public)
            tokens = [value for name, value in message.properties if name == "jws"]
            body = verify_message(message.topic, message.payload, tokens, {signer.key.kid: signer}.get).body
            assert isinstance(body, StatePayload)
            assert message.retain
            collected.append(body.state)
    return collected


def test_online_offline_and_stopped_are_signed_and_retained(world: World) -> None:
    world.write(1)
    world.air.tick_callbacks.append(partial(once, world, 1030, partial(cut, world)))
    world.run(lambda: world.air.clock_s > 1060, 100)
    assert states(world) == ["online", "offline", "online", "stopped"]
    ids = [dict(message.properties)["id"] for message in world.air.published if message.topic.endswith("/state")]
    assert len(set(ids)) == len(ids)


def cut(world: World) -> None:
    link = world.air._mailboxes[DEVICE].link
    if link is not None:
        link.disconnect("connection lost")


def test_stopping_empties_the_outbox_first_and_gives_up_in_time(make: Callable[..., World]) -> None:
    world = make(LinkConditions(delay_s=0.2), window=20)
    world.write(60)
    world.run(lambda: True, 1)
    assert world.waiting() == set()
    assert states(world)[-1] == "stopped"
    world.uplink = world.new_uplink()
    world.collector.leave()
    world.write(5)
    began = world.air.clock_s
    world.run(lambda: True, 1)
    assert world.air.clock_s - began < 4.0
    assert states(world)[-1] == "stopped"


def test_the_uplink_is_alive_while_it_waits_and_not_when_it_hangs(world: World) -> None:
    world.air.conditions = LinkConditions(disconnect=1.0)
    dead: list[float] = []
    world.air.tick_callbacks.append(
        lambda: None if world.uplink.is_alive(world.air.now()) else dead.append(world.air.clock_s)
    )
    world.run(lambda: False, 600)
    assert dead == []
    world.air.clock_s += uplink._HEARTBEAT_TIMEOUT_S + 61
    assert not world.uplink.is_alive(world.air.now())


def test_a_stop_waits_for_a_broker_that_closes_late(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is closed next, and the end of the session may write to it."""
    waits: list[float] = []
    monkeypatch.setattr(world.uplink._thread, "join", waits.append)
    world.uplink.stop(2.0)
    assert waits[0] > 2.0 + uplink._GOODBYE_TIMEOUT_S + mqtt._CLOSE_TIMEOUT_S


def test_an_acknowledgement_is_taken_on_its_own_topic_only(world: World) -> None:
    payload, token = signed(world.collector_key, ACK_TOPIC, ack_body(world.store.log_id, 0, []))
    acks = world.uplink._acks
    assert isinstance(
        acks.receive(IncomingMessage(ACK_TOPIC, payload, (token,), True, 1, 1), world.air.now()), AckPayload
    )
    elsewhere = f"outstation/{FLEET}/{DEVICE}/cmd"
    assert acks.receive(IncomingMessage(elsewhere, payload, (token,), False, 1, 1), world.air.now()) is None


@pytest.mark.parametrize(
    ("topic_filter", "topic", "taken"),
    [
        ("a/+/c", "a/b/c", True),
        ("a/+/c", "a/b/d", False),
        ("a/#", "a/b/c", True),
        ("a/+", "a/b/c", False),
        ("a/b/c", "a/b", False),
    ],
)
def test_the_air_routes_as_a_broker_does(topic_filter: str, topic: str, taken: bool) -> None:
    assert topic_matches(topic_filter, topic) is taken
