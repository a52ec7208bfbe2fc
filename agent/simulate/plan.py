"""A scenario on so many devices, and what was true at each of them, row by row."""

from __future__ import annotations

from collections.abc import Collection

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.device.intake.sources.recordings import Playlist, Recordings, load
from agent.simulate.scenario import SCENARIOS, Fate, Scenario

_FASTEST_S = 6.0
# Of the time a demo takes; the rest is for starting, learning to the end, and the audit.
_PLAYING = 0.6


class Site(msgspec.Struct, frozen=True):
    """A simulated device: whose recordings it replays (None: of all), and what goes wrong there."""

    device: str
    subject: int | None
    seed: int
    fate: Fate


class Plan(msgspec.Struct, frozen=True):
    """What the fleet does: `rows` per device at `speed` times the recordings' rate."""

    scenario: Scenario
    sites: tuple[Site, ...]
    rows: int
    speed: float

    def clean(self, site: Site) -> int:
        """The first row at which something is wrong there."""
        return site.fate.begins(never=self.rows + 1)

    def named(self, recordings: Recordings, site: Site) -> NDArray[np.str_]:
        """(rows,) the label of each row of the replay."""
        each = np.repeat(np.array(recordings.labels)[recordings.label], np.diff(recordings.starts))
        return np.asarray(each[self._places(recordings, site)])

    def measured(self, recordings: Recordings, site: Site) -> NDArray[np.float64]:
        """(rows,) what was measured there at each row of the replay, with what it lost; NaN unknown."""
        assert self.scenario.measured is not None
        values = recordings.more[self.scenario.measured.column][self._places(recordings, site)].astype(np.float64)
        loss = site.fate.loss
        return values if loss is None else values * loss.left(np.arange(1, self.rows + 1))

    def metered(self, recordings: Recordings, site: Site) -> NDArray[np.float64]:
        """The same where it is worth a label; else NaN."""
        assert self.scenario.measured is not None
        shown = recordings.rows[self._places(recordings, site), recordings.fields.index(self.scenario.measured.field)]
        return np.where(shown >= self.scenario.measured.least, self.measured(recordings, site), np.nan)

    def _places(self, recordings: Recordings, site: Site) -> NDArray[np.int64]:
        order = Playlist(recordings, site.subject, site.seed, site.fate.scenes, self.scenario.skip)
        return order.places(self.rows)


def names(devices: int) -> list[str]:
    return [f"pi-{i + 1:02d}" for i in range(devices)]


def steady(
    devices: int, seconds: float, speed: float, seed: int, scenario: Scenario, worse: Collection[str] = ()
) -> Plan:
    """All sites alike for at least so many seconds at `speed`, but for the `worse` ones, where a sensor is out of order
    from the first row on."""
    recordings = load(scenario.file)
    subjects = _subjects(recordings)
    sites = tuple(
        Site(name, subjects[i % len(subjects)], seed * 1000 + i, scenario.worse if name in worse else scenario.usual)
        for i, name in enumerate(names(devices))
    )
    return Plan(scenario, sites, round(seconds * recordings.rate * speed), speed)


def plan(devices: int, duration_s: float, seed: int = 0, scenario: Scenario = SCENARIOS["exercise"]) -> Plan:
    """The scenario on so many sites: something goes wrong at the first ones, the others stay as they are."""
    recordings = load(scenario.file)
    subjects = _subjects(recordings)
    sites = tuple(
        Site(name, subjects[i % len(subjects)], seed * 1000 + i, scenario.fate(i))
        for i, name in enumerate(names(devices))
    )
    return Plan(
        scenario, sites, scenario.rows, scenario.rows / recordings.rate / max(_FASTEST_S, _PLAYING * duration_s)
    )


def _subjects(recordings: Recordings) -> list[int | None]:
    """Whose recordings the sites play in turn; None: those of all."""
    people: list[int | None] = [*sorted({int(s) for s in recordings.subject})]
    return people if recordings.t is None else [None]
