"""MQTT link against a real broker: receipts, window, Will, wake-up, lost connections."""

from __future__ import annotations

import contextlib
import gc
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from outstation.foundation.errors import LinkDown
from outstation.protocol.transport import mqtt
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import NO_SUBSCRIBERS, IncomingMessage, OutgoingMessage, PublishReceipt
from outstation.workbench.testing.broker import MosquittoBroker, free_port


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(tmp_path, extra_conf="max_inflight_messages 7\nmax_packet_size 5000") as running:
        yield running


def settings(broker: MosquittoBroker) -> BrokerConfig:
    return BrokerConfig(url=broker.url)


def collect(
    link: Link, enough: Callable[[list[IncomingMessage | PublishReceipt]], bool]
) -> list[IncomingMessage | PublishReceipt]:
    """Everything that comes until `enough`; fails after a minute."""
    events: list[IncomingMessage | PublishReceipt] = []
    deadline = time.monotonic() + 60
    while not enough(events):
        assert time.monotonic() < deadline, f"only {events}"
        events += link.receive(0.2)
    return events


def deliveries(link: Link, n: int) -> list[IncomingMessage]:
    events = collect(link, lambda all_: sum(isinstance(e, IncomingMessage) for e in all_) >= n)
    return [event for event in events if isinstance(event, IncomingMessage)]


def receipts(link: Link, n: int) -> list[PublishReceipt]:
    events = collect(link, lambda all_: sum(isinstance(e, PublishReceipt) for e in all_) >= n)
    return [event for event in events if isinstance(event, PublishReceipt)]


def test_payload_and_properties_arrive_unchanged(broker: MosquittoBroker) -> None:
    reader = Link(settings(broker), "reader", subscribe=["a/+"])
    writer = Link(settings(broker), "writer")
    payload = bytes(range(256))
    token = writer.send(OutgoingMessage("a/b", payload, (("jws", "x..y"), ("id", "1"), ("jws", "z"))))
    [receipt] = receipts(writer, 1)
    assert (receipt.token, receipt.is_accepted, receipt.code) == (token, True, 0)
    [delivery] = deliveries(reader, 1)
    assert (delivery.topic, delivery.payload, delivery.tokens) == ("a/b", payload, ("x..y", "z"))
    assert (delivery.retained, delivery.qos) == (False, 1)
    reader.close()
    writer.close()


def test_a_receipt_reports_no_subscribers(broker: MosquittoBroker) -> None:
    writer = Link(settings(broker), "writer")
    writer.send(OutgoingMessage("a/b", b"x"))
    assert receipts(writer, 1)[0].code == NO_SUBSCRIBERS
    writer.close()


def test_the_brokers_window_and_packet_size_are_read(broker: MosquittoBroker) -> None:
    link = Link(settings(broker), "writer")
    assert (link.window, link.max_packet) == (7, 5000)
    link.close()


def test_an_oversized_retained_message_is_skipped(tmp_path: Path) -> None:
    with MosquittoBroker(tmp_path) as broker:
        writer = Link(settings(broker), "writer")
        for topic, size in (("a/long", 8 << 20), ("a/longest that verifies", 1 << 20)):
            writer.send(OutgoingMessage(topic, bytes(size), retain=True))
        assert all(receipt.is_accepted for receipt in receipts(writer, 2))
        reader = Link(settings(broker), "reader", subscribe=["a/+"])
        assert [(message.topic, len(message.payload)) for message in deliveries(reader, 1)] == [
            ("a/longest that verifies", 1 << 20)
        ]
        writer.send(OutgoingMessage("a/long", bytes(8 << 20)))
        writer.send(OutgoingMessage("a/b", b"x"))
        assert all(receipt.is_accepted for receipt in receipts(writer, 2))
        assert [message.topic for message in deliveries(reader, 1)] == ["a/b"]
        reader.close()
        writer.close()


def test_only_unconfirmed_messages_are_redelivered(
    broker: MosquittoBroker,
) -> None:
    first = Link(settings(broker), "reader", subscribe=["a"], session_expiry_s=60)
    writer = Link(settings(broker), "writer")
    for body in (b"1", b"2", b"3"):
        writer.send(OutgoingMessage("a", body))
    receipts(writer, 3)
    got = deliveries(first, 3)
    first.acknowledge(got[0])
    first.close()
    second = Link(settings(broker), "reader", subscribe=["a"], session_expiry_s=60)
    assert [delivery.payload for delivery in deliveries(second, 2)] == [b"2", b"3"]
    second.close()
    writer.close()


def test_messages_beyond_the_window_follow_confirmations(broker: MosquittoBroker) -> None:
    reader = Link(settings(broker), "reader", subscribe=["a"])
    writer = Link(settings(broker), "writer")
    for i in range(20):
        writer.send(OutgoingMessage("a", b"%d" % i))
        receipts(writer, 1)
    held = deliveries(reader, 7)
    assert reader.receive(0.3) == []
    for delivery in held:
        reader.acknowledge(delivery)
    assert [d.payload for d in deliveries(reader, 7)] == [b"%d" % i for i in range(7, 14)]
    reader.close()
    writer.close()


