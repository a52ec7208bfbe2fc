"""Learning state: bounded however long learning lasts, and robust against clock steps."""

from __future__ import annotations

import zlib

import msgspec
import numpy as np
import pytest

from outstation.ml.drift import DriftMonitor, MonitorSettings
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.baseline.learning_state import MAX_BYTES, MAX_WINDOWS, MIN_RETAINED_WINDOWS, LearningState
from outstation.ml.drift.baseline.summary import Summary, summarize
from outstation.ml.drift.detectors.detector import Task
from scripts.benchmarks.drift_peers import site_trials
from scripts.benchmarks.drift_peers.populations import POPULATIONS
from tests.kit.machine import LABELS, WINDOW, feed, readings, reference

YEAR_US = 365 * 86_400_000_000


@pytest.fixture(scope="module")
def monitor() -> DriftMonitor:
    return DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=40))


def test_a_task_learns_from_more_windows_than_are_stored(monitor: DriftMonitor) -> None:
    many = DriftMonitor(MonitorSettings(monitor.shipped, labels=LABELS, window=WINDOW, learn_windows=MAX_WINDOWS + 30))
    state, verdicts = feed(many, many.start(), readings(5, MAX_WINDOWS + 31), batch=500)
    learned = [v.index for v in verdicts if v.learned_reference is not None]
    assert learned == [MAX_WINDOWS + 30]
    assert state.site_reference is not None
    assert MAX_WINDOWS // 2 <= state.site_reference.drift_windows <= MAX_WINDOWS


def learning_of_size(fields: int, classes: int) -> tuple[LearningState, Summary, Task]:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(30 * 40 * 20, fields)).astype(np.float32)
    starts = np.arange(0, len(rows), 20)
    labels = rng.integers(0, classes, len(starts))
    names = tuple(f"f{i}" for i in range(fields))
    known = tuple(f"c{i}" for i in range(classes))
    shipped = build_reference(rows, starts, 20, labels, None, 40, fields=names, labels=known)
    whole = rows[: 40 * 20].astype(np.float64)
    return LearningState.empty(shipped), summarize(shipped, whole, starts[:40], labels[:40], None), shipped.task


def test_the_learning_state_stays_small_with_many_fields_and_classes() -> None:
    learning, window, task = learning_of_size(24, 20)
    retained, most = [], 0
    for number in range(200):
        learning = learning.add(window, task, t=(number * 1000, number * 1000 + 999))
        retained.append(learning.windows)
        most = max(most, len(learning.to_bytes()))
    assert learning.total_windows == 200
    assert max(retained) <= MIN_RETAINED_WINDOWS
    assert min(retained[MIN_RETAINED_WINDOWS:]) >= MIN_RETAINED_WINDOWS // 2
    assert most < 3 * MAX_BYTES


def timed(*spans: tuple[int, int, int]) -> LearningState:
    """Windows one after the other of (how many, begin, length) µs."""
    learning, window, task = learning_of_size(2, 1)
    for count, begin, length in spans:
        for number in range(count):
            t = begin + number * length
            learning = learning.add(window, task, t=(t, t + length - 1))
    return learning


MINUTE_US = 60_000_000


def test_observed_time_is_that_of_the_readings_despite_clock_steps() -> None:
    calm = timed((30, YEAR_US, MINUTE_US))
    assert calm.observed_s == pytest.approx(30 * 60, rel=0.01)
    assert calm.has_steady_clock
    ahead = timed((10, 2 * YEAR_US, MINUTE_US), (20, YEAR_US, MINUTE_US))
    assert ahead.observed_s == pytest.approx(30 * 60, rel=0.05)
    assert not ahead.has_steady_clock
    from_1970 = timed((10, 0, MINUTE_US), (20, 50 * YEAR_US, MINUTE_US))
    assert from_1970.observed_s == pytest.approx(30 * 60, rel=0.1)
    assert not from_1970.has_steady_clock
    within = timed((10, YEAR_US, MINUTE_US), (1, YEAR_US + 10 * MINUTE_US, YEAR_US), (20, 2 * YEAR_US, MINUTE_US))
    assert within.observed_s < 40 * 60
    many = timed((MAX_WINDOWS + 100, YEAR_US, MINUTE_US))
    assert many.windows < many.total_windows
    assert many.observed_s == pytest.approx((MAX_WINDOWS + 100) * 60, rel=0.05)


