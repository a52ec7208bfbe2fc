"""What `outstation demo` plays: recordings, a task over them, and what goes wrong at which site.

A scenario says it in rows of the replay: first those a site learns from, then as many as show that nothing is wrong,
then those after which something is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.config import Fault, Scene
from agent.errors import UsageError
from agent.model.bundle import builtin


class Loss(msgspec.Struct, frozen=True):
    """What is measured falls by a share `amount`, evenly over `over` rows from `from_row` on, and stays there."""

    from_row: int
    over: int
    amount: float

    def left(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n,) share of the value that is left at each row."""
        return 1 - self.amount * np.clip((rows - self.from_row) / self.over, 0.0, 1.0)


class Measured(msgspec.Struct, frozen=True):
    """Labels that come by themselves: `column` of the recordings, each `every` rows, `delay` rows later.

    Only rows where `field` is at least `least`. `unit` is that of the values.
    """

    column: str
    unit: str
    every: int
    delay: int
    field: str
    least: float


class Fate(msgspec.Struct, frozen=True):
    """What goes wrong at a site: with its sensor, with what the recordings are of, or with what is measured."""

    faults: tuple[Fault, ...] = ()
    scenes: tuple[Scene, ...] = ()
    loss: Loss | None = None

    def begins(self, never: int) -> int:
        """The first row at which anything is wrong; `never` where nothing is."""
        rows = [fault.from_row for fault in self.faults] + [scene.from_row for scene in self.scenes[1:]]
        return min([*rows, *([self.loss.from_row] if self.loss else [])], default=never)


class Scenario(msgspec.Struct, frozen=True):
    """`fates` are those of the first sites, `usual` that of the others; `skip` rows of the file are left out.

    `worse` is that of a site whose sensor is out of order from the beginning, and whose model gets on all the same.

    `kind` is the bundle's; `learn`: drift windows a site learns from; `learned`: rows until it has, and has shown that
    nothing is wrong; `tail`: rows at the end that may fill no model window.
    """

    name: str
    kind: Literal["classify", "regress", "anomaly"]
    about: str
    stream: str
    fields: tuple[tuple[str, str], ...]
    bundle: str
    learned: int
    rows: int
    tail: int
    fates: tuple[Fate, ...]
    usual: Fate = msgspec.field(default_factory=Fate)
    worse: Fate = msgspec.field(default_factory=Fate)
    learn: int = 40
    skip: int = 0
    measured: Measured | None = None

    @property
    def file(self) -> Path:
        return builtin.recordings() / f"{self.name}.npz"

    def fate(self, site: int) -> Fate:
        return self.fates[site] if site < len(self.fates) else self.usual


def named(name: str) -> Scenario:
    """Raises UsageError."""
    if name not in SCENARIOS:
        raise UsageError(f"there is no scenario {name!r}; there is {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


def _exercise() -> Scenario:
    # 40 drift windows of 20 model windows of 100 rows, and the rows at the end of each recording that fill none; then
    # 30,000 in which nothing is wrong.
    begin = 90_000 + 30_000
    return Scenario(
        name="exercise",
        kind="classify",
        about="four people's shoulder exercises, recorded with a smartwatch (50 Hz)",
        stream="watch",
        fields=(("ax", "g"), ("ay", "g"), ("az", "g"), ("wx", "rad/s"), ("wy", "rad/s"), ("wz", "rad/s")),
        bundle="exercise",
        learned=begin,
        rows=begin + 50_000,
        tail=2_000,
        fates=(
            Fate(faults=(Fault(kind="gain", fields=["ax", "ay", "az"], from_row=begin, amount=0.6),)),
            Fate(faults=(Fault(kind="stuck", fields=["wy"], from_row=begin, amount=0.25),)),
        ),
        # A gyroscope set to another range than the reader thinks.
        worse=Fate(faults=(Fault(kind="gain", fields=["wx", "wy", "wz"], from_row=1, amount=4.0),)),
    )


def _solar() -> Scenario:
    # Days of 96 rows, from 1 May 2013 on: 40 to learn from, 10 that show nothing, and 70 in which dust settles.
    day = 96
    begin = (40 + 10) * day
    return Scenario(
        name="solar",
        kind="regress",
        about="the weather over a photovoltaic system, and its AC power as labels that come a day later (15 minutes)",
        stream="weather",
        fields=(("ghi", "W/m2"), ("ghi_clear", "W/m2"), ("temp_air", "degC")),
        bundle="solar",
        learned=begin,
        rows=begin + 70 * day,
        tail=0,
        fates=(
            Fate(loss=Loss(from_row=begin, over=40 * day, amount=0.35)),
            Fate(faults=(Fault(kind="stuck", fields=["ghi"], from_row=begin + 30 * day + 50, amount=412.5),)),
        ),
        worse=Fate(faults=(Fault(kind="gain", fields=["ghi"], from_row=1, amount=0.7),)),
        skip=320 * day,
        measured=Measured(column="power", unit="W", every=4, delay=day, field="ghi_clear", least=20.0),
    )


def _machine() -> Scenario:
    # 60 drift windows of 20 model windows of 5 rows, and the rows at the end of each recording that fill none: the load
    # wanders, and 40 windows do not know all of it.
    begin = 7_000 + 3_000
    bands = [f"mel{i}" for i in range(32)]
    sound = Scene(column="fault", value="none")
    return Scenario(
        name="machine",
        kind="anomaly",
        about="the sound of four motors with fans, computed, as log-mel rows (31 a second)",
        stream="microphone",
        fields=tuple((name, "dB") for name in bands),
        bundle="machine",
        learned=begin,
        rows=begin + 3_000,
        tail=400,
        fates=(
            Fate(scenes=(sound, Scene(column="fault", value="bearing, slight", from_row=begin))),
            Fate(scenes=(sound,), faults=(Fault(kind="offset", fields=bands, from_row=begin, amount=-3.0),)),
        ),
        usual=Fate(scenes=(sound,)),
        worse=Fate(scenes=(sound,), faults=(Fault(kind="offset", fields=bands, from_row=1, amount=-3.0),)),
        learn=60,
    )


SCENARIOS = {one.name: one for one in (_exercise(), _solar(), _machine())}
