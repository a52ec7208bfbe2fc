"""Sink of another package: any error is a lost link, so the daemon opens it again and keeps its messages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from outstation.device.uplink.sink import OpenSink, Receipt, Sink
from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage

P = ParamSpec("P")
T = TypeVar("T")


class ForeignSink:
    """Every method but `wake`, `close` and `drop` raises LinkDown; these three raise nothing."""

    def __init__(self, open_sink: OpenSink, subscriptions: Sequence[str], will: OutgoingMessage) -> None:
        """Open the sink. Raises LinkDown."""
        self._sink: Sink = _call(open_sink, subscriptions, will)

    @property
    def window(self) -> int:
        return _call(lambda: int(self._sink.window))

    @property
    def max_bytes(self) -> int:
        return _call(lambda: int(self._sink.max_bytes))

    @property
    def traffic_bytes(self) -> int:
        # Read after the link was lost, too.
        with contextlib.suppress(Exception):
            return int(self._sink.traffic_bytes)
        return 0

    def measure(self, message: OutgoingMessage) -> int:
        return _call(self._sink.measure, message)

    def send(self, message: OutgoingMessage) -> int:
        return _call(self._sink.send, message)

    def receive(self, timeout_s: float) -> list[IncomingMessage | Receipt]:
        return _call(self._sink.receive, timeout_s)

    def acknowledge(self, delivery: IncomingMessage) -> None:
        _call(self._sink.acknowledge, delivery)

    def wake(self) -> None:
        with contextlib.suppress(Exception):
            self._sink.wake()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._sink.close()

    def drop(self) -> None:
        with contextlib.suppress(Exception):
            self._sink.drop()


def _call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return function(*args, **kwargs)
    except LinkDown:
        raise
    except Exception as error:
        raise LinkDown(f"the sink failed: {type(error).__name__}: {error}") from error
