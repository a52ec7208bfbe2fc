"""Messages: signing, throughput from the outbox to the broker, and from the broker to the collector's database."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from jwt.api_jws import PyJWS
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from outstation.device import config
from outstation.device.recovery.open import open_store
from outstation.device.store.message_log import MessageLog
from outstation.device.uplink.mqtt_sink import MqttSink
from outstation.device.uplink.uplink import Uplink
from outstation.fleet.collector.collector import Collector
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import enrol, init_fleet
from outstation.foundation import clock
from outstation.protocol.transport import sealing
from outstation.protocol.transport.broker_config import BrokerConfig, UplinkBrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, PublishReceipt
from outstation.protocol.wire import jws
from outstation.protocol.wire.keys import SigningKey, encryption_key_of
from outstation.protocol.wire.messages import AckPayload, ResultColumns
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.messages import FLEET, MessageSender, new_key
from scripts.benchmarks import Result, benchmark, rates
from scripts.kit.memory_link import MemoryLink

MESSAGES = 3000
# A large number, because acknowledgements are recorded once per second.
SENT = 20_000
_TOPIC = "outstation/acme/pi-07/results/exercise"
_SIGNED = 1000
PADDING = 600  # makes a message of about 1 kB
WINDOW = 100
# The setting that `fleet init` writes.
_CONF = "max_inflight_messages 500"


@benchmark("signing", quick=True)
def signing() -> Result:
    """Sign and verify each message once, as on its way from a device to a collector."""
    key = SigningKey(Ed25519PrivateKey.generate())
    signer = jws.Signer("pi-07", key.public)
    payloads = [_results_payload(seq) for seq in range(1, _SIGNED + 1)]
    other = PyJWS()
    header = {"typ": None, "b64": False, "crit": ["b64"], "kid": key.public.kid, "top": _TOPIC}

    def ours() -> int:
        for payload in payloads:
            jws.verify([jws.sign(key, _TOPIC, payload)], _TOPIC, payload, {key.public.kid: signer}.get)
        return _SIGNED

    def reference() -> int:
        for payload in payloads:
            token = other.encode(payload, key.private, "EdDSA", header)
            other.decode(token, key.private.public_key(), ["EdDSA"], detached_payload=payload)
        return _SIGNED

    note = f"sign and verify {len(payloads[0])} bytes; reference: PyJWT"
    return Result.timed("signing", rates(ours, reference, cpu=time.process_time), "messages/s", 1.0, note)


@benchmark("sealing", quick=True)
def sealing_cost() -> Result:
    """Sign, seal, open and verify each message once; the reference does the same without sealing."""
    key, private = SigningKey(Ed25519PrivateKey.generate()), X25519PrivateKey.generate()
    signer, public, opener = jws.Signer("pi-07", key.public), encryption_key_of(private), sealing.Opener([private])
    payloads = [_results_payload(seq) for seq in range(1, _SIGNED + 1)]

    def ours() -> int:
        for payload in payloads:
            sealed = sealing.seal(public, _TOPIC, jws.sign(key, _TOPIC, payload), payload)
            token, content = opener.open(_TOPIC, sealed)
            jws.verify([token], _TOPIC, content, {key.public.kid: signer}.get)
        return _SIGNED

    def reference() -> int:
        for payload in payloads:
            jws.verify([jws.sign(key, _TOPIC, payload)], _TOPIC, payload, {key.public.kid: signer}.get)
        return _SIGNED

    note = f"{len(payloads[0])} bytes and {sealing.OVERHEAD_BYTES} more when sealed; reference: signed only"
    return Result.timed("sealing", rates(ours, reference, cpu=time.process_time), "messages/s", 0.25, note)


def _results_payload(seq: int) -> bytes:
    """Build a result message of forty windows."""
    columns = {"row": list(range(100, 4100, 100)), "label": ["PEN"] * 40, "score": [0.97] * 40}
    return msgspec.json.encode({"v": 1, "kind": "results", "device": "pi-07", "seq": seq, "columns": columns})


@benchmark("uplink")
def outbox_to_broker() -> Result:
    """Measure signed QoS 1 messages to Mosquitto with one subscriber; ours come from a durable outbox."""
    with (
        tempfile.TemporaryDirectory() as made,
        MosquittoBroker(Path(made), extra_conf=_CONF) as broker,
        _listening(broker),
    ):
        folder = Path(made)
        conf = config.Config(
            device=config.DeviceConfig(id="pi-07", fleet=FLEET, data_dir=str(folder / "data")),
            broker=UplinkBrokerConfig(url=broker.url),
            collector=config.CollectorConfig(delivery="broker"),
        )
        store, key = open_store(folder / "data"), new_key(1)
        author = MessageLog(FLEET, "pi-07", key, store.log_id, store.boot, 100_000)
        body = {"event": "bench", "summary": "x" * PADDING, "evidence": {}}
        failures: list[Exception] = []

        def fill() -> None:
            for _ in range(SENT // 500):
                with store.transaction() as tx:
                    for _ in range(500):
                        author.append(tx, "audit", None, body, clock.read())

        def ours() -> int:
            confirmed = threading.Event()
            uplink = Uplink(
                *(conf, store, author, lambda _kid: None, clock.read, failures.append),
                lambda topics, will: MqttSink(
                    _Counted(conf.broker, "pi-07", subscribe=topics, will=will, sent=SENT, confirmed=confirmed)
                ),
            )
            running.append(uplink)
            uplink.start()
            assert confirmed.wait(120), failures
            return SENT

        def prepare() -> None:
            # The last acknowledgements are recorded at the end of their second, while both sides are idle.
            while store.backlog().messages:
                time.sleep(0.01)
            while running:
                running.pop().stop()
            fill()

        running: list[Uplink] = []
        fill()
        topic = store.unacknowledged_messages(0, 1)[0].topic
        payloads = [message.payload for message in store.unacknowledged_messages(0, SENT)]
        try:
            ours()
            pace = rates(ours, lambda: _own_loop(broker.port, topic, payloads, key), rounds=3, prepare=prepare)
        finally:
            for process in running:
                process.stop()
            store.close()
    note = f"{len(payloads[0])} bytes, window {WINDOW}; reference: paho, own loop, signing without storage"
    return Result.timed("uplink", pace, "messages/s", 0.85, note)


class _Counted(Link):
    """Link that sets `confirmed` after the broker acknowledged `sent` messages and a device's two initial ones."""

    def __init__(self, *arguments: Any, sent: int, confirmed: threading.Event, **named: Any) -> None:
        self._left, self._confirmed = sent + 2, confirmed
        super().__init__(*arguments, **named)

    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]:
        events = super().receive(timeout_s)
        self._left -= sum(isinstance(event, PublishReceipt) for event in events)
        if self._left <= 0:
            self._confirmed.set()
        return events


