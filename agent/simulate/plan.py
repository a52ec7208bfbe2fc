"""A scenario on so many devices, and what was true at each of them, row by row."""

from __future__ import annotations

from collections.abc import Collection

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.datasets.recordings import Recordings, load
from agent.device.intake.sources.recordings import Playlist
from agent.simulate.scenario import SCENARIOS, Scenario, SiteFaults

_MIN_REPLAY_S = 6.0
# Of the time a demo takes; the rest is for starting, learning to the end, and the audit.
_REPLAY_SHARE = 0.6


class SimulatedSite(msgspec.Struct, frozen=True):
    """A simulated device: whose recordings it replays (None: of all), and what goes wrong there."""

    device: str
    subject: int | None
    seed: int
    fate: SiteFaults


class SimulationPlan(msgspec.Struct, frozen=True):
    """What the fleet does: `rows` per device at `speed` times the recordings' rate."""

    scenario: Scenario
    sites: tuple[SimulatedSite, ...]
    rows: int
    speed: float

    def first_faulty_row(self, site: SimulatedSite) -> int:
        """The first row at which something is wrong there."""
        return site.fate.first_fault_row(default=self.rows + 1)

    def row_labels(self, recordings: Recordings, site: SimulatedSite) -> NDArray[np.str_]:
        """(rows,) the label of each row of the replay."""
        each = np.repeat(np.array(recordings.labels)[recordings.label], np.diff(recordings.starts))
        return np.asarray(each[self._source_rows(recordings, site)])

    def measured_values(self, recordings: Recordings, site: SimulatedSite) -> NDArray[np.float64]:
        """(rows,) what was measured there at each row of the replay, with what it lost; NaN unknown."""
        assert self.scenario.delayed_labels is not None
        values = recordings.columns[self.scenario.delayed_labels.column][self._source_rows(recordings, site)].astype(
            np.float64
        )
        loss = site.fate.loss
        return values if loss is None else values * loss.remaining(np.arange(1, self.rows + 1))

    def metered_labels(self, recordings: Recordings, site: SimulatedSite) -> NDArray[np.float64]:
        """The same where it is worth a label; else NaN."""
        assert self.scenario.delayed_labels is not None
        shown = recordings.rows[
            self._source_rows(recordings, site), recordings.fields.index(self.scenario.delayed_labels.filter_field)
        ]
        return np.where(
            shown >= self.scenario.delayed_labels.filter_min, self.measured_values(recordings, site), np.nan
        )

    def _source_rows(self, recordings: Recordings, site: SimulatedSite) -> NDArray[np.int64]:
        order = Playlist(recordings, site.subject, site.seed, site.fate.scenes, self.scenario.skip_rows)
        return order.source_rows(self.rows)


def device_names(device_count: int) -> list[str]:
    return [f"pi-{i + 1:02d}" for i in range(device_count)]


def steady_plan(
    device_count: int, seconds: float, speed: float, seed: int, scenario: Scenario, degraded: Collection[str] = ()
) -> SimulationPlan:
    """All sites alike for at least so many seconds at `speed`, but for the `worse` ones, where a sensor is out of order
    from the first row on."""
    recordings = load(scenario.file)
    subjects = _subjects(recordings)
    sites = tuple(
        SimulatedSite(
            name,
            subjects[i % len(subjects)],
            seed * 1000 + i,
            scenario.initially_faulty if name in degraded else scenario.default_faults,
        )
        for i, name in enumerate(device_names(device_count))
    )
    return SimulationPlan(scenario, sites, round(seconds * recordings.rate * speed), speed)


def demo_plan(
    device_count: int, duration_s: float, seed: int = 0, scenario: Scenario = SCENARIOS["exercise"]
) -> SimulationPlan:
    """The scenario on so many sites: something goes wrong at the first ones, the others stay as they are."""
    recordings = load(scenario.file)
    subjects = _subjects(recordings)
    sites = tuple(
        SimulatedSite(name, subjects[i % len(subjects)], seed * 1000 + i, scenario.faults_for_site(i))
        for i, name in enumerate(device_names(device_count))
    )
    return SimulationPlan(
        scenario,
        sites,
        scenario.total_rows,
        scenario.total_rows / recordings.rate / max(_MIN_REPLAY_S, _REPLAY_SHARE * duration_s),
    )


def _subjects(recordings: Recordings) -> list[int | None]:
    """Whose recordings the sites play in turn; None: those of all."""
    people: list[int | None] = [*sorted({int(s) for s in recordings.subject})]
    return people if recordings.t is None else [None]
