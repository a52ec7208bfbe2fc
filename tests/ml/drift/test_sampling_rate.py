"""Sampling rate: how it is counted, which changes are faults, and which are not."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from outstation.foundation.text import format_duration
from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, MonitorSettings, Reference
from outstation.ml.drift.baseline import summary as summaries
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.baseline.learning_state import MAX_WINDOWS, LearningState
from outstation.ml.drift.baseline.runs import Trace, count_repeated_rows
from outstation.ml.drift.baseline.sampling import SamplingIntervals
from outstation.ml.drift.baseline.summary import Summary
from outstation.protocol.alerts.alert import Alert
from tests.kit.machine import LABELS, ROWS, WINDOW, Readings, feed, readings, reference

LEARN, STEP_US = 40, 10_000


@pytest.fixture(scope="module")
def monitor() -> DriftMonitor:
    return DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=LEARN))


@pytest.fixture(scope="module")
def learned(monitor: DriftMonitor) -> DriftState:
    return feed(monitor, monitor.start(), readings(3, LEARN + 1))[0]


def timed(
    monitor: DriftMonitor, state: DriftState, r: Readings, t: NDArray[np.int64]
) -> tuple[DriftState, list[DriftWindowResult]]:
    first = state.last_counted_row + 1
    starts = np.arange(0, len(r.features), ROWS)
    rows = (first, first + len(r.features) - 1)
    return monitor.process_batch(
        state, r.features, starts, ROWS, r.labels, r.scores, rows=rows, t=t + state.t[1] + first * STEP_US
    )


def alerts_of(verdicts: list[DriftWindowResult]) -> list[Alert]:
    return [alert for verdict in verdicts for alert in verdict.alerts]


def every(step_us: float, r: Readings) -> NDArray[np.int64]:
    return np.arange(len(r.features)) * int(step_us)


@given(st.lists(st.lists(st.integers(-(2**40), 2**46), max_size=20), max_size=6), st.integers(1, 100), st.randoms())
@settings(deadline=None, max_examples=80)
def test_steps_of_parts_in_any_order_and_grouping_add_up_to_the_whole(
    parts: list[list[int]], each: int, rng: Any
) -> None:
    whole = SamplingIntervals().add_spans(np.array([x for part in parts for x in part], np.int64), each)
    merged = [SamplingIntervals().add_spans(np.array(part, np.int64), each) for part in parts] or [SamplingIntervals()]
    while len(merged) > 1:
        rng.shuffle(merged)
        merged = [merged[0] + merged[1], *merged[2:]]
    for name in ("steps", "total_us", "repeated"):
        np.testing.assert_array_equal(getattr(merged[0], name), getattr(whole, name))
    assert whole.steps.sum() == each * sum(x >= each for part in parts for x in part)


def test_a_clock_that_is_set_does_not_spoil_the_mean_step() -> None:
    steps = np.full(500, 20_000)
    steps[100], steps[200] = 3_600_000_000, -3_600_000_000
    assert SamplingIntervals().add_spans(steps, 1).mean_step_us() == pytest.approx(20_000)


def test_too_few_steps_tell_no_rate() -> None:
    assert np.isnan(SamplingIntervals().add_spans(np.full(5, 20_000), 1).mean_step_us())


def test_rows_that_repeat_are_counted_unless_all_of_their_fields_rest() -> None:
    rows = np.array([[0.0, 1], [0, 1], [0, 2], [0, 2], [0, 2], [np.nan, 2], [np.nan, 2]])
    trace = Trace.from_rows(np.stack([rows, rows[::-1]]))
    fine = np.zeros(2, np.bool_)
    assert count_repeated_rows(trace, ((), ()), fine).tolist() == [3, 3]
    assert count_repeated_rows(trace, ((0.0,), (2.0,)), fine).tolist() == [1, 1]
    assert count_repeated_rows(trace, ((), (2.0,)), np.array([True, False])).tolist() == [1, 1]
    assert count_repeated_rows(Trace.from_rows(rows[None, 1:], rows[:1]), ((), ()), fine).tolist() == [3]


def test_switches_that_read_higher_are_shifted_and_no_rows_given_again() -> None:
    rng = np.random.default_rng(4)
    rows = (rng.random((60 * 60, 2)) < [0.5, 0.3]).astype(np.float32)
    monitor = DriftMonitor(MonitorSettings(learning_reference(rows), labels=(), window=60))
    rows[45 * 60 :, 0] += 0.5
    t = np.arange(len(rows), dtype=np.int64) * 1_000_000
    none = np.zeros(len(rows), np.int64)
    _, results = monitor.process_batch(
        monitor.start(), rows, np.arange(len(rows)), 1, none, None, rows=(1, len(rows)), t=t
    )
    raised = {(alert.subject, alert.alert) for result in results for alert in result.alerts}
    assert raised == {("a", "drift")}


@given(st.lists(st.integers(0, 400), max_size=5))
@settings(deadline=None, max_examples=25)
def test_single_rows_in_any_batches_give_the_same_steps(cuts: list[int]) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 2)).astype(np.float32)
    none = np.zeros(400, np.int64)
    base = learning_reference(rows)
    single = DriftMonitor(MonitorSettings(base, labels=(), window=90))
    t = np.cumsum(rng.integers(1, 50_000, 400))

    def run(bounds: list[int]) -> bytes:
        state = single.start()
        for begin, end in pairwise(bounds):
            at = slice(begin, end)
            starts = np.arange(end - begin)
            state, _ = single.process_batch(state, rows[at], starts, 1, none[at], None, rows=(begin + 1, end), t=t[at])
        return state.to_bytes()

    assert run([0, *sorted(cuts), 400]) == run([0, 400])


def learning_reference(rows: NDArray[np.float32]) -> Reference:
    return build_reference(rows, np.arange(len(rows)), 1, np.zeros(len(rows), np.int64), None, 20, fields=("a", "b"))


def test_paces_of_parts_in_any_order_are_those_of_the_whole() -> None:
    shipped, r = reference(), readings(5, 6)
    features = r.features.astype(np.float64)
    parts = [
        summaries.summarize(shipped, features[a * ROWS : b * ROWS], np.arange(b - a) * ROWS, r.labels[a:b], None)
        for a, b in ((0, 7), (7, 7), (7, 40), (40, 60))
    ]
    whole = summaries.summarize(shipped, features, np.arange(60) * ROWS, r.labels, None)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        merged = Summary.empty(shipped)
        for i in order:
            merged = merged.merge(parts[i])
        np.testing.assert_array_equal(merged.detectors["sampling_rate"], whole.detectors["sampling_rate"])
    assert whole.detectors["sampling_rate"].any()


@pytest.mark.parametrize(
    ("step_us", "words"),
    [(12_500, "readings come every 12.5 ms instead of 10 ms"), (8_000, "every 8 ms instead of 10 ms")],
)
def test_readings_that_come_at_another_rate_are_a_fault_of_the_rate(
    monitor: DriftMonitor, learned: DriftState, step_us: int, words: str
) -> None:
    r = readings(9, 6)
    state, verdicts = timed(monitor, learned, r, every(step_us, r))
    alerts = alerts_of(verdicts)
    assert [(a.alert, a.subject, a.state, a.severity) for a in alerts] == [("fault", "rate", "raised", "critical")]
    assert words in alerts[0].summary
    assert alerts[0].summary.endswith(" UTC: sampling rate or sensor clock changed.")
    assert alerts[0].evidence["window"] == learned.index + 1
    assert verdicts[-1].members["rate"]["fault"] == "rate"
    assert {v.members["state"] for v in verdicts} == {"fault"}
    assert state.suite == learned.suite
    back, cleared = timed(monitor, state, readings(10, 4), every(STEP_US, readings(10, 4)))
    assert [(a.subject, a.state, a.id) for a in alerts_of(cleared)] == [("rate", "cleared", "rate/fault/1")]
    assert back.gates["sampling_rate"].open_fault == ""


def test_a_rate_that_differs_by_less_than_one_in_twenty_is_none(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(9, 12)
    assert [a for a in alerts_of(timed(monitor, learned, r, every(STEP_US * 1.04, r))[1]) if a.subject == "rate"] == []


def test_a_backlog_that_comes_at_once_is_no_other_rate(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(9, 4)
    t = every(STEP_US, r)
    t[:200] = t[0] + np.arange(200) * 10
    assert alerts_of(timed(monitor, learned, r, t)[1]) == []


def test_readings_that_come_irregularly_have_no_rate_to_lose(monitor: DriftMonitor) -> None:
    rng = np.random.default_rng(0)
    r = readings(3, LEARN + 12)
    pace = np.repeat(rng.uniform(0.5, 3, LEARN + 12), WINDOW * ROWS)
    state, verdicts = timed(monitor, monitor.start(), r, np.cumsum(pace * STEP_US).astype(np.int64))
    assert state.site_reference is not None
    assert state.site_reference.site is not None
    assert state.site_reference.site.baselines["sampling_rate"].step_us == 0
    assert alerts_of(verdicts) == []


def test_rows_that_all_arrive_twice_are_reported_as_repeated(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(9, 6)
    twice = Readings(np.repeat(r.features, 2, axis=0)[: len(r.features)], r.labels, r.truth, r.scores)
    alerts = alerts_of(timed(monitor, learned, twice, every(STEP_US, r))[1])
    assert [(a.alert, a.subject, a.evidence["fault"]) for a in alerts] == [("fault", "rate", "repeated")]
    assert "50% of rows repeat the row before in all fields, at most 0% did" in alerts[0].summary


def test_a_new_share_of_missing_values_is_a_fault_but_still_tested(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(9, 6)
    missing = np.random.default_rng(1).random(len(r.features)) < 0.045
    missing[::200] = True
    holes = r.changed(1, np.where(missing, np.nan, r.features[:, 1]).astype(np.float32))
    few = np.arange(len(missing)) % 20 == 0
    slight = r.changed(1, np.where(few, np.nan, r.features[:, 1]).astype(np.float32))
    for changed in (holes, slight):
        state, verdicts = feed(monitor, learned, changed)
        faults = [a for a in alerts_of(verdicts) if a.alert == "fault" and a.state == "raised"]
        assert {(a.subject, a.evidence["fault"]) for a in faults} == {("y", "missing")}
    z, before = (each.suite.charts["moments"].recent_z[-6:, 0] for each in (state, learned))
    assert (z != before).all()


def test_a_few_values_missing_by_chance_are_no_fault(monitor: DriftMonitor) -> None:
    r = readings(3, LEARN + 20)
    missing = np.random.default_rng(1).random(len(r.features)) < 0.02
    holes = r.changed(1, np.where(missing, np.nan, r.features[:, 1]).astype(np.float32))
    _, verdicts = feed(monitor, monitor.start(), holes)
    assert [a.summary for a in alerts_of(verdicts) if a.alert == "fault"] == []


def test_old_windows_are_stored_as_evenly_as_new_ones(monitor: DriftMonitor) -> None:
    empty = Summary.empty(monitor.shipped)
    learning = LearningState.empty(monitor.shipped)
    for i in range(3 * MAX_WINDOWS):
        learning = learning.add(empty, monitor.shipped.task, t=(i, i))
    assert learning.total_windows == 3 * MAX_WINDOWS
    assert set(np.diff(learning.t[:, 0]).tolist()) == {4}
    assert {len(part) for part in (learning.t, learning.step_us, learning.repeated, learning.symptoms[..., 0])} == {
        learning.windows
    }


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (12.3, "12.3 µs"),
        (20_000, "20 ms"),
        (1.5e6, "1.5 s"),
        (600e6, "10 min"),
        (7200e6, "2 h"),
        (12_192 * 3600e6, "508 d"),
    ],
)
def test_an_amount_of_time_reads_well(us: float, text: str) -> None:
    assert format_duration(us) == text