def test_a_device_that_is_off_at_night_counts_only_its_hours() -> None:
    days = timed(*((8, YEAR_US + day * 86_400_000_000, 60 * MINUTE_US) for day in range(5)))
    assert days.observed_s == pytest.approx(5 * 8 * 3600, rel=0.15)
    assert days.has_steady_clock


def test_the_learning_state_is_stored_separately_and_survives_a_restart(monitor: DriftMonitor) -> None:
    r = readings(6, 60)
    state, _ = feed(monitor, monitor.start(), r.windows(0, 30))
    data, learning = monitor.to_bytes(state), state.learning.to_bytes()
    assert len(data) < len(learning)
    again = monitor.restore(data, learning)
    assert again.to_bytes() == state.to_bytes()
    whole, _ = feed(monitor, state, r.windows(30, 42))
    later, _ = feed(monitor, again, r.windows(30, 42))
    assert later.to_bytes() == whole.to_bytes()
    assert later.site_reference is not None


def test_learning_goes_on_from_a_version_that_stored_neither_further_outputs_nor_errors(monitor: DriftMonitor) -> None:
    state, _ = feed(monitor, monitor.start(), readings(6, 10))
    stored = msgspec.msgpack.decode(zlib.decompress(state.learning.to_bytes()))
    del stored["further"], stored["errors"]
    again = monitor.restore(monitor.to_bytes(state), zlib.compress(msgspec.msgpack.encode(stored)))
    assert again.learning.total_windows == state.learning.total_windows == 10
    assert again.to_bytes() == state.to_bytes()


@pytest.mark.parametrize("damaged", [b"", b"\0" * 40, b"x\x9cgarbage"])
def test_a_damaged_learning_state_is_gathered_anew_and_no_more_is_lost(monitor: DriftMonitor, damaged: bytes) -> None:
    state, _ = feed(monitor, monitor.start(), readings(6, 10))
    again = monitor.restore(monitor.to_bytes(state), damaged)
    assert (again.index, again.last_counted_row, again.learning.total_windows) == (
        state.index,
        state.last_counted_row,
        0,
    )


def test_unknown_certainty_counts_as_neither_certain_nor_in_doubt(monitor: DriftMonitor) -> None:
    r = readings(6, 2)
    r.scores[: WINDOW // 2] = np.nan
    state, verdicts = feed(monitor, monitor.start(), r)
    assert len(verdicts) == 2
    assert int(state.learning.total.scores.sum()) == 2 * WINDOW - WINDOW // 2


@pytest.mark.parametrize("population", ["independent", "AR(0.9)"])
def test_unchanged_data_after_a_relearn_raise_no_more_alerts_than_the_budget(population: str) -> None:
    [law] = [each for each in POPULATIONS if each.name == population]
    rows, monitor, alerts, windows = 60, site_trials.shipped_monitor(law, 60), 0, 0
    for number in range(4):
        site = site_trials.learn(monitor, law, rows, number)
        assert site is not None
        state, at = monitor.relearn(site.state)[0], 0
        data, t = site_trials._stream(law, (9, number), 400, rows)
        t += site.t[0] - t[0]
        while state.site_reference is None:
            state, _ = site_trials.feed(monitor, law, state, data[at : at + rows], t[at : at + rows])
            at += rows
        end = at + 200 * rows
        _, results = site_trials.feed(monitor, law, state, data[at:end], t[at:end])
        windows += sum(result.windows for result in results)
        alerts += len(site_trials.raised_alerts(results))
    assert windows == 800
    assert 1000 * alerts / windows <= 10
