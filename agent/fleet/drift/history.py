"""How many drift windows were how, over time: a bounded number of equal spans, wider the longer the time."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from agent.drift.reporting.parsed_message import Reported

MOST = 96
_FIRST_WIDTH_US = 60_000_000


class Span(msgspec.Struct):
    """`drift`, `fault`: the devices that had such a window; `accuracy`: the sum of so many `estimates`."""

    windows: int = 0
    drift: set[str] = msgspec.field(default_factory=set)
    fault: set[str] = msgspec.field(default_factory=set)
    accuracy: float = 0.0
    estimates: int = 0

    def join(self, other: Span) -> None:
        self.windows += other.windows
        self.drift |= other.drift
        self.fault |= other.fault
        self.accuracy += other.accuracy
        self.estimates += other.estimates


class History:
    """Windows may come in any order."""

    def __init__(self) -> None:
        self._width = _FIRST_WIDTH_US
        self._spans: dict[int, Span] = {}

    def add(self, device: str, window: Reported) -> None:
        one = Span(windows=1)
        if window.state in ("drift", "fault"):
            (one.drift if window.state == "drift" else one.fault).add(device)
        if window.accuracy is not None:
            one.accuracy, one.estimates = window.accuracy[0], 1
        self._spans.setdefault(window.t[1] // self._width, Span()).join(one)
        while max(self._spans) - min(self._spans) >= MOST:
            self._widen()

    def __iter__(self) -> Iterator[tuple[int, int, Span]]:
        """(from, to, what was in it) of each span in which there was a window; epoch µs."""
        for at in sorted(self._spans):
            yield at * self._width, (at + 1) * self._width, self._spans[at]

    def _widen(self) -> None:
        narrow, self._spans, self._width = self._spans, {}, self._width * 2
        for at, span in narrow.items():
            self._spans.setdefault(at // 2, Span()).join(span)
