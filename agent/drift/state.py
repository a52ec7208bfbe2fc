"""What a task's drift detection remembers, how model windows fill a drift window, and what a closed one comes to."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from agent import arrays
from agent.arrays import Bools, Floats, Ints
from agent.drift.baseline.learning import Learning, finite
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.summary import Summary
from agent.drift.detectors import window_statistics
from agent.drift.detectors.runs import Tail
from agent.drift.detectors.season import Season
from agent.drift.detectors.test_layout import Places
from agent.drift.detectors.window_statistics import Found
from agent.drift.reporting.alert_text import Alert
from agent.drift.sampling_rate_watch import Watch
from agent.drift.testing.test_suite import Detectors
from agent.errors import BadBundle


class State(msgspec.Struct, frozen=True, eq=False):
    """All a task's drift detection remembers. Constant size but for what is gathered while learning."""

    fields: tuple[str, ...]
    window: int  # model windows per drift window
    index: int  # of the open drift window, from 1
    open: Summary
    tail: Tail
    rows: tuple[int, int]  # first and last row of the open drift window, as the stream numbers them; (0, -1) if none
    t: tuple[int, int]  # their times, epoch µs
    seen: int  # last row counted
    learning: Learning
    site: Reference | None
    learned: int  # site references so far
    learn_s: float  # of readings to learn from, where somebody asked for so many
    detectors: Detectors
    faulty: Bools  # (F,) a fault alert is open
    misread: Bools  # (F,) and says that the field is read wrongly
    calm: Ints  # (F,) windows without a fault since
    raised: Ints  # (F + 3, 2) alerts raised so far: drift, fault
    raised_in: Ints  # (F + 3,) the drift window of the last drift alert
    watch: Watch = msgspec.field(default_factory=Watch)  # the rate's
    season: Season = msgspec.field(default_factory=Season)
    mode: str = ""  # the field that names modes, if one does
    modes: tuple[str, ...] = ()  # those that have a class

    @classmethod
    def start(cls, shipped: Reference, window: int, mode: str = "") -> State:
        fields = len(shipped.fields)
        return cls(
            fields=shipped.fields,
            window=window,
            index=1,
            open=Summary.empty(shipped),
            tail=Tail.empty(fields),
            rows=(0, -1),
            t=(0, 0),
            seen=-1,
            learning=Learning.empty(shipped),
            site=None,
            learned=0,
            learn_s=0.0,
            detectors=Detectors.start(shipped.places),
            faulty=np.zeros(fields, np.bool_),
            misread=np.zeros(fields, np.bool_),
            calm=np.zeros(fields, np.int64),
            raised=np.zeros((fields + 3, 2), np.int64),
            raised_in=np.zeros(fields + 3, np.int64),
            mode=mode,
        )

    def fits(self, at: Places) -> bool:
        """Whether what it knows is of these tests."""
        site_fits = self.site is None or len(self.site.test_mean) == at.tests
        return site_fits and self.detectors.places == at and len(self.detectors.means.mean) == at.fields

    def to_bytes(self) -> bytes:
        return arrays.packed(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """Raises ValueError."""
        return arrays.unpacked(data, cls)

    @classmethod
    def joined(cls, data: bytes, site: bytes | None) -> State:
        """With its `site`, that is kept apart as JSON, where this version can test against it. Raises ValueError."""
        state = cls.from_bytes(data)
        if site is None or state.site is not None:
            return state
        try:
            found = Reference.from_json(site)
        except BadBundle as error:
            raise ValueError(str(error)) from error
        return replace(state, site=found) if found.site is not None else state


class Verdict(msgspec.Struct, frozen=True):
    """One closed drift window. `summary` holds the drift message's `features`, `output`, `estimate` and `state`."""

    index: int
    rows: tuple[int, int]
    t: tuple[int, int]
    n: int
    site: str | None  # digest of the site's reference that this window was judged by
    learned: Reference | None  # the site's reference, when this window completed it
    refused: str | None  # why the windows gathered up to this one were thrown away
    summary: dict[str, Any]
    alerts: tuple[Alert, ...]


class Batch(msgspec.Struct, frozen=True):
    """What a step was given."""

    features: NDArray[np.float32]  # (n, F)
    starts: Ints  # (w,)
    named: Ints  # (w,)
    top: Floats | None  # (w,)
    first: int  # row
    t: Ints  # (n,) epoch µs

    def part(self, some: slice, shipped: Reference) -> Part:
        """Of some of its model windows."""
        begin, end = int(self.starts[some][0]), int(self.starts[some][-1]) + shipped.window_rows
        values, starts = finite(self.features[begin:end]), self.starts[some] - begin
        return Part(
            values=values,
            starts=starts,
            found=window_statistics.of_windows(values, starts, shipped.window_rows, shipped.floor),
            named=self.named[some],
            top=None if self.top is None else self.top[some],
            begin=begin,
            first=self.first + begin,
            t=self.t[begin:end],
        )


class Part(msgspec.Struct, frozen=True):
    """Of a batch, with the statistics of its model windows; where rows count, from `begin` on."""

    values: Floats  # (n, F)
    starts: Ints  # (w,)
    found: Found
    named: Ints  # (w,)
    top: Floats | None  # (w,)
    begin: int
    first: int  # row
    t: Ints  # (n,) epoch µs


def filled(state: State, shipped: Reference, part: Part, classes: Ints) -> State:
    """With its model windows, compared with `classes`, and with those of its rows that were not counted before."""
    rows = window_statistics.covered(part.starts, shipped.window_rows, state.seen + 1 - part.first)
    values, summary = part.values[rows], state.open.add_times(part.t, part.starts, shipped, state.tail.t)
    new: dict[str, Any] = {}
    if len(values):
        summary, tail = summary.add_rows(shipped, values, state.tail)
        begin, end = (rows.start, rows.stop - 1) if isinstance(rows, slice) else (int(rows[0]), int(rows[-1]))
        fresh = state.rows[1] < state.rows[0]
        new = {
            "tail": replace(tail, t=int(part.t[end])),
            "rows": (part.first + begin if fresh else state.rows[0], part.first + end),
            "t": (int(part.t[begin]) if fresh else state.t[0], int(part.t[end])),
            "seen": part.first + end,
        }
    return replace(state, open=summary.add_windows(shipped, part.found, part.named, part.top, classes), **new)


def emptied(state: State, nothing: Summary) -> State:
    """For the next drift window."""
    tail = Tail.empty(len(state.faulty))
    return replace(state, index=state.index + 1, open=nothing, tail=tail, rows=(0, -1), t=(0, 0))
