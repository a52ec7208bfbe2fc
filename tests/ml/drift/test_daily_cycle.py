"""Daily cycles: learned where they explain something, and then no night alarms."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from outstation.foundation.errors import BadBundle
from outstation.ml.drift import DriftMonitor, DriftWindowResult, MonitorSettings, Reference
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.detectors import daily_cycle

WINDOW, FIELDS = 60, ("a", "b", "c")


@cache
def shipped() -> Reference:
    rows = np.random.default_rng(0).normal(size=(60 * WINDOW, 3)).astype(np.float32)
    return build_reference(rows, np.arange(len(rows)), 1, np.zeros(len(rows), np.int64), None, WINDOW, fields=FIELDS)


def days(
    seed: int,
    count: int,
    *,
    learn: int,
    learn_s: float = 0.0,
    per_day: int = 24,
    late: float = 0.0,
    square: bool = False,
    extension: float = 4.0,
) -> tuple[list[DriftWindowResult], DriftMonitor]:
    """Verdicts on `count` days with a cycle in two of three fields; from the middle on, "c" is off by `late`."""
    rng = np.random.default_rng(seed)
    t = np.arange(count * per_day * WINDOW, dtype=np.int64) * (daily_cycle.DAY_US // (per_day * WINDOW))
    wave = np.sin(2 * np.pi * t / daily_cycle.DAY_US + 1)
    wave = (wave > 0.2) * 1.5 if square else wave
    rows = rng.normal(size=(len(t), 3))
    rows[:, 0] += wave
    rows[:, 1] *= 1 + 0.3 * wave
    rows[len(t) // 2 :, 2] += late
    monitor = DriftMonitor(
        MonitorSettings(
            shipped(), labels=(), window=WINDOW, learn_windows=learn, min_learn_s=learn_s, learn_extension=extension
        )
    )
    none = np.zeros(len(t), np.int64)
    _, verdicts = monitor.process_batch(
        monitor.start(), rows.astype(np.float32), np.arange(len(t)), 1, none, None, rows=(1, len(t)), t=t
    )
    return verdicts, monitor


def raised(verdicts: list[DriftWindowResult]) -> list[tuple[str, int]]:
    """Return the drifts; that the site has a cycle, which the shipped reference lacks, is a matter of its own."""
    return [(a.subject, v.index) for v in verdicts for a in v.alerts if a.state == "raised" and a.subject in FIELDS]


@pytest.mark.parametrize("square", [False, True])
def test_no_night_alarms_once_three_days_were_learned(square: bool) -> None:
    quiet = [days(seed, 10, learn=40, learn_s=3 * 86_400.0, square=square)[0] for seed in range(4)]
    assert [v.index for v in quiet[0] if v.learned_reference] == [73]
    assert sum(len(raised(verdicts)) for verdicts in quiet) <= 2
    site = next(v.learned_reference for v in quiet[0] if v.learned_reference)
    assert site.site is not None
    assert site.site.waves.any()
    assert site.site.to_dict()["daily"]


def test_drift_is_detected_despite_a_daily_cycle() -> None:
    verdicts, _ = days(1, 8, learn=72, late=1.0)
    assert ("c", 98) in raised(verdicts)
    assert {subject for subject, _ in raised(verdicts)} == {"c"}


def test_a_reference_of_some_hours_says_so_where_it_alarms_at_another_hour() -> None:
    verdicts, _ = days(2, 2, learn=24, per_day=96, extension=1.0)
    alerts = [a.summary for v in verdicts for a in v.alerts if a.state == "raised" and a.subject in FIELDS]
    assert "; or the time of day: this site's reference knows the hours 00, 01, 02, 03, 04, 05 UTC only" in alerts[0]


def test_where_the_hour_explains_nothing_there_are_no_waves() -> None:
    values = np.random.default_rng(0).normal(size=(96, 5))
    t = np.arange(96, dtype=np.int64) * daily_cycle.HOUR_US
    fit = daily_cycle.fit(values, t)
    assert not fit.waves.any()
    np.testing.assert_allclose(fit.mean, values.mean(0))


def test_waves_are_those_of_the_day() -> None:
    t = np.arange(96, dtype=np.int64) * daily_cycle.HOUR_US
    values = (3 + 2 * np.cos(2 * np.pi * t / daily_cycle.DAY_US))[:, None] + np.random.default_rng(0).normal(
        0, 0.1, (96, 1)
    )
    fit = daily_cycle.fit(values, t)
    assert fit.mean[0] == pytest.approx(3, abs=0.05)
    assert fit.waves[0, 0] == pytest.approx(2, abs=0.05)
    assert fit.residuals.std() < 0.15


@pytest.mark.parametrize(
    ("hours", "strata", "expected"),
    [(80, "auto", True), (60, "auto", False), (30, "hour", True), (80, "none", False), (10, "hour", False)],
)
def test_a_cycle_is_tested_after_three_days_or_on_request_after_one(hours: int, strata: str, expected: bool) -> None:
    assert daily_cycle.can_fit_daily(np.arange(hours, dtype=np.int64) * daily_cycle.HOUR_US, strata) is expected


def office(
    seed: int, count: int, *, learn_days: float, strata: str = "auto"
) -> tuple[list[DriftWindowResult], DriftMonitor]:
    """Days with a cycle in two of three fields that rests on Saturday and Sunday of another time zone."""
    rng = np.random.default_rng(seed)
    t = np.arange(count * 24 * WINDOW, dtype=np.int64) * (daily_cycle.HOUR_US // WINDOW)
    local = t - 7 * daily_cycle.HOUR_US
    works = (local // daily_cycle.DAY_US + 3) % 7 < 5
    wave = np.maximum(0, np.sin(2 * np.pi * (local / daily_cycle.DAY_US - 0.25))) * works
    rows = rng.normal(size=(len(t), 3)) + np.stack([1.5 * wave, -0.8 * wave, 0 * wave], axis=1)
    monitor = DriftMonitor(
        MonitorSettings(
            shipped(), labels=(), window=WINDOW, learn_windows=40, min_learn_s=learn_days * 86_400, seasonality=strata
        )
    )
    none = np.zeros(len(t), np.int64)
    state, verdicts = monitor.start(), []
    for begin in range(0, len(t), 14 * 24 * WINDOW):
        part = slice(begin, begin + 14 * 24 * WINDOW)
        state, more = monitor.process_batch(
            state, rows[part].astype(np.float32), np.arange(len(t[part])), 1, none[part], None,
            rows=(begin + 1, begin + len(t[part])), t=t[part],
        )  # fmt: skip
        verdicts += more
    return verdicts, monitor


def test_no_weekend_alarms_once_two_weeks_were_learned() -> None:
    alarms = 0
    for seed in range(3):
        verdicts, _ = office(seed, 42, learn_days=14)
        site = next(v.learned_reference for v in verdicts if v.learned_reference)
        assert site.site is not None
        assert site.site.to_dict()["weekly"]
        assert site.site.rest_lasts == 2 * daily_cycle.DAY_US
        begins = (site.site.rest_begins - 7 * daily_cycle.HOUR_US) / daily_cycle.DAY_US
        assert begins == pytest.approx(2, abs=0.4)
        alarms += len(raised(verdicts))
        assert Reference.from_json(site.to_json()).to_json() == site.to_json()
    # Of 2,016 windows: 12 weekends would raise far more.
    assert alarms <= 4


def test_weekends_widen_the_limits_where_only_the_hour_is_followed() -> None:
    by_hour, by_week = (
        next(v.learned_reference for v in office(0, 42, learn_days=14, strata=strata)[0] if v.learned_reference)
        for strata in ("hour", "auto")
    )
    assert by_hour.site is not None
    assert by_week.site is not None
    assert not by_hour.site.to_dict()["weekly"]
    assert by_hour.site.limits[0] * by_hour.test_sd[0] > 3 * by_week.site.limits[0] * by_week.test_sd[0]


def test_two_weeks_of_chance_have_no_days_of_rest() -> None:
    t = np.arange(14 * 24, dtype=np.int64) * daily_cycle.HOUR_US
    retained = [
        daily_cycle.fit(np.random.default_rng(seed).normal(size=(len(t), 8)), t).cycle.is_nonzero()
        for seed in range(20)
    ]
    assert not any(retained)


def test_two_weeks_that_disagree_have_no_days_of_rest() -> None:
    t = np.arange(14 * 24, dtype=np.int64) * daily_cycle.HOUR_US
    odd = ((t // daily_cycle.DAY_US) % 7 >= 5) * np.where(t < daily_cycle.WEEK_US, 3.0, -3.0)
    values = np.random.default_rng(0).normal(size=(len(t), 2)) + odd[:, None]
    assert not daily_cycle.fit(values, t).cycle.has_rest_days


@pytest.mark.parametrize(
    ("days", "strata", "expected"),
    [(14, "auto", True), (13, "auto", False), (7, "week", True), (6, "week", False), (20, "hour", False)],
)
def test_days_of_rest_need_two_weeks_or_one_when_configured(days: int, strata: str, expected: bool) -> None:
    assert daily_cycle.can_fit_weekly(np.arange(days * 24, dtype=np.int64) * daily_cycle.HOUR_US, strata) is expected


def test_the_spread_follows_the_hour_where_days_differ_more_than_nights() -> None:
    t = np.arange(5 * 24, dtype=np.int64) * daily_cycle.HOUR_US
    light = np.sin(2 * np.pi * t / daily_cycle.DAY_US)
    values = np.random.default_rng(0).normal(size=(len(t), 6)) * np.exp(light)[:, None]
    values[:, 5] /= np.exp(light)
    fit = daily_cycle.fit(values, t)
    factors = fit.cycle.evaluate_spread(t)
    assert (factors[:, 5] == 1).all()
    assert np.abs(np.log(factors[:, :5]) - light[:, None]).mean() < 0.25
    by_day = fit.residuals[light > 0.5, :5].std(), fit.residuals[light < -0.5, :5].std()
    assert 0.6 < by_day[0] / by_day[1] < 1.6


def pack_days(count: int, *, t: bool) -> Reference:
    """Build a shipped reference of readings that follow day and night, in windows of an hour."""
    rng = np.random.default_rng(5)
    at = np.arange(count * 24 * WINDOW, dtype=np.int64) * (daily_cycle.DAY_US // (24 * WINDOW))
    rows = rng.normal(0, 0.3, (len(at), 1))
    rows[:, 0] += np.where(at % daily_cycle.DAY_US < daily_cycle.DAY_US // 2, 4.0, 0.0)
    # The first half of a single day is all daylight.
    none = np.zeros(len(at), np.int64)
    return build_reference(
        rows.astype(np.float32), np.arange(len(at)), 1, none, None, WINDOW, fields=("light",), t=at if t else None
    )


def test_a_reference_of_day_and_night_names_its_fix() -> None:
    with pytest.raises(BadBundle, match=r"light mean\); give readings of three whole days with times, longer"):
        pack_days(1, t=True)


def test_a_reference_of_whole_days_is_packed_in_short_windows() -> None:
    assert pack_days(4, t=True).drift_windows == 96


def test_a_turned_sensor_is_recognized_against_what_its_hour_lets_expect() -> None:
    """Over a day its readings are symmetric: without the hour, the turned ones would fit as well as the others."""
    reversals = []
    for turned in (False, True):
        rng = np.random.default_rng(3)
        t = np.arange(6 * 24 * WINDOW, dtype=np.int64) * (daily_cycle.DAY_US // (24 * WINDOW))
        rows = rng.normal(size=(len(t), 3))
        rows[:, 0] += 6 * np.sin(2 * np.pi * t / daily_cycle.DAY_US)
        rows[4 * 24 * WINDOW :, 0] *= -1 if turned else 1
        none = np.zeros(len(t), np.int64)
        sunny = build_reference(rows.astype(np.float32), np.arange(len(t)), 1, none, None, WINDOW, fields=FIELDS, t=t)
        monitor = DriftMonitor(
            MonitorSettings(sunny, labels=(), window=WINDOW, learn_windows=40, min_learn_s=3 * 86_400.0)
        )
        _, verdicts = monitor.process_batch(
            monitor.start(), rows.astype(np.float32), np.arange(len(t)), 1, none, None, rows=(1, len(t)), t=t
        )
        alerts = [alert for verdict in verdicts for alert in verdict.alerts if alert.alert == "fault"]
        reversals.append([alert.evidence["fault"] for alert in alerts if alert.state == "raised"])
    assert reversals[0] == []
    assert reversals[1][:1] == ["reversed"]
