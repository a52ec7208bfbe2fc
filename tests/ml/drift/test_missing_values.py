"""Missing values: a field that stops is reported after as many rows whatever the windows, and usual gaps never are."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from outstation.foundation.arrays import Ints
from outstation.ml.drift import DriftMonitor, MonitorSettings
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.baseline.missing_values import MissingBaseline
from outstation.ml.drift.faults.missing_values import MissingValues
from outstation.protocol.alerts.alert import Alert
from scripts.benchmarks.drift_peers.sensor_rows import QUIET, Site


@cache
def learned_site(kind: str, window: int, fields: int) -> Site:
    site = Site.learn(kind, window, fields, 5)
    assert site.state.site_reference is not None
    return site


def with_gaps(kind: str, rows: int, fields: int, share: float, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng([seed, 7])
    values = QUIET[kind](rng, rows, fields)
    values[rng.random(rows) < share, fields - 1] = np.nan
    return values


def is_missing(alert: Alert) -> bool:
    return alert.evidence.get("fault") == "missing"


@pytest.mark.parametrize("window", [1, 8, 60, 250])
@pytest.mark.parametrize("fields", [1, 16])
def test_a_field_that_stops_is_reported_after_few_rows_in_windows_of_any_length(window: int, fields: int) -> None:
    site = learned_site("integers", window, fields)
    rows = site.rows_until(with_gaps("integers", 500, fields, 1.0), is_missing, window)
    assert rows is not None
    assert rows <= max(16, window)
    half = site.rows_until(with_gaps("integers", 500, fields, 0.5), is_missing, window)
    assert half is not None
    assert half <= max(40, window)


@pytest.mark.parametrize(("window", "share", "rows"), [(60, 0.03, 480), (60, 0.1, 120), (8, 0.03, 480), (8, 0.1, 120)])
def test_a_few_missing_values_add_up_over_short_windows(window: int, share: float, rows: int) -> None:
    site = learned_site("autocorrelated", window, 4)
    delays = [
        site.rows_until(with_gaps("autocorrelated", 3000, 4, share, seed), is_missing, window) for seed in range(7)
    ]
    assert sorted(10_000 if delay is None else delay for delay in delays)[3] <= rows


def test_a_field_that_stops_before_the_site_has_learned_is_reported() -> None:
    fresh = Site(learned_site("integers", 8, 4).monitor, learned_site("integers", 8, 4).monitor.start())
    assert fresh.rows_until(with_gaps("integers", 100, 4, 1.0), is_missing, 8) == 8
    half = fresh.rows_until(with_gaps("integers", 400, 4, 0.45), is_missing, 8)
    assert half is not None
    assert half <= 48


@pytest.mark.parametrize(("window", "fields"), [(8, 4), (60, 4), (250, 1), (8, 32)])
def test_gaps_as_they_were_learned_are_no_fault(window: int, fields: int) -> None:
    site = learned_site("patchy", window, fields)
    _, alerts = site.feed(QUIET["patchy"](np.random.default_rng([2, window]), 150 * window, fields))
    assert [alert.summary for alert in alerts if is_missing(alert)] == []


def test_the_alert_counts_values_since_the_field_stopped_and_clears_once_they_come_again() -> None:
    site, good = learned_site("integers", 8, 4), QUIET["integers"](np.random.default_rng(1), 400, 4)
    broken, alerts = site.feed(with_gaps("integers", 64, 4, 1.0))
    assert [(a.subject, a.state) for a in alerts if is_missing(a)] == [("f3", "raised")]
    assert alerts[0].summary.startswith("f3: 100% of values are missing (8 of 8 since ")
    repaired, alerts = broken.feed(good)
    assert [(a.subject, a.state) for a in alerts if is_missing(a)] == [("f3", "cleared")]
    assert not repaired.state.faults.any_open


def test_a_share_that_stays_high_is_not_cleared_by_a_few_windows_without_gaps() -> None:
    site = learned_site("integers", 8, 4)
    _, alerts = site.feed(with_gaps("integers", 4000, 4, 0.1))
    assert [(a.state, a.revision) for a in alerts if is_missing(a)] == [("raised", 1)]


def test_each_window_is_charted_once_while_a_site_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    site, charted = learned_site("integers", 8, 4), 0
    update = MissingValues.update

    def count(chart: MissingValues, missing: Ints, rows: int, t: int, baseline: MissingBaseline) -> MissingValues:
        nonlocal charted
        charted += 1
        return update(chart, missing, rows, t, baseline)

    monkeypatch.setattr(MissingValues, "update", count)
    rows = with_gaps("integers", 8 * 30, 4, 0.01)
    Site(site.monitor, site.monitor.start()).feed(rows)
    assert charted <= 30
    assert charted > 0


def test_windows_without_missing_values_change_nothing() -> None:
    baseline = MissingBaseline.from_totals(np.zeros(3, np.int64), np.full(3, 1000))
    chart = MissingValues.empty(3)
    assert chart.update(np.zeros(3, np.int64), 60, 1, baseline) is chart


def test_the_evidence_does_not_depend_on_how_rows_fall_into_windows() -> None:
    baseline = MissingBaseline.from_totals(np.zeros(1, np.int64), np.full(1, 1000))
    whole = MissingValues.empty(1).update(np.array([3]), 30, 1, baseline)
    parts = MissingValues.empty(1)
    for _ in range(3):
        parts = parts.update(np.array([1]), 10, 1, baseline)
    np.testing.assert_allclose(parts.evidence, whole.evidence)
    assert (parts.rows, parts.missing) == (whole.rows, whole.missing)


def test_a_site_with_a_few_missing_values_still_learns_its_reference() -> None:
    rng, window = np.random.default_rng(5), 60
    sound = rng.normal(size=(60 * window, 2)).astype(np.float32)
    none, starts = np.zeros(60 * window, np.int64), np.arange(60 * window)
    shipped = build_reference(sound, starts, 1, none, None, window, fields=("a", "b"))
    monitor = DriftMonitor(MonitorSettings(shipped, labels=(), window=window, learn_windows=40))
    rows = rng.normal(size=(60 * window, 2)).astype(np.float32)
    rows[rng.random(len(rows)) < 0.03, 1] = np.nan
    state, results = monitor.process_batch(
        monitor.start(), rows, starts, 1, none, None, rows=(1, len(rows)), t=starts * 1_000_000
    )
    kinds = [alert.evidence.get("fault") for result in results for alert in result.alerts if alert.state == "raised"]
    assert "missing" in kinds
    assert state.site_reference is not None
