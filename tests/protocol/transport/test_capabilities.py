"""Capabilities of a broker, read from the bytes of its CONNACK and SUBACK, and sentences on what it lacks."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.capabilities import BrokerUnsuitable
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.workbench.testing.broker import MosquittoBroker

# Identifiers of MQTT 5, 2.2.2.2.
MAXIMUM_QOS, RETAIN, WILDCARD, SHARED = b"\x24", b"\x25", b"\x28", b"\x2a"
PACKET, RECEIVE, ALIASES = b"\x27", b"\x21", b"\x22"
GROUPED, WILD = "$share/g/outstation/acme/+/health", "outstation/acme/+/health"


def connack(properties: bytes, code: int = 0) -> bytes:
    body = bytes([0, code, len(properties)]) + properties
    return bytes([0x20, len(body)]) + body


@contextmanager
def broker_that_says(properties: bytes, *, code: int = 0, suback: int = 1) -> Iterator[BrokerConfig]:
    """Answer one connection with this CONNACK, and each SUBSCRIBE of one filter with this code."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(connack(properties, code))
                while (packet := peer.recv(1000)) and packet[0] == 0x82:
                    peer.sendall(bytes([0x90, 4]) + packet[2:4] + bytes([0, suback]))

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield BrokerConfig(url=f"mqtt://127.0.0.1:{server.getsockname()[1]}")
        thread.join(10)


def test_all_properties_are_read() -> None:
    announced = MAXIMUM_QOS + b"\1" + RETAIN + b"\0" + WILDCARD + b"\0" + SHARED + b"\0"
    announced += (
        PACKET + (5000).to_bytes(4, "big") + RECEIVE + (7).to_bytes(2, "big") + ALIASES + (3).to_bytes(2, "big")
    )
    with broker_that_says(announced) as config:
        link = Link(config, "x")
        read = link.capabilities
        assert (read.max_qos, read.retained, read.wildcard_subscriptions, read.shared_subscriptions) == (1, 0, 0, 0)
        assert (read.max_packet, read.receive_maximum, read.topic_aliases) == (5000, 7, 3)
        assert (link.max_packet, link.window) == (5000, 7)
        link.close()


@pytest.mark.parametrize(
    ("announced", "filters", "words"),
    [
        (SHARED + b"\0", [GROUPED], r"no shared subscriptions.*run one collector without --share"),
        (WILDCARD + b"\0", [WILD], r"no subscription with a wildcard.*another broker"),
        (MAXIMUM_QOS + b"\0", [], r"QoS 0 only.*raise its maximum QoS"),
        (RETAIN + b"\0", [], r"retains nothing.*switch retained messages on"),
    ],
)
def test_a_lack_is_named_with_the_way_out(announced: bytes, filters: list[str], words: str) -> None:
    with broker_that_says(announced) as config, pytest.raises(BrokerUnsuitable, match=words):
        Link(config, "x", subscribe=filters, retains=True)


@pytest.mark.parametrize(("announced", "filters"), [(SHARED + b"\0", [WILD]), (RETAIN + b"\0", ["one/topic"])])
def test_an_unneeded_capability_may_lack(announced: bytes, filters: list[str]) -> None:
    with broker_that_says(announced) as config:
        Link(config, "x", subscribe=filters).close()


@pytest.mark.parametrize(
    ("suback", "words"),
    [
        (0, "granted at QoS 0 only"),
        (0x87, "Not authorized: the broker does not allow it; check its access list"),
        (0x97, "Quota exceeded: the broker allows no more subscriptions"),
        (0x9E, "no shared subscriptions"),
        (0xA2, "no subscription with a wildcard"),
    ],
)
def test_a_subscription_that_is_of_no_use_is_refused(suback: int, words: str) -> None:
    with broker_that_says(b"", suback=suback) as config, pytest.raises(LinkDown, match=words):
        Link(config, "x", subscribe=["one/topic"])


def test_a_will_that_the_broker_cannot_retain_is_explained() -> None:
    with (
        broker_that_says(b"", code=0x9A) as config,
        pytest.raises(LinkDown, match=r"retains nothing.*retain_available"),
    ):
        Link(config, "x", will=OutgoingMessage("a/state", b"gone", retain=True))


def test_mosquitto_without_retained_messages_is_refused(tmp_path: Path) -> None:
    will = OutgoingMessage("a/state", b"gone", retain=True)
    with MosquittoBroker(tmp_path, extra_conf="retain_available false") as broker:
        with pytest.raises(LinkDown, match="retains nothing"):
            Link(BrokerConfig(url=broker.url), "x", will=will)
        with pytest.raises(BrokerUnsuitable, match="retains nothing"):
            Link(BrokerConfig(url=broker.url), "x", retains=True)


def test_mosquitto_that_takes_qos_0_only_is_refused(tmp_path: Path) -> None:
    with (
        MosquittoBroker(tmp_path, extra_conf="max_qos 0") as broker,
        pytest.raises(LinkDown, match="QoS 0 only"),
    ):
        Link(BrokerConfig(url=broker.url), "x", subscribe=["a/b"])
