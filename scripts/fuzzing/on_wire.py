"""Fuzz targets for MQTT input: topics, tokens, payloads, and their processing in the collector."""

from __future__ import annotations

import atexit
import json
import tempfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from outstation.fleet.audit.audit import audit
from outstation.fleet.collector.collector import Collector
from outstation.fleet.database.store import FleetStore
from outstation.foundation.clock import parse_rfc3339
from outstation.foundation.errors import MessageRefused
from outstation.protocol.documents import enrolment_request, log_head
from outstation.protocol.transport import sample_content, sealing
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire import jws, keys, topics
from outstation.protocol.wire.keys import b64url_decode, b64url_encode
from outstation.protocol.wire.messages import AckPayload
from outstation.protocol.wire.verification import VerifiedMessage, verify_message
from outstation.workbench.testing.messages import FLEET, TIME, MessageSender, SignedMessage, new_key
from scripts.fuzzing import target, unique_keys
from scripts.kit.memory_link import MemoryLink

DEVICE, COLLECTOR = new_key(1), new_key(2)
_ENCRYPTION = X25519PrivateKey.from_private_bytes(bytes(range(32)))
NOW = "2026-11-24T22:20:00.000000Z"


def kinds() -> list[SignedMessage]:
    """Return one message of each kind that a device sends."""
    sender = MessageSender(key=DEVICE, log="00000000-0000-4000-8000-000000000000")
    logged = [
        sender.results(),
        sender.drift(),
        sender.quiet_run(),
        sender.alert(),
        sender.quality(),
        sender.health_with_cursor(),
        sender.evicted((1, 2)),
        sender.results(40),
        sender.samples(),
    ]
    return [*logged, sender.state()]


TOPICS = sorted({sent.topic for sent in kinds()})


def addressed() -> list[bytes]:
    """Return payloads, each prefixed by one byte for its topic."""
    return [bytes([TOPICS.index(sent.topic)]) + sent.payload for sent in kinds()]


def opened(topic: str, payload: bytes, key: keys.SigningKey, owner: str) -> VerifiedMessage | None:
    """Sign the payload and return it as the receiver decodes it, or None if it is rejected."""
    try:
        return verify_message(
            topic, payload, [jws.sign(key, topic, payload)], lambda kid: jws.Signer(owner, key.public)
        )
    except MessageRefused:
        return None


def sealed() -> bytes:
    sent = kinds()[0]
    return sealing.seal(keys.encryption_key_of(_ENCRYPTION), sent.topic, sent.jws, sent.payload)


@target("seal", "only what was sealed opens, and nothing else than a refusal", lambda: [sealed()])
def seal(data: bytes) -> None:
    sent = kinds()[0]
    opener = sealing.Opener([_ENCRYPTION])
    # As it came, and with a header that names the key.
    for payload in (data, sealed()[:9] + data):
        delivery = IncomingMessage(sent.topic, payload, (), False, 1, 1, sealed=True)
        try:
            assert sealing.open_message(delivery, opener).payload == sent.payload
        except MessageRefused:
            continue


def readings() -> list[bytes]:
    """Return contents of samples, not deflated."""
    t = np.array([10, 15, 20])
    return [zlib.decompress(sample_content.encode("yes", ["a", "b"], t, [[1.5, None, -2], [0, 0, 1e9]]))]


@target("sample", "accepted readings stay the same when they are encoded again", readings)
def sample(data: bytes) -> None:
    for packed in (data, zlib.compress(data)):
        try:
            first = sample_content.decode(packed, 3)
        except ValueError:
            continue
        columns = [[None if value != value else value for value in column.tolist()] for column in first.columns]
        again = sample_content.decode(sample_content.encode(first.consent, first.fields, first.t, columns), 3)
        assert (again.consent, again.fields, again.t.tolist()) == (first.consent, first.fields, first.t.tolist())
        assert np.array_equal(again.columns, first.columns, equal_nan=True)


