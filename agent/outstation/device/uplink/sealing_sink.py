"""Sink that seals every message before another sink sends it, see `outstation.protocol.transport.sealing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from outstation.device.uplink.sink import OpenSink, Receipt, Sink
from outstation.protocol.transport import sealing
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.transport.sealing import OVERHEAD_BYTES
from outstation.protocol.wire.keys import EncryptionKey, encryption_key_of, parse_encryption_key


class SealingSink:
    """`find_key` returns the collector's key in force, which a trust document may replace at any time.

    While it returns None the window is closed: messages wait, and the device hears of the next document.
    """

    def __init__(self, sink: Sink, find_key: Callable[[], EncryptionKey | None]) -> None:
        self._sink, self._find_key = sink, find_key
        self.acknowledge, self.wake = sink.acknowledge, sink.wake
        self.close, self.drop = sink.close, sink.drop

    @property
    def window(self) -> int:
        return 0 if self._find_key() is None else self._sink.window

    @property
    def max_bytes(self) -> int:
        return self._sink.max_bytes

    @property
    def traffic_bytes(self) -> int:
        return self._sink.traffic_bytes

    def measure(self, message: OutgoingMessage) -> int:
        return self._sink.measure(message) + OVERHEAD_BYTES

    def send(self, message: OutgoingMessage) -> int:
        return self._sink.send(_seal(message, self._find_key()))

    def receive(self, timeout_s: float) -> list[IncomingMessage | Receipt]:
        return self._sink.receive(timeout_s)


def open_sealing_sink(
    open_sink: OpenSink, find_key: Callable[[], EncryptionKey | None], topics: Sequence[str], will: OutgoingMessage
) -> SealingSink:
    """Open the sink underneath with a sealed last will. Raises LinkDown."""
    return SealingSink(open_sink(topics, _seal(will, find_key())), find_key)


def _seal(message: OutgoingMessage, collector: EncryptionKey | None) -> OutgoingMessage:
    if message.reader:
        return sealing.seal_message(message, parse_encryption_key(message.reader))
    # Only the last will may come without a key, as a connection has one: nobody can open it.
    return sealing.seal_message(message, collector or encryption_key_of(X25519PrivateKey.generate()))