def test_a_dropped_connection_publishes_the_will_and_a_closed_one_does_not(broker: MosquittoBroker) -> None:
    reader = Link(settings(broker), "reader", subscribe=["will/+"])
    will = OutgoingMessage("will/a", b"gone", (("jws", "w"),), retain=True)
    Link(settings(broker), "polite", will=OutgoingMessage("will/b", b"never")).close()
    Link(settings(broker), "device", will=will).drop()
    [delivery] = deliveries(reader, 1)
    assert (delivery.topic, delivery.payload, delivery.tokens) == ("will/a", b"gone", ("w",))
    assert reader.receive(0.3) == []
    reader.close()
    late = Link(settings(broker), "late", subscribe=["will/+"])
    assert [delivery.retained for delivery in deliveries(late, 1)] == [True]
    late.close()


def test_all_that_was_sent_before_a_close_arrives_and_no_will_although_receipts_are_unread(tmp_path: Path) -> None:
    with MosquittoBroker(tmp_path, extra_conf="max_inflight_messages 100") as broker:
        reader = Link(settings(broker), "reader", subscribe=["a/+"])
        for i in range(10):
            with Link(settings(broker), "writer", will=OutgoingMessage("a/will", b"gone")) as writer:
                sent = [OutgoingMessage(f"a/{i}", bytes([n]) * 1000) for n in range(50)]
                for message in sent:
                    writer.send(message)
            arrived = deliveries(reader, len(sent))
            assert [(each.topic, each.payload) for each in arrived] == [(each.topic, each.payload) for each in sent]
            for each in arrived:
                reader.acknowledge(each)
        reader.close()


def test_the_bytes_of_a_closed_link_are_counted_to_the_end(broker: MosquittoBroker) -> None:
    with Link(settings(broker), "writer") as link:
        for _ in range(5):
            link.send(OutgoingMessage("a", bytes(4000)))
    assert link.traffic_bytes > 20_000


def test_a_broker_that_reads_nothing_and_sends_without_end_delays_a_close_for_a_limited_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mqtt, "_CLOSE_TIMEOUT_S", 0.3)

    def flood() -> None:
        with contextlib.suppress(OSError):
            while True:
                peers[0].sendall((b"\x30\x04\x00\x01a\x00") * 1000)

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        accepting = threading.Thread(target=lambda: peers.append(server.accept()[0]))
        peers: list[socket.socket] = []
        accepting.start()
        monkeypatch.setattr(Link, "_wait_until", lambda *_: accepting.join())
        link = Link(BrokerConfig(url=f"mqtt://127.0.0.1:{server.getsockname()[1]}"), "x")
        for payload in (b"", bytes(20 << 20)):
            link.send(OutgoingMessage("a", payload))
        flooding = threading.Thread(target=flood)
        flooding.start()
        link.close()
        assert link.fileno() == -1
        # Those of the last read.
        assert len(link._events) <= 2
        flooding.join()
        peers[0].close()


def test_wake_ends_a_waiting_receive_from_another_thread(broker: MosquittoBroker) -> None:
    link = Link(settings(broker), "reader")
    start = time.monotonic()
    threading.Timer(0.2, link.wake).start()
    assert link.receive(60.0) == []
    assert 0.1 < time.monotonic() - start < 30
    link.close()


def test_a_killed_broker_is_link_down_after_its_last_message(broker: MosquittoBroker) -> None:
    link = Link(settings(broker), "reader")
    link.send(OutgoingMessage("a", bytes(4000)))
    broker.kill()

    def until_down() -> None:
        for _ in range(50):
            link.receive(0.2)

    with pytest.raises(LinkDown):
        until_down()
    # What was sent since nobody asked is counted, too.
    assert link.traffic_bytes > 4000
    with pytest.raises(LinkDown):
        link.send(OutgoingMessage("a", b"x"))
    link.close()


def test_a_second_connection_with_the_same_id_ends_the_first(broker: MosquittoBroker) -> None:
    first = Link(settings(broker), "twin")
    second = Link(settings(broker), "twin")

    def until_down() -> None:
        for _ in range(50):
            first.receive(0.2)

    with pytest.raises(LinkDown, match=r"(?i)taken over"):
        until_down()
    first.close()
    second.close()


def test_a_forbidden_publish_has_a_rejecting_receipt(tmp_path: Path) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic read #\n", encoding="ascii")
    acl.chmod(0o600)
    with MosquittoBroker(tmp_path, extra_conf=f"acl_file {acl}") as broker:
        link = Link(settings(broker), "writer")
        link.send(OutgoingMessage("a", b"x"))
        [receipt] = receipts(link, 1)
        assert (receipt.is_accepted, receipt.reason) == (False, "Not authorized")
        link.close()


