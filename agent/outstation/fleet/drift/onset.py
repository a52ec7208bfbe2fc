"""Drift onsets: the order in which fields of devices began to drift."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from outstation.foundation import clock
from outstation.ml.drift.reporting.parsed_message import WindowReport


class DriftEpisode(msgspec.Struct, frozen=True):
    """A drift alarm of one subject at one device. Times are epoch µs; `began`: when its CUSUM last left zero."""

    device: str
    subject: str
    test: str  # mean | spread | other
    began: int
    alarmed: int
    ended: int | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the episode as reports show it, with times as RFC 3339."""
        return {
            "device": self.device,
            "field": self.subject,
            "test": self.test,
            "started": clock.to_rfc3339(self.began),
            "alarmed": clock.to_rfc3339(self.alarmed),
            "ended": None if self.ended is None else clock.to_rfc3339(self.ended),
        }


class EpisodeTracker:
    """The last episode of each subject of one device, in constant memory; windows come in order of time."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._rising_since: dict[str, int] = {}
        self.last: dict[str, DriftEpisode] = {}
        self.alarm_counts: dict[str, int] = {}  # By subject.

    @property
    def total_alarms(self) -> int:
        return sum(self.alarm_counts.values())

    def add(self, window: WindowReport) -> None:
        # A run of quiet windows tells only its last sums: what rises then may have begun to in the last window.
        begin = window.t[0] if window.windows == 1 else window.ends[-2]
        for name, subject in window.subjects.items():
            if subject.state == "fault":
                # The device does not advance its CUSUM meanwhile.
                continue
            rising = max(subject.mean, subject.spread) > 0
            if rising:
                self._rising_since.setdefault(name, begin)
            open_now = name in self.last and self.last[name].ended is None
            if subject.state == "drift" and not open_now:
                test = "other" if not rising else "mean" if subject.mean >= subject.spread else "spread"
                began = self._rising_since.get(name, window.t[0])
                self.last[name] = DriftEpisode(self._device, name, test, began, window.t[1])
                self.alarm_counts[name] = self.alarm_counts.get(name, 0) + 1
            elif subject.state == "ok" and open_now:
                self.last[name] = replace(self.last[name], ended=window.t[1])
            if not rising:
                self._rising_since.pop(name, None)


def sort_by_onset(episodes: list[DriftEpisode]) -> list[DriftEpisode]:
    """Sort open episodes before ended ones, each by alarm, then by onset.

    The alarm orders better than the onset: a CUSUM that chance keeps just above zero seems to have begun long ago.
    """
    return sorted(episodes, key=lambda e: (e.ended is not None, e.alarmed, e.began, e.device, e.subject))
