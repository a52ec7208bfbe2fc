"""How many drift windows were how, over time: a bounded number of equal spans, wider the longer the time."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from agent.drift.reporting.parsed_message import WindowReport

MAX_SPANS = 96
_FIRST_WIDTH_US = 60_000_000


class HistorySpan(msgspec.Struct):
    """`drift`, `fault`: the devices that had such a window; `accuracy`: the sum of so many `estimates`."""

    windows: int = 0
    drifting_devices: set[str] = msgspec.field(default_factory=set)
    faulty_devices: set[str] = msgspec.field(default_factory=set)
    accuracy_sum: float = 0.0
    estimate_count: int = 0

    def merge(self, other: HistorySpan) -> None:
        self.windows += other.windows
        self.drifting_devices |= other.drifting_devices
        self.faulty_devices |= other.faulty_devices
        self.accuracy_sum += other.accuracy_sum
        self.estimate_count += other.estimate_count


class DriftHistory:
    """Windows may come in any order."""

    def __init__(self) -> None:
        self._width = _FIRST_WIDTH_US
        self._spans: dict[int, HistorySpan] = {}

    def add(self, device: str, window: WindowReport) -> None:
        one = HistorySpan(windows=1)
        if window.state in ("drift", "fault"):
            (one.drifting_devices if window.state == "drift" else one.faulty_devices).add(device)
        if window.accuracy is not None:
            one.accuracy_sum, one.estimate_count = window.accuracy[0], 1
        self._spans.setdefault(window.t[1] // self._width, HistorySpan()).merge(one)
        while max(self._spans) - min(self._spans) >= MAX_SPANS:
            self._widen()

    def __iter__(self) -> Iterator[tuple[int, int, HistorySpan]]:
        """(from, to, what was in it) of each span in which there was a window; epoch µs."""
        for at in sorted(self._spans):
            yield at * self._width, (at + 1) * self._width, self._spans[at]

    def _widen(self) -> None:
        narrow, self._spans, self._width = self._spans, {}, self._width * 2
        for at, span in narrow.items():
            self._spans.setdefault(at // 2, HistorySpan()).merge(span)