def _own_loop(port: int, topic: str, payloads: list[bytes], key: Any) -> int:
    """Publish by the fastest method with paho: one thread, a sliding window, paho's queue unused."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.max_inflight_messages_set(0)
    under_way: set[int] = set()
    client.on_publish = lambda c, u, mid, reason, properties: under_way.discard(mid)
    connected: list[bool] = []
    client.on_connect = lambda *_: connected.append(True)
    client.connect("127.0.0.1", port)
    while not connected:
        client.loop(0.01)
    sent = 0
    while sent < len(payloads) or under_way:
        while sent < len(payloads) and len(under_way) < WINDOW:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.UserProperty = [("jws", jws.sign(key, topic, payloads[sent]))]
            under_way.add(client.publish(topic, payloads[sent], 1, False, properties).mid)
            sent += 1
        client.loop(0.01)
    client.disconnect()
    return sent


@contextlib.contextmanager
def _listening(broker: MosquittoBroker) -> Iterator[None]:
    """Run a subscriber to all messages in a separate process."""
    command = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(broker.port), "-q", "1", "-V", "mqttv5", "-t", "#"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as listener:
        try:
            time.sleep(0.3)
            yield
        finally:
            listener.kill()


@benchmark("collector", quick=True)
def broker_to_database() -> Result:
    """Measure results messages of forty windows: verify, parse, store, acknowledge; batches of 500 on both sides."""
    with tempfile.TemporaryDirectory() as made:
        home = Path(made) / "fleet"
        conf = init_fleet(home, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
        store, sender, key = FleetStore(Path(conf.fleet.db)), MessageSender(), new_key(2)
        enrol(home, conf, store, "pi-07", key=sender.key.public)
        collector = Collector(FLEET, BrokerConfig(), store, key)
        plain = sqlite3.connect(Path(made) / "plain.db", isolation_level=None)
        plain.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
            "CREATE TABLE messages (device, log, seq, kind, topic, payload, jws, at, PRIMARY KEY (device, log, seq));"
            "CREATE TABLE results (device, task, row, t, label, score);"
            "CREATE INDEX by_row ON results (device, task, row)"
        )
        waiting: list[IncomingMessage] = []

        def prepare() -> None:
            waiting[:] = [sender.results(40).to_incoming(n) for n in range(1, MESSAGES + 1)]

        def ours() -> int:
            link = MemoryLink(list(waiting))
            for _ in range(MESSAGES // 500):
                collector.tick(link, 0.0)
            return MESSAGES

        def reference() -> int:
            for at in range(0, MESSAGES, 500):
                _by_hand(plain, sender.key.public, key, waiting[at : at + 500])
            return MESSAGES

        try:
            pace = rates(ours, reference, rounds=5, prepare=prepare, cpu=time.process_time)
            assert store.count_messages() == 6 * MESSAGES
        finally:
            store.close()
            plain.close()
    note = "verify, parse, store and acknowledge; reference: the same steps by hand, a transaction for 500 messages"
    return Result.timed("collector", pace, "messages/s", 0.8, note)


def _by_hand(plain: sqlite3.Connection, public: Any, key: Any, batch: list[IncomingMessage]) -> None:
    rows: list[tuple[Any, ...]] = []
    results: list[tuple[Any, ...]] = []
    signer = jws.Signer("pi-07", public)
    last: dict[str, Any] = {}
    for delivery in batch:
        jws.verify(delivery.tokens, delivery.topic, delivery.payload, {public.kid: signer}.get)
        last = json.loads(delivery.payload)
        place = (last["device"], last["log"], last["seq"])
        rows.append((*place, last["kind"], delivery.topic, delivery.payload, delivery.tokens[0], "now"))
        columns = msgspec.convert(last["columns"], ResultColumns)
        results += [
            (last["device"], last["task"], *row)
            for row in zip(
                columns.expand_rows(),
                columns.expand_times(),
                columns.expand_labels() or [],
                columns.score or [],
                strict=True,
            )
        ]
    plain.execute("BEGIN")
    plain.executemany("INSERT OR IGNORE INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    plain.executemany("INSERT INTO results VALUES (?, ?, ?, ?, ?, ?)", results)
    plain.execute("COMMIT")
    ack = AckPayload(
        v=1, device=last["device"], log=last["log"], through=last["seq"], missing=[], time="2026-11-24T00:00:00Z"
    )
    jws.sign(key, f"outstation/{FLEET}/pi-07/ack", msgspec.json.encode(ack))
