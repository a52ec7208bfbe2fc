"""MQTT 5 connection: bytes in, bytes out. The only importer of paho; owned by one thread.

A link is opened, used and dropped. After LinkDown the caller opens a new one, so no message is queued in memory for the
next connection. `window` and `max_packet` are the broker's limits. The caller enforces them, because only the caller
knows which messages can wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt import MQTTException
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from outstation.foundation.errors import LinkDown, PacketTooLarge, explain
from outstation.protocol.transport import capabilities, tls
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.capabilities import BrokerUnsuitable, Capabilities
from outstation.protocol.transport.packets import (
    JSON,
    PACKET_TOO_LARGE,
    SEALED,
    IncomingMessage,
    OutgoingMessage,
    PublishReceipt,
    decompress,
)
from outstation.protocol.wire.jws import MAX_PAYLOAD

_MAX_WINDOW = 100
KEEP_ALIVE_S = 60
# For a slow mobile network; a broker nearby takes a millisecond.
_CLOSE_TIMEOUT_S = 2.0
_DISCARDED_BYTES = 64 << 10
# In struct tcp_info of linux/tcp.h: bytes acknowledged and received, segments sent and received; bytes sent.
_TCP_COUNTS, _TCP_COUNTS_AT, _TCP_SENT_AT, _TCP_INFO_SIZE = struct.Struct("=QQII"), 120, 200, 216
_HEADER_BYTES = {socket.AF_INET: 52, socket.AF_INET6: 72}
# A TLS handshake that fails has moved certificates both ways.
_FAILED_HANDSHAKE_BYTES = 5_000
# Largest packet the broker may send: a payload with its signature. A longer one would be in memory as a whole.
_MAX_PACKET_BYTES = MAX_PAYLOAD + (64 << 10)
# Errors of paho's parsers on malformed packets.
_PARSE_ERRORS = (ValueError, LookupError, AssertionError, struct.error, MQTTException)
# Exceptions that a signal handler can raise anywhere. paho takes some locks without `with`: interrupted there, its next
# step would deadlock, so there is no next step.
_INTERRUPTS = (KeyboardInterrupt, SystemExit)


class _Handshake(msgspec.Struct):
    """Reason code and words of the CONNACK, and those of each subscription."""

    connected: tuple[int, str] | None = None
    subscribed: list[tuple[int, str]] = msgspec.field(default_factory=list)


class _PahoLog:
    """Logger that keeps paho's last error, such as a TLS alert. Other records stay unformatted."""

    def __init__(self) -> None:
        self.last_error = ""

    def log(self, level: int, text: str, *values: object) -> None:
        if level >= logging.ERROR:
            self.last_error = text % values


