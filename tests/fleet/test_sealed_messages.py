"""Messages sealed to the collector: over a lossy broker that records everything, and against hostile senders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace

from outstation.device.bootstrap import sinks
from outstation.device.config.config import Config
from outstation.device.config.device import CollectorConfig, DeviceConfig
from outstation.device.uplink.mqtt_sink import MqttSink
from outstation.device.uplink.sealing_sink import open_sealing_sink
from outstation.device.uplink.uplink import Uplink
from outstation.fleet.audit.audit import audit
from outstation.fleet.collector import encryption_keys
from outstation.fleet.collector.collector import Collector
from outstation.fleet.collector.encryption_keys import EncryptionKeys
from outstation.fleet.collector.quota import Quota
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.fleet.repository import trust as repository_trust
from outstation.foundation.errors import ConfigError, LinkDown, MessageRefused, UsageError
from outstation.protocol.transport import sealing
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.packets import SEALED, IncomingMessage, OutgoingMessage, compress
from outstation.protocol.transport.sealing import Opener
from outstation.protocol.wire.keys import EncryptionKey, encryption_key_of
from outstation.protocol.wire.trust import TrustedKey
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage, new_key
from outstation.workbench.testing.simulation.lossy_link import LossyBroker, LossyLink
from tests.device.commands.test_commands import ConfirmingSession
from tests.device.machine.test_trusted_keys import STOLEN, listed, make_root
from tests.device.machine.test_trusted_keys import Device as TrustingDevice
from tests.device.uplink.test_uplink import CALM, DEVICE, STORM, TIME, World
from tests.fleet.test_collector import Desk, Wire, enrolled
from tests.kit.commands import call_outstation
from tests.kit.operators import NOW, Operator
from tests.kit.operators import Desk as DeviceDesk
from tests.kit.repositories import Depot

pytestmark = pytest.mark.attack("privacy")

PLANTED = "patient-zq7"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    encryption_keys.create(tmp_path)
    return tmp_path


def public(home: Path) -> EncryptionKey:
    key = encryption_keys.load_public(home)
    assert key is not None
    return key


class SealedWorld(World):
    """A device that seals to `key`, and the real collector with the keys in `home`."""

    def __init__(self, home: Path, weather: Any = CALM, *, seed: int = 0, delivery: Any = "collector") -> None:
        self.seal_to = public(home)
        super().__init__(home / "device", weather, seed=seed, delivery=delivery)
        self.air.tick_callbacks.clear()
        self.collector.leave()
        self.fleet = FleetStore(home / "fleet.db")
        self.fleet.enrol(DEVICE, self.key.public, replace=False, now=TIME)
        self.keys = EncryptionKeys(home)
        arguments = (FLEET, BrokerConfig(), self.fleet, self.collector_key)
        self.real = Collector(*arguments, open_link=self._connect, encryption_keys=self.keys)
        self._link: LossyLink | None = None
        self.air.tick_callbacks.append(self._turn)

    def new_uplink(self) -> Uplink:
        made = super().new_uplink()
        made._open_sink = partial(open_sealing_sink, made._open_sink, lambda: self.seal_to)
        return made

    def _connect(self) -> LossyLink:
        filters = [f"outstation/{FLEET}/+/{kind}" for kind in ("health", "state", "keys")]
        return self.air.connect(None, "collector", subscribe=filters, session_expiry_s=60)

    def _turn(self) -> None:
        try:
            self._link = self._link or self._connect()
            self.real.tick(self._link, 0.0)
        except LinkDown:
            self.real.acknowledger.requeue_in_flight()
            self._link = None

    def plant(self, n: int) -> None:
        with self.store.transaction() as tx:
            for number in range(n):
                self.author.append(tx, "health", None, {"pad": f"{PLANTED} {number}"}, self.air.now())

    def reload_keys(self) -> None:
        self.keys._reload_at = float("-inf")

    def from_device(self) -> list[OutgoingMessage]:
        return [message for message in self.air.published if not message.topic.endswith("/ack")]


@pytest.fixture
def make(home: Path) -> Iterator[Callable[..., SealedWorld]]:
    made: list[SealedWorld] = []

    def build(*args: Any, **kwargs: Any) -> SealedWorld:
        made.append(SealedWorld(home, *args, **kwargs))
        return made[-1]

    yield build
    for world in made:
        world.store.close()
        world.fleet.close()


@pytest.mark.parametrize(("weather", "compress"), [(CALM, False), (STORM, True)])
def test_a_broker_that_records_everything_reads_nothing(
    make: Callable[..., SealedWorld], weather: Any, compress: bool
) -> None:
    world = make(weather, seed=3)
    world.author.compress = compress
    world.plant(120)
    world.run(lambda: not world.waiting(), 1000)
    assert world.waiting() == set()
    report = audit(world.fleet)
    assert (report.passed, report.messages, report.gaps) == (True, 120, [])
    assert world.fleet.refusals() == []
    sent = world.from_device()
    assert {message.topic.rsplit("/", 1)[1] for message in sent} == {"health", "state", "keys"}
    for message in sent:
        assert (message.content_type, message.properties) == (SEALED, ())
        for word in (PLANTED, "boot", world.key.public.kid, world.store.log_id, "online"):
            assert word.encode() not in message.payload
    # The device's disk and the collector have it in the clear.
    [(payload,)] = world.fleet.fetch_all("SELECT payload FROM messages WHERE seq = 1")
    assert PLANTED.encode() in payload


def test_a_rotated_key_loses_no_message(make: Callable[..., SealedWorld], home: Path) -> None:
    world = make()
    world.plant(10)
    world.run(lambda: not world.waiting(), 60)
    former = world.seal_to
    encryption_keys.create(home)
    world.reload_keys()
    # A device that has not heard of it yet, then one that has.
    for key in (former, public(home)):
        world.seal_to, world.uplink = key, world.new_uplink()
        world.plant(10)
        world.run(lambda: not world.waiting(), 60)
        assert world.waiting() == set()
    assert public(home).kid != former.kid
    assert audit(world.fleet).messages == 30


def test_what_the_collector_cannot_open_is_refused_and_stays_on_the_device(make: Callable[..., SealedWorld]) -> None:
    world = make()
    world.seal_to = encryption_key_of(X25519PrivateKey.generate())
    world.plant(5)
    world.run(lambda: False, 60)
    assert world.waiting() == {1, 2, 3, 4, 5}
    assert world.fleet.count_messages() == 0
    assert {row["reason"] for row in world.fleet.refusals()} == {"sealed to another key"}


def test_the_brokers_receipt_counts_where_the_config_says_so(make: Callable[..., SealedWorld]) -> None:
    world = make(delivery="broker")
    world.plant(5)
    world.run(lambda: not world.outbox_seqs(), 60)
    assert world.outbox_seqs() == set()
    assert world.fleet.count_messages() == 5


@pytest.fixture
def desk(home: Path) -> Iterator[Desk]:
    store, key = FleetStore(home / "fleet.db"), new_key()
    wire, quota = Wire(store), Quota(messages_per_s=1.0, bytes_per_s=1000, burst_s=20.0)
    collector = Collector(FLEET, BrokerConfig(), store, key, quota=quota, encryption_keys=EncryptionKeys(home))
    yield Desk(collector, store, wire, key)
    store.close()


def sealed_for(key: EncryptionKey, message: SignedMessage, **changes: Any) -> IncomingMessage:
    outgoing = sealing.seal_message(message.to_outgoing(), key)
    return replace(message.to_incoming(), payload=outgoing.payload, tokens=(), sealed=True, **changes)


def test_hostile_sealed_messages_are_refused_counted_and_never_acknowledged(desk: Desk, home: Path) -> None:
    sender = enrolled(desk.store)
    good = sealed_for(public(home), sender.results())
    other = encryption_key_of(X25519PrivateKey.generate())
    unsigned = replace(good, payload=sealing.seal(public(home), good.topic, "", b"{}"))
    desk.hand(
        replace(good, payload=good.payload[:-1]),
        replace(good, payload=good.payload[:30]),
        replace(good, payload=good.payload[:60] + b"x" + good.payload[61:]),
        replace(good, topic=good.topic.replace("results", "quality")),
        sealed_for(other, sender.results()),
        # Sealed, so that only the collector could read it; but nobody signed it.
        unsigned,
        # The content type alone makes a payload sealed.
        replace(sender.results().to_incoming(), sealed=True),
    )
    assert desk.reasons() == {
        "broken seal": 3,
        "malformed seal": 2,
        "sealed to another key": 1,
        "malformed signature": 1,
    }
    assert (desk.store.count_messages(), desk.wire.acks()) == (0, [])
    # Recorded and sent again, it is a duplicate like any other.
    desk.hand(good)
    desk.hand(good, good)
    assert (desk.store.count_messages(), desk.wire.acks()[-1]) == (1, ("pi-07", 1, []))


@pytest.mark.parametrize("tls", [True, False])
def test_a_flood_of_broken_seals_costs_its_senders_quota_where_tls_proves_the_sender(home: Path, tls: bool) -> None:
    """Without TLS anybody can send in a device's name, and must not use its quota up."""
    store, quota = FleetStore(home / "fleet.db"), Quota(messages_per_s=1.0, bytes_per_s=100_000, burst_s=20.0)
    broker = BrokerConfig(url="mqtts://broker" if tls else "mqtt://127.0.0.1:1")
    wire = Wire(store)
    collector = Collector(FLEET, broker, store, new_key(), quota=quota, encryption_keys=EncryptionKeys(home))
    desk, sender = Desk(collector, store, wire, new_key()), enrolled(store)
    first, good = (sealed_for(public(home), sender.results()) for _ in range(2))
    desk.hand(first)
    desk.hand(*[replace(good, payload=good.payload[:-1])] * 30)
    desk.hand(good)
    reasons, stored = desk.reasons(), store.count_messages()
    store.close()
    assert sum(reasons.values()) + stored == 32
    assert ((reasons["broken seal"] < 30), stored) == ((True, 1) if tls else (False, 2))


