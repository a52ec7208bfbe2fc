"""What moved first: the order in which sums left zero and alarms followed."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from agent.drift.reporting.parsed_message import WindowReport


class DriftEpisode(msgspec.Struct, frozen=True):
    """A drift alarm of one subject at one device. Times are epoch µs: `began` is when its sum last left zero."""

    device: str
    subject: str
    test: str  # mean | spread | other
    began: int
    alarmed: int
    ended: int | None = None


class EpisodeTracker:
    """The last episode of each subject of one device, in constant memory; windows come in the order of their time."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._rising_since: dict[str, int] = {}
        self.last: dict[str, DriftEpisode] = {}
        self.alarm_counts: dict[str, int] = {}  # of each subject, in all

    @property
    def total_alarms(self) -> int:
        return sum(self.alarm_counts.values())

    def add(self, window: WindowReport) -> None:
        for name, told in window.subjects.items():
            if told.state == "fault":
                # Its sums stand still meanwhile.
                continue
            rising = max(told.mean, told.spread) > 0
            if rising:
                self._rising_since.setdefault(name, window.t[0])
            open_now = name in self.last and self.last[name].ended is None
            if told.state == "drift" and not open_now:
                test = "other" if not rising else "mean" if told.mean >= told.spread else "spread"
                began = self._rising_since.get(name, window.t[0])
                self.last[name] = DriftEpisode(self._device, name, test, began, window.t[1])
                self.alarm_counts[name] = self.alarm_counts.get(name, 0) + 1
            elif told.state == "ok" and open_now:
                self.last[name] = replace(self.last[name], ended=window.t[1])
            if not rising:
                self._rising_since.pop(name, None)


def sort_by_onset(episodes: list[DriftEpisode]) -> list[DriftEpisode]:
    """Those that go on before those that are over; each by when it was noticed, then by when it began.

    A sum that chance keeps just above zero seems to have begun long ago; the alarm tells better what came first.
    """
    return sorted(episodes, key=lambda e: (e.ended is not None, e.alarmed, e.began, e.device, e.subject))