@target("topic", "an accepted topic has one spelling only", lambda: [t.encode() for t in TOPICS])
def topic(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        parsed = topics.parse.__wrapped__(text)  # without its cache
    except MessageRefused:
        return
    assert str(parsed) == text


@target("token", "a signature with any header", lambda: [b"{}", b64url_decode(kinds()[0].jws.split("..")[0])])
def token(data: bytes) -> None:
    sent = kinds()[0]
    head = b64url_encode(data)
    signed = f"{head}..{b64url_encode(DEVICE.sign(head.encode() + b'.' + sent.payload))}"
    for text in (signed, data.decode("latin-1"), data.decode("utf-8", "surrogateescape")):
        try:
            jws.verify([text], sent.topic, sent.payload, {DEVICE.public.kid: jws.Signer("pi-07", DEVICE.public)}.get)
        except MessageRefused:
            continue
        header = json.loads(b64url_decode(text.split(".")[0]), object_pairs_hook=unique_keys)
        assert (header["alg"], header["b64"], header["crit"], header["top"]) == ("EdDSA", False, ["b64"], sent.topic)


@target("message", "every reader decodes an accepted signed payload equally", addressed)
def message(data: bytes) -> None:
    name = TOPICS[data[0] % len(TOPICS)] if data else TOPICS[0]
    verified = opened(name, data[1:], DEVICE, "pi-07")
    if verified is not None:
        read = json.loads(data[1:].decode("utf-8"), object_pairs_hook=unique_keys, parse_int=str)
        assert (read["kind"], read["device"]) == (verified.topic.kind, verified.body.device)


def acknowledgements() -> list[bytes]:
    body = {"v": 1, "kind": "ack", "device": "pi-07", "log": "0" * 8 + "-0000-4000-8000-" + "0" * 12, "through": 9}
    return [json.dumps({**body, "missing": missing, "time": TIME}).encode() for missing in ([], [[1, 2], [4, 7]])]


@target("ack", "an acknowledgement deletes nothing beyond its end", acknowledgements)
def ack(data: bytes) -> None:
    verified = opened("outstation/acme/pi-07/ack", data, COLLECTOR, "collector")
    if verified is None:
        return
    assert isinstance(verified.body, AckPayload)
    assert all(1 <= first <= last <= verified.body.through for first, last in verified.body.missing)
    try:
        parse_rfc3339(verified.body.time)
    except ValueError:
        return


@target("key", "an accepted public key has one spelling only", lambda: [DEVICE.public.raw, bytes(32)], 64)
def key(data: bytes) -> None:
    for text in (b64url_encode(data), data.decode("latin-1")):
        try:
            parsed = keys.parse_public_key(text)
        except ValueError:
            continue
        assert parsed.text == text.strip()


def requests() -> list[bytes]:
    return [enrolment_request.build("acme", "pi-07", DEVICE, COLLECTOR, None).split(b"\n")[0]]


@target("request", "an accepted enrolment request is of the key that signed it", requests)
def request(data: bytes) -> None:
    try:
        accepted = enrolment_request.parse(data + b"\n" + jws.sign(DEVICE, "enrolment request", data).encode())
    except MessageRefused:
        return
    assert accepted.key.kid == DEVICE.public.kid
    assert accepted.tls_key != DEVICE.private.public_key()


def heads() -> list[bytes]:
    body = {"v": 1, "kind": "head", "fleet": "acme", "device": "pi-07", "log": "0" * 8 + "-0000-4000-8000-" + "0" * 12}
    state = {"seq": 9, "digest": "x" * 43, "time": TIME, "clock": "synced", "key": DEVICE.public.text}
    return [json.dumps({**body, **state}).encode()]


@target("head", "an accepted log head is of the key that signed it", heads)
def head(data: bytes) -> None:
    signed = {"payload": data.decode("utf-8", "replace"), "jws": jws.sign(DEVICE, "log head", data)}
    try:
        accepted, signer = log_head.verify(json.dumps(signed).encode())
    except MessageRefused:
        return
    assert signer.key.kid == DEVICE.public.kid
    parse_rfc3339(accepted.time)


class Desk:
    """A collector with its own database, shared by all inputs of this process."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = FleetStore(Path(self.folder.name) / "fleet.db")
        self.store.enrol("pi-07", DEVICE.public, replace=False, now=NOW)
        self.collector, self.link = Collector(FLEET, BrokerConfig(), self.store, COLLECTOR), MemoryLink([], window=20)
        self.turns = 0
        atexit.register(self.close)

    def close(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def known(self) -> int:
        """Return the number of messages stored or rejected so far."""
        return self.store.count_messages() + sum(int(row["count"]) for row in self.store.refusals())

    def hand(self, delivery: IncomingMessage) -> None:
        before = self.known()
        self.link.incoming = [delivery]
        self.collector.tick(self.link, 0.0)
        assert not self.collector._held, "the message was neither stored nor refused"
        assert self.known() - before in (0, 1)
        self.turns += 1
        if self.turns % 500 == 0:
            wrong = [problem for problem in audit(self.store).invalid if "does not verify" in problem["reason"]]
            assert not wrong, wrong


@cache
def desk() -> Desk:
    return Desk()


@target("collector", "a signed payload is stored or rejected, and the audit reads stored ones", addressed)
def collector(data: bytes) -> None:
    name = TOPICS[data[0] % len(TOPICS)] if data else TOPICS[0]
    payload = data[1:]
    desk().hand(IncomingMessage(name, payload, (jws.sign(DEVICE, name, payload),), False, 1, 1))
