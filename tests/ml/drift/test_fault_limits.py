"""Fault limits: honest sites of many kinds raise no fault, and faults are still reported there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.ml.drift.baseline.fault_limits import FaultLimits, extrapolate
from scripts.benchmarks.drift_peers import sensor_rows
from scripts.benchmarks.drift_peers.sensor_rows import QUIET, Floats, Site


@cache
def learned_site(kind: str, window: int, fields: int = 4) -> Site:
    return Site.learn(kind, window, fields, 1)


def rows_of(kind: str, rows: int, fields: int = 4, seed: int = 0) -> NDArray[np.float64]:
    return QUIET[kind](np.random.default_rng([seed, 3]), rows, fields)


@pytest.mark.parametrize("window", [8, 60])
@pytest.mark.parametrize("kind", [kind for kind in QUIET if kind != "patchy"])
def test_what_an_honest_site_does_is_no_fault(kind: str, window: int) -> None:
    site = learned_site(kind, window)
    _, alerts = site.feed(rows_of(kind, 2000 if window == 8 else 6000))
    assert [alert.summary for alert in alerts if alert.alert == "fault"] == []


@pytest.mark.parametrize("kind", ["plateaus", "top_coded", "steep", "resting", "heavy_tailed"])
def test_an_honest_site_learns_its_reference_without_a_fault(kind: str) -> None:
    assert learned_site(kind, 60).state.site_reference is not None


@pytest.mark.parametrize(
    ("fault", "names"), [("stuck", {"stuck"}), ("scale", {"unit"}), ("clip", {"saturated"}), ("spikes", {"spikes"})]
)
@pytest.mark.parametrize("kind", ["autocorrelated", "independent"])
def test_faults_are_reported_where_limits_were_learned(kind: str, fault: str, names: set[str]) -> None:
    rows = rows_of(kind, 40 * 60)
    rows[600:, 2] = sensor_rows.FAULTS[fault](rows[600:, 2])
    _, alerts = learned_site(kind, 60).feed(rows)
    raised = [(a.subject, a.evidence["fault"]) for a in alerts if a.alert == "fault" and a.state == "raised"]
    assert raised
    assert {subject for subject, _ in raised} == {"f2"}
    assert {name for _, name in raised} & names


@pytest.mark.parametrize(
    "change", [lambda z: 1000 * z, lambda z: z + 300, lambda z: np.where(np.arange(len(z)) % 9, z, z + 9)]
)
def test_a_slow_field_is_out_of_range_far_outside_or_after_a_jump(change: Callable[[Floats], Floats]) -> None:
    rows = rows_of("slow", 30 * 60)
    rows[600:, 2] = change(rows[600:, 2])
    _, alerts = learned_site("slow", 60).feed(rows)
    raised = {(a.subject, a.evidence["fault"]) for a in alerts if a.alert == "fault" and a.state == "raised"}
    assert raised
    assert raised <= {("f2", "out_of_range"), ("f2", "unit"), ("f2", "spikes")}


def test_a_field_without_a_unit_is_not_accused_of_another_unit() -> None:
    rows = rows_of("autocorrelated", 20 * 60)
    rows[600:, 2] *= 9.80665
    _, alerts = learned_site("autocorrelated", 60).feed(rows)
    assert "m/s²" not in " ".join(alert.summary for alert in alerts)


def test_limits_lie_above_what_was_learned_and_are_zero_where_nothing_showed() -> None:
    shares = np.random.default_rng(0).exponential(0.01, (40, 2))
    assert (extrapolate(shares) > shares.max(0)).all()
    assert extrapolate(np.zeros((40, 2))).tolist() == [0.0, 0.0]
    assert (extrapolate(shares, windows=2) < extrapolate(shares)).all()


def test_a_site_takes_the_shipped_limits_too() -> None:
    shipped = replace(FaultLimits.none(2), outside=np.full(2, 0.2), misfit=np.full(2, 9.0))
    merged = FaultLimits.none(2).merge(shipped)
    assert merged.outside.tolist() == [0.2, 0.2]
    assert merged.misfit.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("window", [1, 4, 8, 60])
def test_a_stuck_sensor_is_reported_in_windows_shorter_than_its_run(window: int) -> None:
    rows = rows_of("autocorrelated", 400)
    rows[120:, 2] = 0.25
    _, alerts = learned_site("autocorrelated", window).feed(rows)
    stuck = [a for a in alerts if a.evidence.get("fault") == "stuck"]
    assert [(a.subject, a.state) for a in stuck][:1] == [("f2", "raised")]
    assert stuck[0].evidence["rows"][1] - stuck[0].evidence["rows"][0] < window


@pytest.mark.parametrize("window", [1, 8])
def test_a_light_that_is_off_for_long_is_not_stuck_in_short_windows(window: int) -> None:
    rows = rows_of("resting", 400)
    rows[100:300] = 0.0
    _, alerts = learned_site("resting", window).feed(rows)
    assert "stuck" not in {a.evidence.get("fault") for a in alerts}


@pytest.mark.parametrize("window", [1, 2, 8, 60])
def test_readings_far_outside_are_reported_in_windows_of_any_length(window: int) -> None:
    rows = rows_of("autocorrelated", 360)
    rows[120:, 2] += 100.0
    _, alerts = learned_site("autocorrelated", window).feed(rows)
    assert [(a.subject, a.evidence["fault"]) for a in alerts if a.alert == "fault"] == [("f2", "out_of_range")]


def stations(rng: np.random.Generator, rows: int, fields: int) -> NDArray[np.float64]:
    """Return rows of three stations in random turn, held for 40 rows; how far they are apart changes with the day."""
    hours = rows // 40 + 1
    distance = np.repeat(rng.lognormal(0, 0.7, (hours // 24 + 1, 1, fields)), 24, axis=0)[:hours]
    at_station = rng.normal(0, 1, (hours, 1, fields)) + distance * rng.normal(0, 1, (hours, 3, fields))
    return np.asarray(np.round(at_station, 2)[np.arange(rows) // 40, rng.integers(0, 3, rows)])


def test_held_values_that_differ_more_than_usual_are_no_coarser_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Air humidity of three airports, held for an hour, was called coarser on days on which they differed more."""
    monkeypatch.setitem(QUIET, "stations", stations)
    seed = 0
    site, rng = Site.learn("stations", 250, 4, seed), np.random.default_rng([seed, 2])
    _, alerts = site.feed(stations(rng, 50_000, 4))
    assert "quantized" not in {alert.evidence.get("fault") for alert in alerts}
    coarse = stations(rng, 5_000, 4)
    coarse[:, 1] = np.round(coarse[:, 1])
    _, alerts = site.feed(coarse)
    assert {alert.subject for alert in alerts if alert.evidence.get("fault") == "quantized"} == {"f1"}
