"""Sensor whose rows the device timestamps, so that the timestamps can be checked against true time.

The harness's clock is the truth: it records when a row was sent and answered, and the device timestamps it in between.
Row numbers follow the order of sending, since one client sends the rows in sequence.
"""

from __future__ import annotations

import time
from random import Random
from typing import TYPE_CHECKING

import msgspec

from outstation.protocol.client import Client
from outstation.workbench.testing.fleet import field_tables
from scripts.faults.clock import Clock
from scripts.faults.producer import FIELDS, SensorThread
from scripts.faults.world import DEVICE, World

if TYPE_CHECKING:
    from scripts.faults.oracle import Verdict

STREAM = TASK = "stamped"
EVERY_S = 0.2
_STEP_S = 0.04
_DATED = """
    SELECT row, t_best, t_error_us, time_quality FROM results_dated
    WHERE device = ? AND task = ? AND row > ? ORDER BY row
"""


class Dated(msgspec.Struct):
    """Timestamp of one row at the collector, as `outstation.fleet.database.timestamps` defines it."""

    row: int
    t_best: int
    t_error_us: int | None
    time_quality: str


class Truth(msgspec.Struct):
    """True receive time of each row as (sent, answered), epoch µs; row numbers start at 1."""

    rows: list[tuple[int, int]] = msgspec.field(default_factory=list)
    offset_us: int = msgspec.field(default_factory=lambda: (time.time_ns() - time.monotonic_ns()) // 1000)

    def now_us(self) -> int:
        return self.offset_us + time.monotonic_ns() // 1000

    def misdated(self, dated_rows: list[Dated]) -> list[str]:
        """Describe the rows whose true time is outside their bound."""
        wrong = []
        for dated in dated_rows:
            if dated.t_error_us is None:
                continue
            sent, answered = self.rows[dated.row - 1]
            early, late = sent - dated.t_best - dated.t_error_us, dated.t_best - dated.t_error_us - answered
            if early > 0 or late > 0:
                off = f"{-early / 1e6:+.1f}" if early > 0 else f"{late / 1e6:+.1f}"
                bound = f"a bound of {dated.t_error_us / 1e6:.1f} s"
                wrong.append(f"row {dated.row}, {dated.time_quality}, is {off} s beyond {bound}")
        return wrong


class Stamped(SensorThread):
    """The sensor and the promises about its rows; a companion of the world."""

    def __init__(self, world: World, rng: Random) -> None:
        super().__init__(world.device.data_dir / "intake.sock", STREAM)
        self.truth = Truth()
        self._world, self._rng = world, rng
        self._judged = 0
        self._counted = (time.monotonic(), 0, 0)
        bundle = world.folder / "bundle" / "bundle"
        names = ", ".join(field_tables(FIELDS))
        world.device.append_config(
            f"[streams.{STREAM}]\nfields = [{names}]\n"
            f'[tasks.{TASK}]\nstream = "{STREAM}"\nbundle = "{bundle}"\nschedule = "every {EVERY_S * 1000:.0f} ms"\n'
        )

    def waiting(self) -> str:
        """Describe what is still to come; empty if nothing is."""
        dated_rows = self._dated_rows()
        if dated_rows and dated_rows[-1].row > len(self.truth.rows):
            return ""
        short = len(self.truth.rows) - self._judged - len(dated_rows)
        undated = sum(dated.time_quality in ("unknown", "producer") for dated in dated_rows)
        return f"{short} stamped rows without result, {undated} not dated" if short or undated else ""

    def judge(self, verdict: Verdict) -> None:
        """Check that each row arrives once, dated within its bound, and that no run is repeated."""
        dated_rows = self._dated_rows()
        rows = [dated.row for dated in dated_rows]
        if rows != list(range(self._judged + 1, len(self.truth.rows) + 1)):
            verdict.problems.append(f"stamped rows {self._judged + 1} to {len(self.truth.rows)} have results {rows}")
            return
        wrong = self.truth.misdated(dated_rows)
        verdict.misdated = len(wrong)
        if wrong:
            verdict.problems.append(f"{len(wrong)} rows are misdated: {'; '.join(wrong[:3])}")
        undated = [dated.row for dated in dated_rows if dated.t_error_us is None]
        if undated:
            verdict.problems.append(f"{len(undated)} rows are not dated: {undated[:3]} …")
        if self.failure is not None:
            verdict.problems.append(f"the second sensor failed: {self.failure}")
        self._count_runs(verdict)
        self._judged = len(self.truth.rows)

    def _count_runs(self, verdict: Verdict) -> None:
        (began, runs, starts), now = self._counted, time.monotonic()
        self._counted = now, Clock.in_world(self._world).runs(TASK), self._world.starts
        # One more at each start, and one at each end of the interval.
        due = (now - began) / EVERY_S + 2 + self._counted[2] - starts
        if self._counted[1] - runs > due:
            verdict.problems.append(f"{self._counted[1] - runs} runs of a task that was due {due:.0f} times")

    def _dated_rows(self) -> list[Dated]:
        return [Dated(*row) for row in self._world.fleet.query(_DATED, DEVICE, TASK, self._judged)]

    def send(self, client: Client) -> None:
        sent = self.truth.now_us()
        client.send(STREAM, **{name: round(self._rng.gauss(0, 1), 3) for name in FIELDS})
        answer = client.flush()
        if not answer.rejected:
            self.truth.rows.append((sent, self.truth.now_us()))
        time.sleep(_STEP_S)