class Link:
    """An open connection. Every method raises LinkDown once the connection is lost."""

    def __init__(
        self,
        broker: BrokerConfig,
        client_id: str,
        *,
        subscribe: Sequence[str] = (),
        retain_as_published: Collection[str] = (),
        will: OutgoingMessage | None = None,
        retains: bool = False,
        session_expiry_s: int = 0,
        timeout_s: float = 10.0,
        keep_alive_s: int = KEEP_ALIVE_S,
    ) -> None:
        """Connect and subscribe. Raises LinkDown, BrokerUnsuitable if the broker lacks what this needs.

        `retain_as_published`: filters whose messages show whether the broker retains them. `retains`: messages that
        are sent are retained, as is a last will that says so.
        """
        self.capabilities = Capabilities()
        self._events: list[IncomingMessage | PublishReceipt] = []
        self._lost_reason: str | None = None
        self._is_packet_refused = False
        self._retained_requests = 0
        self._traffic_bytes = 0
        self._handshake = _Handshake()
        self._paho_log = _PahoLog()
        try:
            self._wake_sender, self._wake_receiver = socket.socketpair()
        except OSError as error:
            # No descriptor is left: for now, as with a network that is gone.
            raise LinkDown(f"{broker.shown_url}: {error}") from error
        self._wake_sender.setblocking(False)
        self._wake_receiver.setblocking(False)
        try:
            self._client = self._make_client(broker, client_id, will, timeout_s)
        except BaseException:
            self._wake_sender.close()
            self._wake_receiver.close()
            raise
        try:
            self._connect(broker, session_expiry_s, timeout_s, keep_alive_s)
            retains = retains or (will is not None and will.retain)
            if missing := self.capabilities.find_missing(subscribe, retains=retains):
                raise BrokerUnsuitable(f"{broker.shown_url}: {'; '.join(missing)}")
            if subscribe:
                self._subscribe(subscribe, retain_as_published, timeout_s)
        except BaseException as error:
            if isinstance(error, LinkDown):
                error.traffic_bytes = self.traffic_bytes
            self._release()
            raise

    @property
    def window(self) -> int:
        """Most messages that wait for their receipts at a time."""
        return min(_MAX_WINDOW, self.capabilities.receive_maximum)

    @property
    def max_packet(self) -> int:
        """Bytes of the largest packet that the broker takes."""
        return self.capabilities.max_packet

    @property
    def traffic_bytes(self) -> int:
        """Bytes of this connection on the network, both ways, with TCP/IP headers, as the kernel counts them."""
        self._count_traffic(self._client.socket())
        return self._traffic_bytes

    def _count_traffic(self, sock: Any) -> None:
        if sock is not None and sock.fileno() >= 0:
            with contextlib.suppress(OSError, struct.error):
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
                acked, received, segments_out, segments_in = _TCP_COUNTS.unpack_from(info, _TCP_COUNTS_AT)
                # Kernels before 4.19 do not count what was sent, repetitions included.
                sent = int.from_bytes(info[_TCP_SENT_AT : _TCP_SENT_AT + 8], sys.byteorder)
                headers = (segments_out + segments_in) * _HEADER_BYTES.get(sock.family, 0)
                self._traffic_bytes = max(sent, acked) + received + headers

    def fileno(self) -> int:
        """Return the descriptor of the connection, for select; -1 once it is closed."""
        sock = self._client.socket()
        return -1 if sock is None else int(sock.fileno())

    def send(self, message: OutgoingMessage) -> int:
        """Send one message and return its token; `receive` returns the receipt with this token."""
        properties = Properties(PacketTypes.PUBLISH)
        properties.ContentType = message.content_type
        if message.properties:
            properties.UserProperty = list(message.properties)
        if message.expiry_s is not None:
            properties.MessageExpiryInterval = message.expiry_s
        if message.correlation is not None:
            properties.CorrelationData = message.correlation
        if message.response_topic is not None:
            properties.ResponseTopic = message.response_topic
        try:
            info = self._client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        except _INTERRUPTS:
            self._lost_reason = "interrupted"
            raise
        if info.rc != mqtt.MQTT_ERR_SUCCESS:
            raise LinkDown(self._lost_reason or f"publish failed: {mqtt.error_string(info.rc)}")
        return info.mid

    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]:
        """Return the events of up to `timeout_s`; return early on the first ones or on `wake`."""
        self._tick(timeout_s)
        events, self._events = self._events, []
        if not events and self._lost_reason is not None:
            raise (PacketTooLarge if self._is_packet_refused else LinkDown)(self._lost_reason)
        return events

    def acknowledge(self, delivery: IncomingMessage) -> None:
        """Confirm `delivery` to the broker (PUBACK)."""
        if delivery.qos:
            try:
                self._client.ack(delivery.mid, delivery.qos)
            except _INTERRUPTS:
                self._lost_reason = "interrupted"
                raise

    def request_retained(self, filters: Sequence[str]) -> None:
        """Let the broker send what it retains under `filters`; the messages arrive like any others, marked as retained.

        A shared subscription brings none. Until the broker reads the end of this one, new messages arrive as well.
        """
        self._retained_requests += 1
        self._client.subscribe([(topic, SubscribeOptions(qos=1, retainAsPublished=True)) for topic in filters])
        self._client.unsubscribe(list(filters))

    @property
    def is_request_pending(self) -> bool:
        """Return True until the broker has confirmed each `request_retained`; messages may follow in its window."""
        return self._retained_requests > 0

    def wake(self) -> None:
        """End a waiting `receive`. Safe from any thread."""
        with contextlib.suppress(OSError):
            self._wake_sender.send(b"!")

    def close(self, wait_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Send DISCONNECT and close once the broker has read all that was sent; it drops the Will.

        Where every receipt was received, and there is no Will, `wait_s` may be 0.
        """
        try:
            if self._lost_reason is None:
                self._disconnect(wait_s)
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drop(self) -> None:
        """Cut the connection without DISCONNECT, so that the broker publishes the Will."""
        self._release()

    def _disconnect(self, wait_s: float) -> None:
        """Send DISCONNECT, and wait until the broker closes the connection, up to `wait_s`.

        A socket that is closed with unread receipts resets the connection: the broker then drops what it has not read,
        DISCONNECT included, and publishes the Will.
        """
        deadline = time.monotonic() + wait_s
        try:
            # paho closes its own descriptor as soon as it has written DISCONNECT.
            connection = socket.socket(fileno=os.dup(self.fileno()))
        except OSError:
            self._client.disconnect()
            return
        with connection:
            with contextlib.suppress(OSError):
                self._client.disconnect()
                while self._lost_reason is None and (left := deadline - time.monotonic()) > 0:
                    # Nobody reads them any longer, and the broker may send without end.
                    self._events.clear()
                    self._tick(left)
                connection.shutdown(socket.SHUT_WR)
                readable = select.poll()
                readable.register(connection, select.POLLIN)
                while (left := deadline - time.monotonic()) > 0 and readable.poll(left * 1000):
                    if not connection.recv(_DISCARDED_BYTES):
                        break
            self._count_traffic(connection)

    def _make_client(
        self, broker: BrokerConfig, client_id: str, will: OutgoingMessage | None, timeout_s: float
    ) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        # 0 is unlimited: the caller keeps to the window, and paho would scan its queue on each PUBACK.
        client.max_inflight_messages_set(0)
        client.connect_timeout = timeout_s
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        client.on_disconnect = self._on_disconnect
        client.on_socket_close = lambda _client, _data, sock: self._count_traffic(sock)
        client.enable_logger(self._paho_log)  # type: ignore[arg-type]
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        if broker.username is not None:
            client.username_pw_set(broker.username, broker.password)
        if broker.tls:
            client.tls_set_context(tls.create_context(broker))
        if will is not None:
            properties = Properties(PacketTypes.WILLMESSAGE)
            properties.ContentType = will.content_type
            properties.UserProperty = list(will.properties)
            client.will_set(will.topic, will.payload, 1, will.retain, properties)
        return client

    def _connect(self, broker: BrokerConfig, session_expiry_s: int, timeout_s: float, keep_alive_s: int) -> None:
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = session_expiry_s
        properties.MaximumPacketSize = _MAX_PACKET_BYTES
        try:
            self._client.connect(
                broker.host, broker.port, keep_alive_s, clean_start=session_expiry_s == 0, properties=properties
            )
        except (OSError, ValueError) as error:
            self._traffic_bytes = _FAILED_HANDSHAKE_BYTES if isinstance(error, ssl.SSLError) else 0
            cause = explain(error) if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else str(error)
            raise LinkDown(f"{broker.shown_url}: {cause}") from error
        try:
            self._wait_until(
                lambda: self._handshake.connected is not None, timeout_s, f"{broker.shown_url}: no CONNACK"
            )
        except LinkDown as down:
            raise LinkDown(f"{down}{tls.describe_expiry(broker)}") from None
        code, reason = self._handshake.connected or (0, "")
        if code:
            raise LinkDown(f"{broker.shown_url}: {capabilities.describe_refused_connection(code, reason)}")

    def _subscribe(self, filters: Sequence[str], retain_as_published: Collection[str], timeout_s: float) -> None:
        options = []
        for topic in filters:
            # MQTT 5 forbids No Local on a shared subscription (3.8.3.1).
            option = SubscribeOptions(qos=1, noLocal=not topic.startswith("$share/"))
            option.retainAsPublished = topic in retain_as_published
            options.append((topic, option))
        self._client.subscribe(options)
        self._wait_until(lambda: bool(self._handshake.subscribed), timeout_s, "no SUBACK")
        for topic, answer in zip(filters, self._handshake.subscribed, strict=False):
            if refused := capabilities.describe_refused_subscription(topic, *answer):
                raise LinkDown(refused)

    def _wait_until(self, done: Callable[[], bool], timeout_s: float, timeout_message: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if self._lost_reason is not None and not done():
                raise LinkDown(self._lost_reason)
            if time.monotonic() > deadline:
                raise LinkDown(f"{timeout_message} within {timeout_s:g} s")
            self._tick(0.2)

    def _tick(self, timeout_s: float) -> None:
        """Run paho's loop once on our own poll, so that `wake` can end it."""
        sock: Any = self._client.socket()
        if sock is None:
            self._lost_reason = self._lost_reason or "connection closed"
            return
        # TLS may hold decrypted bytes that poll cannot see.
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            timeout_s = 0.0
        poll = select.poll()
        poll.register(sock, select.POLLIN | (select.POLLOUT if self._client.want_write() else 0))
        poll.register(self._wake_receiver, select.POLLIN)
        ready = dict(poll.poll(0 if self._events else timeout_s * 1000))
        if self._wake_receiver.fileno() in ready:
            with contextlib.suppress(OSError):
                self._wake_receiver.recv(4096)
        for step in (self._client.loop_read, self._client.loop_write, self._client.loop_misc):
            if step == self._client.loop_read and not ready.get(sock.fileno()) and timeout_s:
                continue
            try:
                code = step()
            except _PARSE_ERRORS as error:
                self._lost_reason = self._lost_reason or f"the broker sent a malformed packet: {error}"
                return
            except _INTERRUPTS:
                self._lost_reason = "interrupted"
                raise
            if code not in (mqtt.MQTT_ERR_SUCCESS, mqtt.MQTT_ERR_AGAIN):
                self._lost_reason = self._lost_reason or mqtt.error_string(code)
                return

    def _release(self) -> None:
        self._lost_reason = self._lost_reason or "closed"
        _ = self.traffic_bytes  # the last count, which ends with the socket
        sock = self._client.socket()
        if sock is not None:
            sock.close()
        self._client.on_disconnect = self._client.on_socket_close = None
        # paho closes its own wake-up sockets only after they were reset.
        self._client._reset_sockets()
        self._wake_sender.close()
        self._wake_receiver.close()

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, properties: Any) -> None:
        self._handshake.connected = (reason.value, str(reason)) if reason.is_failure else (0, "")
        self.capabilities = Capabilities.from_properties(properties)

    def _on_subscribe(self, _client: Any, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        self._handshake.subscribed = [(reason.value, str(reason)) for reason in reasons]

    def _on_unsubscribe(self, _client: Any, _data: Any, _mid: int, _reasons: Any, _properties: Any) -> None:
        self._retained_requests -= 1

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._is_packet_refused |= reason.value == PACKET_TOO_LARGE
        self._lost_reason = self._lost_reason or f"connection lost: {self._paho_log.last_error or reason}"

    def _on_publish(self, _client: Any, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        self._events.append(PublishReceipt(mid, reason.value, str(reason)))

    def _on_message(self, _client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
        pairs = getattr(message.properties, "UserProperty", ())
        tokens = tuple(value for name, value in pairs if name == "jws")
        correlation = getattr(message.properties, "CorrelationData", None)
        response_topic = getattr(message.properties, "ResponseTopic", None)
        content_type = getattr(message.properties, "ContentType", JSON)
        payload = decompress(bytes(message.payload), content_type)
        head = (message.topic, payload, tokens, message.retain, message.mid, message.qos)
        self._events.append(IncomingMessage(*head, correlation, response_topic, message.dup, content_type == SEALED))
