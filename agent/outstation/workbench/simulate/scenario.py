"""Scenarios of `outstation demo`: recordings, a task on them, and faults at some sites.

A scenario counts in rows of the replay. First a site learns its reference, then it runs without a fault, then its
faults begin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.config.sources import RecordingFilter, ReplayFault
from outstation.foundation.errors import UsageError
from outstation.ml.model.bundle import builtin


class GradualLoss(msgspec.Struct, frozen=True):
    """The measured value falls by the share `amount`, evenly over `ramp_rows` from `from_row` on, and stays there."""

    from_row: int
    ramp_rows: int
    amount: float

    def remaining(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the remaining share of the value at each row (n,)."""
        return 1 - self.amount * np.clip((rows - self.from_row) / self.ramp_rows, 0.0, 1.0)


class DelayedLabels(msgspec.Struct, frozen=True):
    """Labels that arrive later: `column` of the recordings each `every_rows`, after `delay_rows`.

    Only rows where `filter_field` is at least `filter_min` get a label. `unit` is the unit of the values.
    """

    column: str
    unit: str
    every_rows: int
    delay_rows: int
    filter_field: str
    filter_min: float


class SiteFaults(msgspec.Struct, frozen=True):
    """Faults of a site: sensor faults, replaced recordings, or a loss of the measured value."""

    faults: tuple[ReplayFault, ...] = ()
    scenes: tuple[RecordingFilter, ...] = ()
    loss: GradualLoss | None = None

    def first_fault_row(self, default: int) -> int:
        """Return the first row with any fault; `default` without one."""
        rows = [fault.from_row for fault in self.faults] + [scene.from_row for scene in self.scenes[1:]]
        return min([*rows, *([self.loss.from_row] if self.loss else [])], default=default)


class Scenario(msgspec.Struct, frozen=True):
    """A demo scenario; `kind` is that of its bundle.

    `faults_by_site` are the faults of the first sites, `default_faults` those of the others. `initially_faulty`: a
    sensor is faulty from the first row on, and the model works all the same. `baseline_rows`: rows to learn from and to
    run without a fault. `tail_rows`: rows at the end that may not fill a model window. `skip_rows` of the file are left
    out.
    """

    name: str
    kind: Literal["classify", "regress", "anomaly"]
    description: str
    stream: str
    fields: tuple[tuple[str, str], ...]
    bundle: str
    baseline_rows: int
    total_rows: int
    tail_rows: int
    faults_by_site: tuple[SiteFaults, ...]
    default_faults: SiteFaults = msgspec.field(default_factory=SiteFaults)
    initially_faulty: SiteFaults = msgspec.field(default_factory=SiteFaults)
    learn_windows: int = 40
    skip_rows: int = 0
    delayed_labels: DelayedLabels | None = None

    @property
    def file(self) -> Path:
        return builtin.recordings_dir() / f"{self.name}.npz"

    def faults_for_site(self, site: int) -> SiteFaults:
        return self.faults_by_site[site] if site < len(self.faults_by_site) else self.default_faults


def from_name(name: str) -> Scenario:
    """Return a scenario. Raises UsageError for an unknown name."""
    if name not in SCENARIOS:
        raise UsageError(f"unknown scenario {name!r}; known scenarios are {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


# 40 drift windows of 20 model windows of 100 rows, plus rows at the end of each recording that fill no window; then
# 30,000 rows without a fault.
_EXERCISE_BEGIN = 90_000 + 30_000
_EXERCISE = Scenario(
    name="exercise",
    kind="classify",
    description="four people's shoulder exercises, recorded with a smartwatch (50 Hz)",
    stream="watch",
    fields=(("ax", "g"), ("ay", "g"), ("az", "g"), ("wx", "rad/s"), ("wy", "rad/s"), ("wz", "rad/s")),
    bundle="exercise",
    baseline_rows=_EXERCISE_BEGIN,
    total_rows=_EXERCISE_BEGIN + 50_000,
    tail_rows=2_000,
    faults_by_site=(
        SiteFaults(faults=(ReplayFault(kind="gain", fields=["ax", "ay", "az"], from_row=_EXERCISE_BEGIN, amount=0.6),)),
        SiteFaults(faults=(ReplayFault(kind="stuck", fields=["wy"], from_row=_EXERCISE_BEGIN, amount=0.25),)),
    ),
    # A gyroscope set to another range than its driver assumes.
    initially_faulty=SiteFaults(faults=(ReplayFault(kind="gain", fields=["wx", "wy", "wz"], from_row=1, amount=4.0),)),
)

# Days of 96 rows from 1 May 2013 on: 40 to learn from, 10 without a fault, and 70 in which dust settles.
_DAY_ROWS = 96
_SOLAR_BEGIN = (40 + 10) * _DAY_ROWS
_SOLAR = Scenario(
    name="solar",
    kind="regress",
    description="the weather over a photovoltaic system, and its AC power as labels a day later (15 minutes)",
    stream="weather",
    fields=(("ghi", "W/m2"), ("ghi_clear", "W/m2"), ("temp_air", "degC")),
    bundle="solar",
    baseline_rows=_SOLAR_BEGIN,
    total_rows=_SOLAR_BEGIN + 70 * _DAY_ROWS,
    tail_rows=0,
    faults_by_site=(
        SiteFaults(loss=GradualLoss(from_row=_SOLAR_BEGIN, ramp_rows=40 * _DAY_ROWS, amount=0.35)),
        SiteFaults(
            faults=(
                ReplayFault(kind="stuck", fields=["ghi"], from_row=_SOLAR_BEGIN + 30 * _DAY_ROWS + 50, amount=412.5),
            )
        ),
    ),
    initially_faulty=SiteFaults(faults=(ReplayFault(kind="gain", fields=["ghi"], from_row=1, amount=0.7),)),
    skip_rows=320 * _DAY_ROWS,
    delayed_labels=DelayedLabels(
        column="power", unit="W", every_rows=4, delay_rows=_DAY_ROWS, filter_field="ghi_clear", filter_min=20.0
    ),
)

# 60 drift windows of 20 model windows of 5 rows, plus rows at the end of each recording that fill no window. The
# load varies slowly, and 40 windows do not cover its range.
_MACHINE_BEGIN = 7_000 + 3_000
_BANDS = [f"mel{i}" for i in range(32)]
_NO_FAULT = RecordingFilter(column="fault", value="none")
_MACHINE = Scenario(
    name="machine",
    kind="anomaly",
    description="the sound of four motors with fans, computed, as log-mel rows (31 a second)",
    stream="microphone",
    fields=tuple((name, "dB") for name in _BANDS),
    bundle="machine",
    baseline_rows=_MACHINE_BEGIN,
    total_rows=_MACHINE_BEGIN + 3_000,
    tail_rows=400,
    faults_by_site=(
        SiteFaults(
            scenes=(_NO_FAULT, RecordingFilter(column="fault", value="bearing, slight", from_row=_MACHINE_BEGIN))
        ),
        SiteFaults(
            scenes=(_NO_FAULT,),
            faults=(ReplayFault(kind="offset", fields=_BANDS, from_row=_MACHINE_BEGIN, amount=-3.0),),
        ),
    ),
    default_faults=SiteFaults(scenes=(_NO_FAULT,)),
    initially_faulty=SiteFaults(
        scenes=(_NO_FAULT,), faults=(ReplayFault(kind="offset", fields=_BANDS, from_row=1, amount=-3.0),)
    ),
    learn_windows=60,
)

SCENARIOS = {scenario.name: scenario for scenario in (_EXERCISE, _SOLAR, _MACHINE)}
