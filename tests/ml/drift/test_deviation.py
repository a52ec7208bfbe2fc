"""Reference deviation: a site that is wrong from its first row is named, an ordinary one is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from outstation.foundation.arrays import Float32s
from outstation.ml.drift.baseline.deviation import ReferenceGuard, find_steps
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.monitor import DriftMonitor
from outstation.ml.drift.monitor_settings import MonitorSettings
from outstation.ml.drift.state import DriftState, DriftWindowResult
from outstation.protocol.alerts.alert import Alert

FIELDS, UNITS, WINDOW, LEARN = ("temp", "flow"), ("°C", "l/s"), 60, 40


def make_rows(seed: int, windows: int = LEARN) -> Float32s:
    return np.random.default_rng(seed).normal([20.0, 5.0], [2.0, 0.5], (windows * WINDOW, 2)).astype(np.float32)


def shift(rows: Float32s, temp: float) -> Float32s:
    return rows + np.array([temp, 0.0], np.float32)


def turn_down(rows: Float32s) -> Float32s:
    return ((rows - [20.0, 0.0]) * [0.4, 1.0] + [20.0, 0.0]).astype(np.float32)


def ramp(rows: Float32s) -> Float32s:
    return (rows + np.linspace(0, 1, len(rows))[:, None] * [0.0, 1.0]).astype(np.float32)


@pytest.fixture(scope="module")
def shipped() -> Reference:
    rows = make_rows(0)
    none = np.zeros(len(rows), np.int64)
    return build_reference(rows, np.arange(len(rows)), 1, none, None, WINDOW, fields=FIELDS)


def make_monitor(shipped: Reference, **options: Any) -> DriftMonitor:
    return DriftMonitor(MonitorSettings(shipped, labels=(), window=WINDOW, learn_windows=LEARN, units=UNITS, **options))


def feed(
    monitor: DriftMonitor, state: DriftState, rows: Float32s, first: int = 1
) -> tuple[DriftState, list[DriftWindowResult], list[Alert]]:
    """Feed rows from number `first` on; return the state, the results and the alerts about the reference."""
    none, t = np.zeros(len(rows), np.int64), np.arange(first, first + len(rows), dtype=np.int64) * 1_000_000
    last = first + len(rows) - 1
    state, results = monitor.process_batch(state, rows, np.arange(len(rows)), 1, none, None, rows=(first, last), t=t)
    alerts = [alert for result in results for alert in result.alerts if alert.subject == "reference"]
    return state, results, alerts


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: shift(rows, 4.0), "temp differs by +4 °C (2 sd) from the shipped reference"),
        (turn_down, "temp varies 0.4 times as much as in the shipped reference"),
        (ramp, "flow"),
    ],
    ids=["offset of 2 sd", "gain of 0.4", "ramp of 2 sd"],
)
def test_a_site_that_is_wrong_from_its_first_row_is_named(
    shipped: Reference, change: Callable[[Float32s], Float32s], sentence: str
) -> None:
    monitor = make_monitor(shipped)
    state, results, alerts = feed(monitor, monitor.start(), change(make_rows(1)))
    assert [(alert.state, alert.severity) for alert in alerts] == [("raised", "warning")]
    assert sentence in alerts[0].summary
    assert any(result.learned_reference for result in results)
    assert state.tested_reference is state.site_reference


def test_an_ordinary_site_is_accepted_silently(shipped: Reference) -> None:
    monitor = make_monitor(shipped)
    for seed in range(1, 25):
        state, _, alerts = feed(monitor, monitor.start(), make_rows(seed))
        assert alerts == []
        assert state.site_reference is not None
        assert state.guard.accepted is not None
        assert (state.guard.accepted.class_mean == state.site_reference.class_mean).all()


def test_a_held_reference_is_used_once_somebody_accepts_it(shipped: Reference) -> None:
    monitor = make_monitor(shipped, hold_deviating=True)
    wrong = shift(make_rows(1, LEARN + 20), 4.0)
    state, results, [raised] = feed(monitor, monitor.start(), wrong)
    assert "Drift is not tested until somebody accepts" in raised.summary
    assert state.tested_reference is None
    assert sum(result.learned_reference is not None for result in results) == 1
    accepted, [cleared] = monitor.accept_reference(state)
    assert (cleared.id, cleared.state) == (raised.id, "cleared")
    assert accepted.tested_reference is state.site_reference
    after, _, again = feed(monitor, accepted, shift(make_rows(2, 10), 6.0), len(wrong) + 1)
    assert again == []
    assert after.suite.open_subjects[0]


def test_learning_again_and_again_cannot_walk_the_baseline(shipped: Reference) -> None:
    """Each step of 0.4 sd is small; the accepted reference does not move with them."""
    monitor, first, alerts = make_monitor(shipped), 1, []
    state = monitor.start()
    for step in range(4):
        state, _, more = feed(monitor, state, shift(make_rows(step + 1), step * 0.8), first)
        alerts += more
        first += LEARN * WINDOW
        if step < 3:
            state, _ = monitor.relearn(state)
    assert {(alert.id, alert.state) for alert in alerts} == {("reference/drift/1", "raised")}
    [deviation] = alerts[-1].evidence["deviations"]
    assert deviation["field"] == "temp"
    assert deviation["shift_sd"] == pytest.approx(1.2, abs=0.15)


def test_the_right_readings_after_wrong_ones_deviate_from_these_until_somebody_accepts(shipped: Reference) -> None:
    monitor = make_monitor(shipped)
    state, _, [raised] = feed(monitor, monitor.start(), shift(make_rows(1), 4.0))
    fresh, _ = monitor.relearn(state)
    state, _, [again] = feed(monitor, fresh, make_rows(2), LEARN * WINDOW + 1)
    assert (again.id, again.state) == (raised.id, "raised")
    assert "temp differs by -4 °C (2 sd) from the former reference of this site" in again.summary
    state, [cleared] = monitor.accept_reference(state)
    assert (cleared.id, cleared.state) == (raised.id, "cleared")
    assert monitor.accept_reference(state)[1] == []


def test_nothing_is_learned_while_a_fault_is_open(shipped: Reference) -> None:
    monitor = make_monitor(shipped)
    rows = make_rows(1, 4)
    rows[: 2 * WINDOW, 0] = 20.0  # stuck for two windows; three without a fault clear the alert
    state, _, _ = feed(monitor, monitor.start(), rows)
    assert state.faults.number[0].any()
    assert state.learning.total_windows == 0


def wander(seed: int, windows: int) -> Float32s:
    """Return rows whose level wanders over several windows, so that learning goes on."""
    rng = np.random.default_rng(seed)
    level = rng.normal(size=(windows, 2))
    for at in range(1, windows):
        level[at] = 0.75 * level[at - 1] + 0.66 * level[at]
    return make_rows(seed, windows) + (np.repeat(level, WINDOW, axis=0) * [1.0, 0.25]).astype(np.float32)


def test_a_change_that_begins_while_learning_goes_on_is_named_with_its_time(shipped: Reference) -> None:
    monitor = make_monitor(shipped)
    for seed in (0, 2, 4):
        rows = wander(seed, 4 * LEARN + 20)
        rows[52 * WINDOW :, 0] += 6.0
        _, results, alerts = feed(monitor, monitor.start(), rows)
        [learned] = [result.index for result in results if result.learned_reference]
        early, last = alerts[0], alerts[-1]
        assert 52 < early.evidence["window"] < learned == last.evidence["window"]
        assert (early.id, early.state) == (last.id, "raised")
        assert " UTC on while it was learned. Learning goes on." in early.summary
        [step] = [each for each in last.evidence["deviations"] if each["field"] == "temp"]
        assert step["shift"] == pytest.approx(6.0, abs=2.0)
        assert step["since"] == pytest.approx(52 * WINDOW * 1_000_000, abs=2 * WINDOW * 1_000_000)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("windows", [LEARN, 4 * LEARN])
def test_windows_that_are_alike_made_no_step(shipped: Reference, memory: float, windows: int) -> None:
    rng, t = np.random.default_rng(1), np.arange(windows)
    stepped = 0
    for _ in range(200):
        values = rng.normal(size=(windows + 100, 4)) * np.sqrt(1 - memory**2)
        for at in range(1, len(values)):
            values[at] += memory * values[at - 1]
        # Of the size that matters, for means and for spreads.
        stepped += bool(find_steps(5 * values[100:], t, shipped))
    assert stepped <= 8


def test_references_of_other_fields_are_not_compared(shipped: Reference) -> None:
    guard = ReferenceGuard().begin_learning(shift_profile(shipped))
    none = np.zeros((LEARN, 4))
    assert guard.check(shipped, shipped, none, np.arange(LEARN), UNITS, hold=True).deviations == ()


def shift_profile(shipped: Reference) -> Reference:
    return replace(shipped, fields=("temp", "pressure"), class_mean=shipped.class_mean + 100)
