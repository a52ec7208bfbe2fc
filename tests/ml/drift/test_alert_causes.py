"""Causes that drift alerts name: by what a field is, and by what else explains it."""

from __future__ import annotations

import numpy as np
import pytest

from outstation.ml.drift import DriftMonitor, MonitorSettings
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.detectors import daily_cycle
from outstation.protocol.alerts.alert import Alert

WINDOW = 60


def alerts_of(rows: np.ndarray, shipped_rows: np.ndarray, t: np.ndarray, **options: object) -> list[Alert]:
    fields = tuple(f"f{i}" for i in range(rows.shape[1]))
    count = len(shipped_rows)
    none = np.zeros(count, np.int64)
    shipped = build_reference(shipped_rows.astype(np.float32), np.arange(count), 1, none, None, WINDOW, fields=fields)
    monitor = DriftMonitor(MonitorSettings(shipped, labels=(), window=WINDOW, **options))  # type: ignore[arg-type]
    none = np.zeros(len(rows), np.int64)
    _, results = monitor.process_batch(
        monitor.start(), rows.astype(np.float32), np.arange(len(rows)), 1, none, None, rows=(1, len(rows)), t=t
    )
    return [a for r in results for a in r.alerts if a.alert == "drift" and a.state == "raised"]


def codes(rng: np.random.Generator, rows: int, high: float) -> np.ndarray:
    return rng.choice(6, (rows, 2), p=[(1 - high) / 3] * 3 + [high / 3] * 3).astype(np.float64)


@pytest.mark.parametrize(
    ("roles", "cause"), [((), "another mix"), (("computed", "computed"), "computed from"), (("sensor", "sensor"), "")]
)
def test_codes_and_computed_columns_have_no_gain(roles: tuple[str, ...], cause: str) -> None:
    rng = np.random.default_rng(1)
    rows = np.concatenate([codes(rng, 45 * WINDOW, 0.3), codes(rng, 20 * WINDOW, 0.8)])
    t = np.arange(len(rows)) * 1_000_000
    alerts = alerts_of(rows, codes(rng, 60 * WINDOW, 0.3), t, roles=roles, seasonality="none")
    assert {a.subject for a in alerts} >= {"f0", "f1"}
    text = " ".join(a.summary for a in alerts if a.evidence["test"] in ("mean", "spread"))
    assert cause in text
    assert ("gain" in text or "offset" in text) == (cause == "")


@pytest.mark.parametrize("hour", [6, 18])
def test_a_gain_follows_the_mean_of_its_hour(hour: int) -> None:
    """At 6 the mean is three times that of the day, at 18 a third of it: half of it is neither more nor no change."""

    def make(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
        level = 6 * np.exp(1.1 * np.sin(2 * np.pi * t / daily_cycle.DAY_US))
        return np.asarray(level[:, None] * (1 + 0.1 * rng.normal(size=(len(t), 2))))

    rng, every = np.random.default_rng(5), daily_cycle.DAY_US // (24 * WINDOW)
    t = np.arange(8 * 24 * WINDOW) * every
    rows = make(rng, t)
    rows[t >= 6 * daily_cycle.DAY_US + (hour - 1) * daily_cycle.HOUR_US, 0] *= 0.5
    alerts = alerts_of(rows, make(rng, t[: 5 * 24 * WINDOW]), t, min_learn_s=4 * 86_400.0)
    own = [a.summary for a in alerts if a.subject == "f0" and a.evidence["test"] in ("mean", "spread")]
    assert "gain loss" in own[0]


def test_a_clock_that_is_an_hour_late_is_named() -> None:
    def make(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
        phase = 2 * np.pi * t / daily_cycle.DAY_US
        cycles = np.stack([3 * np.sin(phase + 1), 3 * np.cos(phase), 3 * np.sin(phase - 1)], axis=1)
        return np.asarray(cycles + rng.normal(size=(len(t), 3)))

    rng, every = np.random.default_rng(2), daily_cycle.DAY_US // (24 * WINDOW)
    t = np.arange(9 * 24 * WINDOW) * every
    shifted = np.where(t > 5 * daily_cycle.DAY_US, t - daily_cycle.HOUR_US, t)
    alerts = alerts_of(make(rng, shifted), make(rng, t[: 5 * 24 * WINDOW]), t, min_learn_s=4 * 86_400.0)
    named = [a.summary for a in alerts if "the clock or time zone" in a.summary]
    assert named
    assert "hour earlier" in named[0]
