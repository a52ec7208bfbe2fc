"""Simulation plan: a scenario on several devices, and the ground truth of each row."""

from __future__ import annotations

from collections.abc import Collection

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.config.sources import ReplaySource
from outstation.device.intake.sources.recordings import Playlist
from outstation.foundation.config.toml_files import encode_value
from outstation.foundation.indices import repeat
from outstation.ml.datasets.recordings import Recordings, load
from outstation.workbench.simulate.scenario import SCENARIOS, Scenario, SiteFaults

_MIN_REPLAY_S = 6.0
# Share of a demo's duration; the rest is for starting, learning and the audit.
_REPLAY_SHARE = 0.6


class SimulatedSite(msgspec.Struct, frozen=True):
    """A simulated device: the subject whose recordings it replays (None: all), and its faults."""

    device: str
    subject: int | None
    seed: int
    faults: SiteFaults


class SimulationPlan(msgspec.Struct, frozen=True):
    """Plan of a simulation: `rows` per device at `speed` times the recordings' rate."""

    scenario: Scenario
    sites: tuple[SimulatedSite, ...]
    rows: int
    speed: float

    def device_toml(self, site: SimulatedSite) -> str:
        """Return a device's config after the sections from enrolment: a replay as its stream, and the task on it."""
        scenario, faults = self.scenario, site.faults
        fields = ", ".join(f'{{ name = "{name}", unit = "{unit}" }}' for name, unit in scenario.fields)
        source = ReplaySource(
            file=str(scenario.file),
            subject=site.subject,
            seed=site.seed,
            speed=self.speed,
            rows=self.rows,
            faults=list(faults.faults),
            scenes=list(faults.scenes),
            skip=scenario.skip_rows,
        )
        return (
            '\n[models]\nconfinement = "off"\n'
            '\n[buffer]\ncommit_every = "500 ms"\n'
            f"\n[streams.{scenario.stream}]\nfields = [{fields}]\n"
            f"source = {encode_value(msgspec.to_builtins(source))}\n"
            f'\n[tasks.{scenario.name}]\nstream = "{scenario.stream}"\nbundle = "{scenario.bundle}"\n'
            f'schedule = "every 1 s"\nlearn_windows = {scenario.learn_windows}\n'
        )

    def first_faulty_row(self, site: SimulatedSite) -> int:
        return site.faults.first_fault_row(default=self.rows + 1)

    def row_labels(self, recordings: Recordings, site: SimulatedSite) -> NDArray[np.str_]:
        """Return the label of each row of the replay (rows,)."""
        labels = repeat(np.array(recordings.labels)[recordings.label], np.diff(recordings.starts))
        return np.asarray(labels[self._source_rows(recordings, site)])

    def measured_values(self, recordings: Recordings, site: SimulatedSite) -> NDArray[np.float64]:
        """Return the measured value at each row of the replay (rows,), with the site's loss; NaN where unknown."""
        assert self.scenario.delayed_labels is not None
        column = recordings.columns[self.scenario.delayed_labels.column]
        values, loss = column[self._source_rows(recordings, site)].astype(np.float64), site.faults.loss
        return values if loss is None else values * loss.remaining(np.arange(1, self.rows + 1))

    def metered_labels(self, recordings: Recordings, site: SimulatedSite) -> NDArray[np.float64]:
        """Return the measured values that become labels (rows,); NaN elsewhere."""
        assert self.scenario.delayed_labels is not None
        labels = self.scenario.delayed_labels
        column = recordings.fields.index(labels.filter_field)
        filtered = recordings.rows[self._source_rows(recordings, site), column]
        return np.where(filtered >= labels.filter_min, self.measured_values(recordings, site), np.nan)

    def _source_rows(self, recordings: Recordings, site: SimulatedSite) -> NDArray[np.int64]:
        order = Playlist(recordings, site.subject, site.seed, site.faults.scenes, self.scenario.skip_rows)
        return order.source_rows(self.rows)


def device_names(device_count: int) -> list[str]:
    return [f"pi-{i + 1:02d}" for i in range(device_count)]


def steady_plan(
    device_count: int, seconds: float, speed: float, seed: int, scenario: Scenario, degraded: Collection[str] = ()
) -> SimulationPlan:
    """Plan sites without faults for at least `seconds` at `speed`; `degraded` sites have a faulty sensor."""
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
    """Plan a scenario: its faults occur at the first sites, and the others stay normal."""
    recordings = load(scenario.file)
    subjects = _subjects(recordings)
    sites = tuple(
        SimulatedSite(name, subjects[i % len(subjects)], seed * 1000 + i, scenario.faults_for_site(i))
        for i, name in enumerate(device_names(device_count))
    )
    speed = scenario.total_rows / recordings.rate / max(_MIN_REPLAY_S, _REPLAY_SHARE * duration_s)
    return SimulationPlan(scenario, sites, scenario.total_rows, speed)


def _subjects(recordings: Recordings) -> list[int | None]:
    """Return the subjects whose recordings the sites replay in turn; None: all recordings."""
    subjects: list[int | None] = [*sorted({int(s) for s in recordings.subject})]
    return subjects if recordings.t is None else [None]