def test_a_sealed_gzip_bomb_fails_its_signature_within_the_limits(desk: Desk, home: Path) -> None:
    sender = enrolled(desk.store)
    message = sender.results()
    bomb = compress(OutgoingMessage(message.topic, b"{" + b" " * (8 << 20), (("jws", message.jws),)))
    opened = sealing.open_message(
        replace(message.to_incoming(), payload=sealing.seal_message(bomb, public(home)).payload, sealed=True),
        EncryptionKeys(home).opener,
    )
    assert len(opened.payload) < 20_000
    desk.hand(
        replace(message.to_incoming(), payload=sealing.seal_message(bomb, public(home)).payload, tokens=(), sealed=True)
    )
    assert desk.reasons() == {"bad signature": 1}


def test_without_a_key_sealed_messages_are_refused_and_others_are_not(home: Path, tmp_path: Path) -> None:
    store = FleetStore(tmp_path / "fleet.db")
    wire = Wire(store)
    desk = Desk(Collector(FLEET, BrokerConfig(), store, new_key()), store, wire, new_key())
    sender = enrolled(store)
    desk.hand(sender.results(), sealed_for(public(home), sender.results()))
    assert (store.count_messages(), desk.reasons()) == (1, {"sealed to another key": 1})
    store.close()


def test_a_key_file_that_cannot_be_read_hides_no_other(home: Path) -> None:
    (home / encryption_keys.FOLDER / "20990101T000000.000000Z.key").write_text("not a key")
    message = MessageSender().results()
    opened = sealing.open_message(sealed_for(public(home), message), EncryptionKeys(home).opener)
    assert (opened.payload, opened.tokens) == (message.payload, (message.jws,))
    [path] = (home / encryption_keys.FOLDER).glob("202*.key")
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("key", ["A" * 43, "short", "A" * 300])
def test_a_command_with_an_unfit_reply_key_is_refused(tmp_path: Path, key: str) -> None:
    desk = DeviceDesk(tmp_path / "device")
    assert desk.refused(desk.operator.command("report", reply_key=key)) == "malformed payload"
    desk.store.close()


