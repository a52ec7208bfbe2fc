"""Drift windows in which nothing happens: no fault, no alert open or raised. Most are, so these are judged together."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from agent.arrays import Bools, Floats, Ints
from agent.drift import sampling_rate_watch as watch
from agent.drift.detectors.season import Season
from agent.drift.sampling_rate_watch import Tick, Watch
from agent.drift.state import State
from agent.drift.testing import sequence
from agent.drift.testing.test_suite import Detectors, Evidence, Tester


class Quiet(msgspec.Struct, frozen=True, eq=False):
    """The next W drift windows: what is remembered after the last, and sums after each."""

    detectors: Detectors
    season: Season
    watch: Watch
    sums: Floats  # (W, 2, T)
    paces: Floats  # (W, 2)

    @property
    def windows(self) -> int:
        return len(self.sums)


def ahead(
    state: State, tester: Tester, signs: Bools, ticks: Sequence[Tick], evidence: Evidence, t: Ints
) -> Quiet | None:
    """Of W windows, begun at `t` (W,), those before the first that has `signs` (W,) of a fault or raises anything; None
    where that is the first one, or something is open."""
    is_open = state.faulty.any() or state.misread.any() or state.watch.on or state.watch.drifting
    if is_open or state.detectors.open_subjects.any():
        return None
    faulty = [bool(sign or tick.fault) for sign, tick in zip(signs.tolist(), ticks, strict=True)]
    windows = faulty.index(True) if True in faulty else len(faulty)
    if not windows:
        return None
    tests = sequence.of(tester, state.detectors, evidence[:windows], t[:windows])
    paces = watch.paces(state.watch, ticks[:windows], tester, t[:windows])
    windows = tests.quiet
    if paces is not None and paces.raises[:windows].any():
        windows = int(paces.raises.argmax())
    if not windows:
        return None
    now, before = state.season, state.watch.cusum.value[:, 0]
    return Quiet(
        detectors=tests.after(windows),
        season=now.add(evidence.z[:windows, : len(state.fields)], t[:windows]),
        watch=watch.after_quiet(state.watch, paces, windows),
        sums=tests.cusum.values[:windows],
        paces=np.tile(before, (windows, 1)) if paces is None else paces.values[:windows, :, 0],
    )
