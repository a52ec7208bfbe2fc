"""Fleet-wide drift as alerts of the collector's own.

Looked for in what is stored, so that restarted collectors and several beside each other come to the same alerts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from agent import clock
from agent.clock import Now
from agent.fleet.database.ingest import Arrival
from agent.fleet.database.projection import wide_alert
from agent.fleet.database.store import FleetStore
from agent.fleet.drift import fleet_wide
from agent.fleet.drift.fleet_wide import Onset, Watched
from agent.wire.messages import Alerts

EVERY_S = 60.0
# What was usual longer ago says little of the fleet as it is now. A clock that is a day ahead of ours is wrong.
BACK_US, AHEAD_US = 30 * 86_400_000_000, 86_400_000_000
MOST_NAMED = 8


class Lookout:
    """Looks at most once a minute, and only after a device raised or cleared a drift alert.

    Where another collector may have stored that alert, it looks each minute.
    """

    def __init__(self, store: FleetStore) -> None:
        self._store = store
        self._due, self._next_s = True, 0.0

    def stored(self, arrivals: Iterable[Arrival]) -> None:
        bodies = (arrival.message.body for arrival in arrivals)
        self._due |= any(isinstance(body, Alerts) and body.alert == "drift" for body in bodies)

    def look(self, now: Now) -> list[str]:
        """Raise and clear what there is to; what was raised, in words. Raises StorageError: then look again."""
        if not (self._due or self._store.shared) or now.boot_s < self._next_s:
            return []
        self._next_s = now.boot_s + EVERY_S
        watched, onsets = self._told(now)
        at, second = clock.rfc3339(now.wall_us), now.wall_us // 1_000_000
        open_now = {(task, subject): seq for task, subject, seq in self._store.open_wide()}
        said = []
        for task, subject, since, summary in _found(watched, onsets):
            if (task, subject) not in open_now:
                self._store.raise_alert(wide_alert(task, subject, since, summary, at))
                said.append(summary)
        for (task, subject), since in open_now.items():
            if not fleet_wide.still_moved(subject, watched.get(task, {}), onsets.get(task, [])):
                summary = f"{task}: {subject} drifts on few devices only."
                self._store.raise_alert(wide_alert(task, subject, since, summary, at, cleared=max(second, since + 1)))
        self._due = False
        return said

    def _told(self, now: Now) -> tuple[dict[str, dict[str, Watched]], dict[str, list[Onset]]]:
        """By task."""
        span = (clock.rfc3339(now.wall_us - BACK_US), clock.rfc3339(now.wall_us + AHEAD_US))
        watched: dict[str, dict[str, Watched]] = {}
        for task, device, first, last, windows in self._store.watched(*span):
            with contextlib.suppress(ValueError):  # of a moment that no calendar has
                watched.setdefault(task, {})[device] = Watched(clock.epoch_us(first), clock.epoch_us(last), windows)
        onsets: dict[str, list[Onset]] = {}
        for task, device, subject, at, is_open, times in self._store.drift_alerts(*span):
            with contextlib.suppress(ValueError):
                onset = Onset(device, subject, clock.epoch_us(at), bool(is_open), max(0, times - 1))
                onsets.setdefault(task, []).append(onset)
        return watched, onsets


def _found(
    watched: dict[str, dict[str, Watched]], onsets: dict[str, list[Onset]]
) -> Iterator[tuple[str, str, int, str]]:
    """(task, subject, second it began, sentence)."""
    for task, devices in watched.items():
        for one in fleet_wide.find(devices, onsets.get(task, [])):
            names = ", ".join(one.devices[:MOST_NAMED])
            more = f" and {len(one.devices) - MOST_NAMED} more" if len(one.devices) > MOST_NAMED else ""
            yield task, one.subject, one.since // 1_000_000, f"{task}: {one.sentence}. First on {names}{more}."
