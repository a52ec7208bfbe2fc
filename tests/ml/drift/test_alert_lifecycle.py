"""Alert lifecycle: faults of one field beside each other, and open alerts that are published again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.ml.drift.numeric.escalation import MAX_REVISIONS, DriftSizes, Escalation
from outstation.protocol.alerts.alert import Alert
from scripts.benchmarks.drift_peers.sensor_rows import QUIET, Floats, Site

WINDOW, FIELDS = 60, 3


@cache
def site() -> Site:
    learned = Site.learn("autocorrelated", WINDOW, FIELDS, 5)
    assert learned.state.site_reference is not None
    return learned


def quiet(rows: int, seed: int = 1) -> NDArray[np.float64]:
    return QUIET["autocorrelated"](np.random.default_rng([seed, 9]), rows, FIELDS)


def summarize(alerts: list[Alert]) -> list[tuple[str, str, str, int]]:
    return [(a.subject, a.evidence.get("fault", a.alert), a.state, a.revision) for a in alerts]


def test_stuck_runs_between_missing_values_are_each_reported() -> None:
    rows = quiet(40 * WINDOW)
    rows[::7, 1] = np.nan
    runs = [(at, at + 2 * WINDOW) for at in (600, 1200, 1800)]
    for begin, end in runs:
        rows[begin:end, 1] = np.where(np.isnan(rows[begin:end, 1]), np.nan, 0.25)
    _, alerts = site().feed(rows)
    raised = [a for a in alerts if a.evidence.get("fault") == "stuck" and a.state == "raised"]
    assert [a.subject for a in raised] == ["f1"] * 3
    assert len({a.id for a in alerts if a.state == "raised"}) == 4


def test_faults_of_one_field_have_alerts_of_their_own_that_clear_by_themselves() -> None:
    rows = quiet(30 * WINDOW)
    rows[300:, 1][np.random.default_rng(2).random(len(rows) - 300) < 0.1] = np.nan
    rows[900:1020, 1] = 0.25
    _, alerts = site().feed(rows)
    assert summarize(alerts) == [
        ("f1", "missing", "raised", 1),
        ("f1", "stuck", "raised", 1),
        ("f1", "stuck", "cleared", 1),
    ]
    assert [a.id for a in alerts] == ["f1/fault/1", "f1/fault/2", "f1/fault/2"]


def test_a_share_of_missing_values_that_grows_is_published_again() -> None:
    rows = quiet(60 * WINDOW)
    rng = np.random.default_rng(3)
    rows[600:, 1][rng.random(len(rows) - 600) < 0.05] = np.nan
    rows[1800:, 1][rng.random(len(rows) - 1800) < 0.5] = np.nan
    _, alerts = site().feed(rows)
    assert summarize(alerts) == [("f1", "missing", "raised", 1), ("f1", "missing", "raised", 2)]
    first, second = alerts
    assert first.id == second.id
    assert second.evidence["now"] > 2 * second.evidence["before"]
    assert "It grew" in second.summary
    assert second.to_body("task")["revision"] == 2
    assert "revision" not in first.to_body("task")


@pytest.mark.parametrize(("then", "word"), [(4.5, "grew"), (-3.0, "turned round")])
def test_a_drift_that_grows_or_turns_round_is_published_again(then: float, word: str) -> None:
    rows = quiet(60 * WINDOW)
    rows[600:, 1] += 2.0
    rows[1800:, 1] += then - 2.0
    _, alerts = site().feed(rows)
    drifts = [a for a in alerts if a.alert == "drift" and a.subject == "f1" and a.state == "raised"]
    assert [a.revision for a in drifts][:2] == [1, 2]
    assert word in drifts[1].summary
    assert drifts[1].evidence["shift"] == pytest.approx(then, abs=1.0)


def test_a_drift_that_stays_as_it_is_is_published_once() -> None:
    rows = quiet(200 * WINDOW)
    rows[600:, 1] += 1.5
    _, alerts = site().feed(rows)
    assert summarize([a for a in alerts if a.subject == "f1"]) == [("f1", "drift", "raised", 1)]


def test_a_drift_stays_open_where_the_field_is_read_in_another_unit_long_after() -> None:
    rows = quiet(60 * WINDOW)
    rows[600:, 1] += 2.0
    rows[1800:2400, 1] *= 1000
    _, alerts = site().feed(rows)
    assert summarize([a for a in alerts if a.subject == "f1"]) == [
        ("f1", "drift", "raised", 1),
        ("f1", "unit", "raised", 1),
        ("f1", "unit", "cleared", 1),
    ]


@pytest.mark.parametrize(("first", "then", "withdrawn"), [(3.0, 8.0, True), (2.0, 10.0, False)])
def test_a_drift_that_announced_another_unit_is_withdrawn(first: float, then: float, withdrawn: bool) -> None:
    rows = quiet(40 * WINDOW)
    rows[600:1200, 1] *= first
    rows[1200:, 1] *= then
    _, alerts = site().feed(rows)
    own = [a for a in alerts if a.subject == "f1"]
    ended = [("f1", "drift", "cleared", 1)] if withdrawn else []
    assert summarize(own) == [("f1", "drift", "raised", 1), *ended, ("f1", "unit", "raised", 1)]


def test_another_unit_that_comes_and_goes_is_no_reversed_sign() -> None:
    rows = quiet(60 * WINDOW)
    rows[600:, 1] *= np.where(np.arange(3000) // WINDOW % 3 == 2, 1.0, 9.8)
    _, alerts = site().feed(rows)
    assert summarize([a for a in alerts if a.subject == "f1"]) == [("f1", "unit", "raised", 1)]


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("change", [lambda v: 1000 * v + 5000, lambda v: v + 2.0], ids=["fault", "drift"])
def test_what_comes_and_goes_within_a_few_rows_is_one_alert(window: int, change: Callable[[Floats], Floats]) -> None:
    learned, rows = Site.learn("independent", window, 2, 3), QUIET["independent"](np.random.default_rng(4), 1200, 2)
    on = np.arange(1200) % 24 < 12
    rows[on, 1] = change(rows[on, 1])
    _, alerts = learned.feed(rows)
    of_field = [a for a in alerts if a.subject == "f1"]
    assert sum(a.state == "raised" and a.revision == 1 for a in of_field) in (1, 2)
    assert [a for a in of_field if a.state == "cleared"] == []


def test_an_alert_that_wavers_is_published_a_bounded_number_of_times() -> None:
    is_open, state, published = np.array([True]), Escalation.none((1,)), 0
    for window in range(20_000):
        size = 4.0 ** (window / 100) if window < 3000 else (-1.0) ** (window // 10) * 1e20
        state, again = state.update(np.array([window > 0]), is_open, np.array([size]))
        published += int(again[0])
    assert 5 <= published <= MAX_REVISIONS


def test_another_test_that_takes_over_is_no_turn() -> None:
    """A spread that stayed low was once called turned round, because the mean's score had become the larger one."""
    mean, spread = 0, 1
    raised = DriftSizes(np.array([0.5, -7.4]), np.zeros(2), np.array([spread]))
    tests = [np.array([mean, spread])]
    assert raised.sizes(tests, np.zeros(1)).tolist() == [-7.4]
    taken_over = replace(raised, z=np.array([5.9, -2.0]))
    assert taken_over.sizes(tests, np.array([-7.4])).tolist() == [-5.9]
    turned = replace(raised, z=np.array([1.0, 6.0]))
    assert turned.sizes(tests, np.array([-7.4])).tolist() == [6.0]
