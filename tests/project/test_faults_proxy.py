from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage, PublishReceipt
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.patience import TIMEOUT_S
from scripts.faults import proxy
from scripts.faults.proxy import Packet, Proxy

TOPIC = "outstation/acme/pi-07/health"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def line(broker: MosquittoBroker) -> Iterator[Proxy]:
    made = Proxy(broker.port)
    yield made
    made.close()


def connect(line: Proxy, client: str = "pi-07") -> Link:
    return Link(BrokerConfig(url=f"mqtt://127.0.0.1:{line.port}"), client, timeout_s=TIMEOUT_S)


def answer(link: Link, payload: bytes = b"{}") -> int:
    token = link.send(OutgoingMessage(TOPIC, payload))
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        for event in link.receive(1.0):
            if isinstance(event, PublishReceipt) and event.token == token:
                return event.code
    raise AssertionError("no answer")


@given(st.integers(0, 268_435_455), st.binary(max_size=3))
def test_a_length_is_read_as_it_was_written(value: int, rest: bytes) -> None:
    text = proxy._encoded(value)
    assert proxy._varint(text + rest, 0) == (value, len(text))


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5), st.integers(1, 50))
def test_packets_are_reassembled_from_any_pieces(bodies: list[bytes], piece: int) -> None:
    sent = [bytes([0x30]) + proxy._encoded(len(body)) + body for body in bodies]
    stream, waiting, packets = b"".join(sent), b"", []
    for at in range(0, len(stream), piece):
        waiting += stream[at : at + piece]
        while size := proxy._whole(waiting):
            packets.append(waiting[:size])
            waiting = waiting[size:]
    assert packets == sent


def test_a_limit_replaces_the_brokers_own_and_leaves_its_other_properties(line: Proxy) -> None:
    def limiting(packet: Packet) -> tuple[bytes, bytes]:
        if packet.kind == proxy.CONNACK:
            return proxy.with_limit(proxy.with_limit(packet.raw, 0x27, 999), 0x21, 2), b""
        return packet.raw, b""

    with line.ruled(limiting):
        link = connect(line)
    assert (link.window, link.max_packet) == (2, 999)
    link.close()


def test_passed_packets_are_unchanged_and_answered_ones_stay_here(line: Proxy) -> None:
    def refusing(packet: Packet) -> tuple[bytes, bytes]:
        if packet.up and packet.kind == proxy.PUBLISH and packet.topic == TOPIC:
            return b"", proxy.puback(packet.mid, 0x87)
        return packet.raw, b""

    link = connect(line)
    assert answer(link) == 0x10
    with line.ruled(refusing):
        assert answer(link, bytes(5000)) == 0x87
    link.close()


def test_a_cut_connection_is_down_at_once_and_a_swallowed_one_stays_silent(line: Proxy) -> None:
    cut = connect(line)
    line.cut()
    with pytest.raises(LinkDown):
        answer(cut)
    cut.drop()
    swallowed = connect(line)
    line.swallow()
    swallowed.send(OutgoingMessage(TOPIC, b"{}"))
    assert swallowed.receive(0.3) == []
    swallowed.drop()
    link = connect(line)
    assert answer(link) == 0x10
    link.close()


def test_what_was_held_goes_on_later_and_pieces_arrive_as_one_packet(line: Proxy) -> None:
    link = connect(line)
    line.held, line.piece = True, 3
    release, began = threading.Timer(0.3, setattr, (line, "held", False)), time.monotonic()
    release.start()
    assert answer(link, bytes(200)) == 0x10
    assert time.monotonic() - began >= 0.3
    release.join()
    link.close()


def test_nobody_is_let_in_while_it_refuses_or_the_broker_is_away(line: Proxy) -> None:
    line.refusing = True
    with pytest.raises(LinkDown):
        connect(line)
    line.refusing = False
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = Proxy(probe.getsockname()[1])
        with pytest.raises(LinkDown):
            connect(nowhere)
        nowhere.close()
    connect(line).close()
