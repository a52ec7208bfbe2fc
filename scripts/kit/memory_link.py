"""MQTT link that delivers messages from memory and drops what is sent, to drive a collector without a broker."""

from __future__ import annotations

from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt


class MemoryLink:
    """Link that delivers `incoming`, at most `batch` messages at a time."""

    def __init__(self, incoming: list[IncomingMessage], *, batch: int = 500, window: int = 1 << 16) -> None:
        self.incoming, self.window, self._batch = incoming, window, batch

    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]:
        delivered, self.incoming = self.incoming[: self._batch], self.incoming[self._batch :]
        return list(delivered)

    def send(self, message: OutgoingMessage) -> int:
        return 1

    def acknowledge(self, delivery: IncomingMessage) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...
