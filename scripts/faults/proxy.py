"""TCP proxy with MQTT 5 packet framing that drops, answers, delays, splits, swallows and cuts.

It runs on one thread. A `Rule` decides on each packet of both directions, on that thread, so it must not block.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec

CONNECT, CONNACK, PUBLISH, PUBACK, DISCONNECT = 1, 2, 3, 4, 14
RECEIVE_MAXIMUM, MAXIMUM_PACKET_SIZE = 0x21, 0x27
RECEIVE_MAXIMUM_EXCEEDED, PACKET_TOO_LARGE = 0x93, 0x95
# Bytes of each property a CONNACK may have (MQTT 5, 3.2.2.3); 0: a string or bytes with a two-byte length.
_WIDTHS = {0x11: 4, 0x13: 2, 0x21: 2, 0x22: 2, 0x24: 1, 0x25: 1, 0x27: 4, 0x28: 1, 0x29: 1, 0x2A: 1}
_TEXTS = {0x12: 1, 0x15: 1, 0x16: 1, 0x1A: 1, 0x1C: 1, 0x1F: 1, 0x26: 2}
_READ = 65_536


class Packet(msgspec.Struct, frozen=True):
    """A complete packet; `up` means towards the broker."""

    up: bool
    raw: bytes

    @property
    def kind(self) -> int:
        return self.raw[0] >> 4

    @property
    def topic(self) -> str:
        """Topic of a PUBLISH."""
        at = _varint(self.raw, 1)[1]
        size = int.from_bytes(self.raw[at : at + 2], "big")
        return self.raw[at + 2 : at + 2 + size].decode()

    @property
    def mid(self) -> int:
        """Packet identifier of a PUBLISH with QoS 1, or of a PUBACK."""
        at = _varint(self.raw, 1)[1]
        if self.kind == PUBLISH:
            at += 2 + int.from_bytes(self.raw[at : at + 2], "big")
        return int.from_bytes(self.raw[at : at + 2], "big")


class Cut(Exception):
    """Raised by a rule with the last bytes for the sender; the connection is then cut."""


# Bytes to forward, and bytes to answer the sender with.
Rule = Callable[[Packet], tuple[bytes, bytes]]


def passing(packet: Packet) -> tuple[bytes, bytes]:
    return packet.raw, b""


def puback(mid: int, code: int) -> bytes:
    return bytes([PUBACK << 4, 3]) + mid.to_bytes(2, "big") + bytes([code])


def disconnect(code: int) -> bytes:
    return bytes([DISCONNECT << 4, 1, code])


def with_limit(connack: bytes, name: int, value: int) -> bytes:
    """Return the CONNACK with this limit in place of the broker's own."""
    at = _varint(connack, 1)[1]
    flags, (size, at) = connack[at : at + 2], _varint(connack, at + 2)
    retained = b"".join(prop for prop in _properties(connack[at : at + size]) if prop[0] != name)
    properties = retained + bytes([name]) + value.to_bytes(_WIDTHS[name], "big")
    body = flags + _encoded(len(properties)) + properties
    return bytes([CONNACK << 4]) + _encoded(len(body)) + body


class Proxy:
    """Proxy that listens on `port` of 127.0.0.1 and connects each client to `behind`. Attributes may change at any
    time.

    `refusing` closes new connections at once. `held` delays all traffic until it is False again. `piece` is the number
    of bytes forwarded at a time, with `pause_s` between; 0 forwards complete packets.
    """

    def __init__(self, behind: int) -> None:
        self.rule: Rule = passing
        self.refusing = self.held = False
        self.piece, self.pause_s = 0, 0.0
        self._behind = behind
        self._open: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server: asyncio.Server = self._do(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])

    @contextlib.contextmanager
    def ruled(self, rule: Rule) -> Iterator[None]:
        """Apply `rule` during the block."""
        self.rule = rule
        try:
            yield
        finally:
            self.rule = passing

    def cut(self) -> None:
        """Reset every connection."""
        self._loop.call_soon_threadsafe(self._cut)

    def swallow(self) -> None:
        """Make current connections half-open: they stay connected, and no more data arrives."""
        for connection in list(self._open):
            connection.swallowed = True

    def close(self) -> None:
        self._do(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _cut(self) -> None:
        for connection in list(self._open):
            connection.abort()

    async def _shut(self) -> None:
        self._server.close()
        self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        try:
            answers, onward = await asyncio.open_connection("127.0.0.1", self._behind)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(self, writer, onward)
        self._open.add(connection)
        try:
            await asyncio.gather(connection.pump(reader, up=True), connection.pump(answers, up=False))
        except (OSError, EOFError, Cut, asyncio.CancelledError):
            # Cancelled by `close`; asyncio would report the connection's task as an error.
            pass
        finally:
            self._open.discard(connection)
            connection.abort()


class _Connection:
    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, broker: asyncio.StreamWriter) -> None:
        self.swallowed = False
        self._proxy, self._client, self._broker = proxy, client, broker

    def abort(self) -> None:
        for writer in (self._client, self._broker):
            writer.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, *, up: bool) -> None:
        """Forward until one side closes; data sent before are still forwarded."""
        onward, back = (self._broker, self._client) if up else (self._client, self._broker)
        waiting = b""
        while more := await reader.read(_READ):
            waiting += more
            while (size := _whole(waiting)) and not self.swallowed:
                packet, waiting = Packet(up, waiting[:size]), waiting[size:]
                await self._pass(packet, onward, back)
            if self.swallowed:
                waiting = b""
        if self.swallowed and not up:
            # The broker closed its side; the client does not notice.
            await asyncio.sleep(3600)
        raise EOFError

    async def _pass(self, packet: Packet, onward: asyncio.StreamWriter, back: asyncio.StreamWriter) -> None:
        proxy = self._proxy
        while proxy.held:
            await asyncio.sleep(0.02)
        try:
            going, answer = proxy.rule(packet)
        except Cut as cut:
            back.write(cut.args[0])
            await back.drain()
            raise
        if back.is_closing() or onward.is_closing():
            raise EOFError
        if answer:
            back.write(answer)
        step = proxy.piece or max(1, len(going))
        for at in range(0, len(going), step):
            onward.write(going[at : at + step])
            await onward.drain()
            if proxy.piece:
                await asyncio.sleep(proxy.pause_s)


def _whole(data: bytes) -> int:
    """Return the size of the packet that `data` begins with, or 0 if it is incomplete."""
    if len(data) < 2 or (all(byte & 0x80 for byte in data[1:5]) and len(data) < 5):
        return 0
    size, at = _varint(data, 1)
    return at + size if len(data) >= at + size else 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode a variable byte integer (MQTT 5, 1.5.5), and return it with its end position."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
        shift += 7


def _encoded(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _properties(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        end = at + 1 + _WIDTHS.get(data[at], 0)
        for _ in range(_TEXTS.get(data[at], 0)):
            end += 2 + int.from_bytes(data[end : end + 2], "big")
        yield data[at:end]
        at = end
