"""Test sequence: windows tested together have the bits of windows tested one by one."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from msgspec.structs import astuple
from numpy.typing import NDArray

from outstation.foundation.arrays import to_bytes
from outstation.ml.drift import DriftMonitor, DriftState
from outstation.ml.drift.detectors.cusum import Cusum
from outstation.ml.drift.detectors.mewma import Mewma
from outstation.ml.drift.detectors.season import HALF_DAY_US, SlowTrend
from outstation.ml.drift.sequential import sequence as courses
from outstation.ml.drift.sequential.test_suite import Evidence
from tests.kit.machine import ROWS, WINDOW, Readings, comparable, feed, readings

TESTS = 5
Scores = NDArray[np.float64]
# As windows say them: mostly little, some beyond what one may say, some nothing.
ZS = st.one_of(st.floats(-3, 3), st.floats(-50, 50), st.just(float("nan")))


def windows(most: int = 8) -> st.SearchStrategy[Scores]:
    return arrays(np.float64, st.tuples(st.integers(1, most), st.just(TESTS)), elements=ZS)


def same(first: msgspec.Struct, other: msgspec.Struct) -> bool:
    return [part.tobytes() for part in astuple(first)] == [part.tobytes() for part in astuple(other)]


@given(windows(), windows())
def test_cusums_over_consecutive_windows_equal_those_one_by_one(before: Scores, z: Scores) -> None:
    started_s = Cusum.zeros(TESTS)
    for item in before:
        started_s = started_s.update(item, 2 * item, t=7)
    started_s = started_s.reset_except(np.asarray(~started_s.alarm.any(0)))
    t = 10 * np.arange(1, len(z) + 1)
    together, alone = started_s.run_windows(z, 3 * z, t=t), started_s
    for at, item in enumerate(z):
        alone = alone.update(item, 3 * item, t=int(t[at]))
        assert alone.alarm.any() == together.exceeds_limit[at]
        assert same(together.state_after(at + 1), alone)
        assert (together.values[at] == alone.value).all()
        if alone.alarm.any():
            break


@given(windows(), windows())
def test_mewmas_over_consecutive_windows_equal_those_one_by_one(before: Scores, z: Scores) -> None:
    started_s = Mewma.zeros(TESTS)
    for item in before:
        started_s = started_s.update(item, 2 * item, 7)
    t = 10 * np.arange(1, len(z) + 1)
    together, alone = started_s.run_windows(z, 3 * z, t), started_s
    for at, item in enumerate(z):
        alone = alone.update(item, 3 * item, int(t[at]))
        assert same(together.state_after(at + 1), alone)
        assert together.statistics[at] == alone.statistic


@given(windows(12), st.lists(st.integers(-1, 2), min_size=12, max_size=12))
def test_a_trend_over_consecutive_windows_equals_that_one_by_one(z: Scores, half_days: list[int]) -> None:
    t = (20 + np.cumsum(half_days)[: len(z)]) * HALF_DAY_US + 5
    alone = SlowTrend()
    for at in range(len(z)):
        alone = alone.add(z[at : at + 1], t[at : at + 1])
    assert same(SlowTrend().add(z, t), alone)


@given(
    st.floats(0.3, 3.0),
    st.integers(0, 99),
    arrays(np.bool_, (9, 5), elements=st.sampled_from([False, False, False, True])),
)
@settings(deadline=None, max_examples=60)
def test_tests_over_consecutive_windows_equal_those_one_by_one(
    monitor: DriftMonitor, learned: DriftState, wild: float, seed: int, beyond: NDArray[np.bool_]
) -> None:
    """The wilder, the sooner fields that move hold other tests back, and an alarm is raised."""
    at = monitor.shipped.layout
    rng = np.random.default_rng(seed)
    assert learned.site_reference is not None
    tester = monitor._get_tester(learned.site_reference)
    z = wild * rng.normal(size=(9, at.test_count)) + wild * 0.4 * rng.normal(size=at.test_count)
    z[rng.random(z.shape) < 0.05] = np.nan
    reported = rng.random(beyond.shape) < 0.95
    charts = dict.fromkeys(learned.suite.charts) | {"psi": np.where(reported, np.where(beyond, 1e9, 0.0), np.nan)}
    evidence = Evidence(z, np.nan_to_num(z), charts, rng.integers(0, 9, (9, 32)))
    t = 10 * np.arange(1, 10)
    together, alone = courses.run_tests(tester, learned.suite, evidence, t), learned.suite
    for number in range(9):
        is_quiet = number < together.windows_before_alarm
        part = slice(number, number + 1)
        alone = courses.run_tests(tester, alone, evidence[part], t[part]).state_after(1)
        assert alone.open_subjects.any() != is_quiet
        if not is_quiet:
            break
        after = together.state_after(number + 1)
        assert same(after.cusum, alone.cusum)
        assert to_bytes(after.charts) == to_bytes(alone.charts)
        assert after.recent_scores.tobytes() == alone.recent_scores.tobytes()
        assert together.cusum.values[number].tobytes() == alone.cusum.value.tobytes()


def changed(seed: int, how: str, begin: int, lasts: int) -> Readings:
    """Twenty drift windows, of which some from `begin` on are changed."""
    r = readings(100 + seed, 20)
    selection = slice(begin * WINDOW * ROWS, (begin + lasts) * WINDOW * ROWS)
    part = r.features[selection]
    if how == "gain":
        part[:, 1] *= 1.8
    elif how == "offset":
        part[:, 0] += 0.4
    elif how == "missing":
        part[::9, 2] = np.nan
    elif how == "swapped":
        part[:, [0, 1]] = part[:, [1, 0]]
    elif how == "repeated":
        part[1::2] = part[::2]
    elif how == "slow":
        slow = np.repeat(part[: len(part) // 2 + 1], 2, axis=0)
        part[:] = (slow[: len(part)] + slow[1 : len(part) + 1]) / 2
    elif how == "other":
        r.labels[begin * WINDOW : (begin + lasts) * WINDOW] = 2
    return r


@given(
    st.integers(0, 50),
    st.sampled_from(["nothing", "gain", "offset", "missing", "swapped", "repeated", "slow", "other"]),
    st.integers(0, 12),
    st.integers(1, 8),
    st.integers(1, 60),
)
@settings(deadline=None, max_examples=10)
def test_any_batches_give_the_results_and_state_of_single_windows(
    monitor: DriftMonitor, learned: DriftState, seed: int, how: str, begin: int, lasts: int, batch: int
) -> None:
    r = changed(seed, how, begin, lasts)
    state, verdicts = feed(monitor, learned, r, batch=200)
    each_state, each = feed(monitor, learned, r, batch=WINDOW)
    cut_state, cut = feed(monitor, learned, r, batch=batch)
    assert monitor.to_bytes(state) == monitor.to_bytes(each_state) == monitor.to_bytes(cut_state)
    assert comparable(verdicts) == comparable(each) == comparable(cut)
    assert sum(v.windows for v in verdicts) == 20
