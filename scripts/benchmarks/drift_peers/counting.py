"""Alarm counts by window and subject, and their summary statistics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.ml.drift import DriftWindowResult

Flags = NDArray[np.bool_]  # (windows, subjects)


class DetectionDelays(msgspec.Struct):
    """Detection delays of trials with a change, in windows; 1 means the first window, None means a miss.

    `stated` tells of each trial whether the detector had said beforehand that it finds such a change, if it says so.
    """

    delays: list[int | None] = msgspec.field(default_factory=list)
    stated: list[bool] = msgspec.field(default_factory=list)

    def add(self, raised: Flags, subjects: Sequence[int]) -> None:
        hits = np.flatnonzero(raised[:, subjects].any(1))
        self.delays.append(int(hits[0]) + 1 if len(hits) else None)

    @property
    def median(self) -> float:
        """Return the median delay, infinite if half of the changes or more were missed."""
        return statistics.median(float("inf") if delay is None else delay for delay in self.delays)

    def summarize(self, within: int) -> str:
        """Return the median delay and the misses for trials of the given number of windows."""
        median = f"{self.median:g}" if math.isfinite(self.median) else f"> {within}"
        return median + (f" / {self.missed:.0f} %" if self.missed else "")

    @property
    def missed(self) -> float:
        """Return the share of misses in per cent."""
        return 100 * sum(delay is None for delay in self.delays) / len(self.delays)

    @property
    def broken_statements(self) -> int:
        """Return the misses of changes that were to be found."""
        return sum(delay is None and stated for delay, stated in zip(self.delays, self.stated, strict=True))


class Row(msgspec.Struct):
    """Results of one detector: windows without a change, false alarms among them, and delays by change."""

    name: str
    quiet: int = 0
    alarmed: int = 0
    delays: dict[str, DetectionDelays] = msgspec.field(default_factory=dict)

    def add_quiet(self, raised: Flags) -> None:
        self.quiet += len(raised)
        self.alarmed += int(raised.any(1).sum())

    def add(self, change: str, raised: Flags, subjects: Collection[int]) -> None:
        self.delays.setdefault(change, DetectionDelays()).add(raised, list(subjects))

    @property
    def per_1000(self) -> float:
        return 1000 * self.alarmed / max(1, self.quiet)


def raised(verdicts: Sequence[DriftWindowResult], subjects: Mapping[str, int], kinds: str = "drift fault") -> Flags:
    """Return where alerts of these kinds were raised, (windows, subjects + 1); the last column is any other subject."""
    out = np.zeros((sum(verdict.windows for verdict in verdicts), len(subjects) + 1), np.bool_)
    window = 0
    for verdict in verdicts:
        # A run of quiet windows has no alerts.
        for alert in verdict.alerts:
            if alert.state == "raised" and alert.alert in kinds:
                out[window, subjects.get(alert.subject, len(subjects))] = True
        window += verdict.windows
    return out