def test_missing_and_silent_brokers_are_link_down_in_time(tmp_path: Path) -> None:
    with pytest.raises(LinkDown, match="127"):
        Link(BrokerConfig(url=f"mqtt://127.0.0.1:{free_port()}"), "x")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(LinkDown, match="no CONNACK within"):
            Link(BrokerConfig(url=f"mqtt://127.0.0.1:{silent.getsockname()[1]}"), "x", timeout_s=0.5)
        assert time.monotonic() - start < 30
        with pytest.raises(LinkDown):
            Link(BrokerConfig(url=f"mqtts://127.0.0.1:{free_port()}"), "x", timeout_s=0.5)


def test_an_interrupted_link_closes_its_sockets(broker: MosquittoBroker) -> None:
    """paho holds a lock at some of them: a Ctrl-C there left `fleet devices watch` waiting for itself."""
    writer = Link(settings(broker), "writer")
    writer.send(OutgoingMessage("a/b", b"x", retain=True))
    receipts(writer, 1)
    writer.close()
    done: set[str] = set()
    while True:
        link = Link(settings(broker), "reader", subscribe=["a/+"])
        with interrupted_beyond(done) as interrupted, contextlib.suppress(KeyboardInterrupt):
            [delivery] = deliveries(link, 1)
            link.acknowledge(delivery)
            link.send(OutgoingMessage("a/c", b"y"))
            receipts(link, 1)
        link.close()
        if not interrupted:
            break
    assert len(done) > 150


@contextlib.contextmanager
def interrupted_beyond(done: set[str]) -> Iterator[list[str]]:
    """Raises KeyboardInterrupt as the first line of paho's that is not `done` begins, and yields which."""
    where: list[str] = []

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if "paho" not in frame.f_code.co_filename:
            return None
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if event == "line" and line not in done and not where:
            done.add(line)
            where.append(line)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    # Or it may be a line of some client's that is thrown away just then.
    gc.disable()
    sys.settrace(trace)
    try:
        yield where
    finally:
        sys.settrace(before)
        gc.enable()


def test_garbage_instead_of_a_connack_is_link_down() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(LinkDown):
            Link(BrokerConfig(url=f"mqtt://127.0.0.1:{server.getsockname()[1]}"), "x", timeout_s=1.0)
        thread.join()


def test_password_authentication(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    # PBKDF2-SHA512 of "secret", 101 rounds, zero salt: mosquitto_passwd's format 7.
    passwords.write_text(f"me:{hashed(b'secret')}\n", encoding="ascii")
    passwords.chmod(0o600)
    # The later of two settings counts.
    conf = f"allow_anonymous false\npassword_file {passwords}"
    with MosquittoBroker(tmp_path, extra_conf=conf) as broker:
        with pytest.raises(LinkDown, match="refused: Not authorized"):
            Link(settings(broker), "x")
        Link(BrokerConfig(url=broker.url, username="me", password="secret"), "x").close()


def hashed(password: bytes) -> str:
    import base64
    import hashlib

    salt = bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password, salt, 101)
    return f"$7$101${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def test_each_of_a_thousand_messages_has_one_receipt(broker: MosquittoBroker) -> None:
    link = Link(settings(broker), "writer")
    tokens: set[int] = set()
    answered: list[int] = []
    for _ in range(1000):
        while len(tokens) >= link.window:
            done = [event.token for event in link.receive(1.0) if isinstance(event, PublishReceipt)]
            tokens -= set(done)
            answered += done
        tokens.add(link.send(OutgoingMessage("a", b"x" * 100)))
    answered += [receipt.token for receipt in receipts(link, len(tokens))]
    assert len(answered) == len(set(answered)) == 1000
    link.close()


CONNACK = bytes([0x20, 3, 0, 0, 0])


@pytest.mark.parametrize(
    "packet",
    [
        b"\x30\x06\x00\x03\xff\xfe\xfd\x00",
        b"\x30\x02\x00\xff",
        b"\x32\x03\x00\x01a",
        b"\x30\x07\x00\x01a\x03\x26\x00\x05",
        b"\x30\x05\x00\x01a\x7f\x01",
        b"\x40\x01\x00",
        b"\x90\x02\x00\x01",
        b"\xff\xff\xff\xff\xff",
        b"\x00\x00",
    ],
)
def test_a_malformed_packet_only_ends_the_connection(packet: bytes) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(CONNACK + packet)
                peer.shutdown(socket.SHUT_WR)
                peer.recv(1000)

        thread = threading.Thread(target=answer)
        thread.start()
        link = Link(BrokerConfig(url=f"mqtt://127.0.0.1:{server.getsockname()[1]}"), "x", timeout_s=60.0)
        with pytest.raises(LinkDown):
            collect(link, lambda _: False)
        link.close()
        thread.join()


def test_a_lack_of_descriptors_is_a_lost_link(broker: MosquittoBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", refuse)
    with pytest.raises(LinkDown, match="Too many open files"):
        Link(BrokerConfig(url=broker.url), "none-left")