class RecordingSink(MqttSink):
    """Sink without a broker; `sent` begins with the last will."""

    def __init__(self) -> None:
        self.sent: list[OutgoingMessage] = []
        air = LossyBroker(0, CALM)
        super().__init__(air.connect(None, DEVICE))
        self.send = self._record

    def open(self, _topics: Sequence[str], will: OutgoingMessage) -> MqttSink:
        self._record(will)
        return self

    def _record(self, message: OutgoingMessage) -> int:
        self.sent.append(message)
        return len(self.sent)


def test_a_reply_is_sealed_to_its_operator_also_after_a_crash(tmp_path: Path, home: Path) -> None:
    private, operator = X25519PrivateKey.generate(), Operator()
    desk = DeviceDesk(tmp_path / "device", operator=operator)
    reply_key = encryption_key_of(private).text
    desk.commands.accept(operator.command("report", reply_key=reply_key))
    desk.control.tick(NOW)
    desk.crash()
    session = ConfirmingSession()
    desk.commands.on_connected()
    desk.commands.tick(session, NOW)
    [reply] = session.messages
    assert reply.reader == reply_key
    sink = RecordingSink()
    opened = open_sealing_sink(sink.open, lambda: public(home), [], reply)
    opened.send(reply)
    assert opened.measure(reply) > max(len(message.payload) for message in sink.sent)
    for message in sink.sent:
        delivery = IncomingMessage(message.topic, message.payload, (), False, 1, 1, sealed=True)
        assert sealing.open_message(delivery, Opener([private])).payload == reply.payload
        with pytest.raises(MessageRefused):
            sealing.open_message(delivery, EncryptionKeys(home).opener)
    desk.store.close()


def test_encryption_without_a_key_is_an_error_of_the_config(tmp_path: Path) -> None:
    for text, words in (("", "empty"), ("A" * 43, "small order"), ("AAAA", "32 bytes")):
        conf = Config(
            device=DeviceConfig(id=DEVICE, fleet=FLEET), collector=CollectorConfig(key="k", encryption_key=text)
        )
        with pytest.raises(ConfigError, match=words) as error:
            sinks.load_encryption_key(tmp_path / "outstation.toml", conf)
        assert error.value.key == "collector.encryption_key"


def test_a_trust_document_replaces_the_key_that_a_device_seals_to(tmp_path: Path) -> None:
    device, key = TrustingDevice(tmp_path), encryption_key_of(X25519PrivateKey.generate())
    configured = encryption_key_of(X25519PrivateKey.generate())
    assert device.trusted.find_encryption_key(configured) is configured
    entries = [*listed(STOLEN), TrustedKey("A" * 43, "encryption")]
    with pytest.raises(MessageRefused, match="small order"):
        device.take_trust(make_root(2, entries))
    assert device.trusted.find_encryption_key(configured) is configured
    former = encryption_key_of(X25519PrivateKey.generate()).text
    device.take_trust(make_root(2, [*listed(STOLEN), *(TrustedKey(k, "encryption") for k in (former, key.text))]))
    device.crash()
    in_force = device.trusted.find_encryption_key(configured)
    assert in_force is not None
    assert in_force.kid == key.kid
    # It gives no right to command or acknowledge.
    assert device.trusted.find_collector(key.kid) is device.trusted.find_commander(key.kid) is None
    device.store.close()


def test_after_a_revocation_a_device_never_seals_to_the_key_of_its_config(tmp_path: Path) -> None:
    device = TrustingDevice(tmp_path)
    leaked, key, next_key = (encryption_key_of(X25519PrivateKey.generate()) for _ in range(3))
    # It was away, and gets both roots in one message.
    device.take_trust(make_root(2, [*listed(STOLEN), TrustedKey(key.text, "encryption")]), make_root(3, listed(STOLEN)))
    sink, message = RecordingSink(), MessageSender().results()
    will = OutgoingMessage(message.topic, message.payload, (("jws", message.jws),))
    for _ in range(2):
        assert device.trusted.find_encryption_key(leaked) is None
        opened = open_sealing_sink(sink.open, partial(device.trusted.find_encryption_key, leaked), [], will)
        assert opened.window == 0
        assert will.payload not in sink.sent[-1].payload
        device.crash()
    device.take_trust(make_root(4, [*listed(STOLEN), TrustedKey(next_key.text, "encryption")]))
    opened = open_sealing_sink(sink.open, partial(device.trusted.find_encryption_key, leaked), [], will)
    assert opened.window > 0
    device.take_trust(make_root(5, None))
    assert opened.window == 0
    device.store.close()


def test_revoking_the_only_encryption_key_points_to_its_rotation(tmp_path: Path) -> None:
    entries = [*listed(STOLEN), TrustedKey(encryption_key_of(X25519PrivateKey.generate()).text, "encryption")]
    for text in (entries[-1].key, entries[-1].kid):
        with pytest.raises(UsageError, match="fleet keys rotate-encryption"):
            repository_trust.revoke_key(text)(entries)
    second = TrustedKey(encryption_key_of(X25519PrivateKey.generate()).text, "encryption")
    assert repository_trust.revoke_key(entries[-1].key)([*entries, second]) == [*entries[:-1], second]


def test_the_command_makes_a_key_and_lists_it_in_place_of_the_former_one(tmp_path: Path) -> None:
    home = tmp_path / "fleet"
    init_fleet(home, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    before = public(home)
    rotate = ("fleet", "keys", "rotate-encryption", "--dir", str(home), "--json")
    done = call_outstation(*rotate)
    # No repository, so nothing could tell devices.
    assert (done.returncode, public(home).kid) == (2, before.kid)
    Depot(home).create(roots=1, threshold=1)
    keys = [msgspec.json.decode(call_outstation(*rotate).stdout) and public(home) for _ in range(2)]
    shown = msgspec.json.decode(call_outstation("fleet", "keys", "show", "--dir", str(home), "--json").stdout)
    assert [entry["key"] for entry in shown["keys"] if entry["role"] == "encryption"] == [keys[1].text]
    assert len({before.kid, keys[0].kid, keys[1].kid}) == 3
    # Messages sealed to any of the three are opened.
    for key in (before, *keys):
        message = MessageSender().results()
        assert sealing.open_message(sealed_for(key, message), EncryptionKeys(home).opener).payload == message.payload
