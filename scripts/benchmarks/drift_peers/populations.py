"""Populations of rows in which nothing changes: the distributions, memories and cycles that sensors and tables have.

A stream of any population is reproducible from its seed. A day has 24 drift windows, whatever their number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks.drift_peers.synthetic import Floats, series

FIELDS = 6
WINDOWS_PER_DAY = 24
DAY_US = 86_400_000_000
BEGIN_US = 1_772_409_600_000_000  # Monday, 2 March 2026, 00:00 UTC
REGIMES = 3

Whole = NDArray[np.int64]


class Clock(msgspec.Struct, frozen=True):
    """Place of n rows in time: `day` (n,) fractional days since the stream began, and `rows` of a drift window."""

    day: Floats
    rows: int

    @classmethod
    def of_windows(cls, windows: int, rows: int) -> Clock:
        return cls(np.arange(windows * rows) / (rows * WINDOWS_PER_DAY), rows)

    @property
    def count(self) -> int:
        return len(self.day)

    @property
    def t(self) -> Whole:
        """(n,) epoch µs."""
        return BEGIN_US + np.rint(self.day * DAY_US).astype(np.int64)


Make = Callable[[np.random.Generator, Clock], Floats]


class Population(msgspec.Struct, frozen=True):
    """Population `name`: `make` returns rows (n, F).

    `labels` is the number of classes; the last column holds the class then. `model_rows` are the rows of a model
    window, `days` the days that a site learns from and `watched` the quiet windows of each site.
    """

    name: str
    make: Make
    labels: int = 0
    model_rows: int = 1
    days: float = 0.0
    watched: int = 120


def _normal(steady: float, fields: int = FIELDS) -> Make:
    return lambda rng, clock: series(rng, clock.count, steady, fields)


def _t3(rng: np.random.Generator, clock: Clock) -> Floats:
    return rng.standard_t(3, (clock.count, FIELDS))


def _lognormal(rng: np.random.Generator, clock: Clock) -> Floats:
    return np.exp(series(rng, clock.count, 0.5, FIELDS))


def _poisson(rng: np.random.Generator, clock: Clock) -> Floats:
    return rng.poisson([0.3, 1.0, 2.0, 4.0, 8.0, 20.0], (clock.count, FIELDS)).astype(np.float64)


def _binary(rng: np.random.Generator, clock: Clock) -> Floats:
    return (rng.random((clock.count, FIELDS)) < [0.5, 0.3, 0.1, 0.05, 0.02, 0.01]).astype(np.float64)


def _codes(rng: np.random.Generator, clock: Clock) -> Floats:
    """Make the rows of a census: an age, codes of skewed frequency, hours mostly 40, gains mostly 0."""
    n = clock.count
    age = np.clip(rng.gamma(6.0, 6.5, n), 17, 90).round()
    work = rng.choice(8, n, p=[0.70, 0.11, 0.08, 0.05, 0.03, 0.02, 0.008, 0.002])
    education = rng.choice(12, n, p=_zipf(12, 1.0))
    married = (rng.random(n) < 0.2 + 0.5 * (age > 28)).astype(np.float64)
    relation = np.where(
        married > 0, rng.choice(2, n, p=[0.8, 0.2]), rng.choice([2, 3, 4, 5], n, p=[0.5, 0.3, 0.15, 0.05])
    )
    race = rng.choice(5, n, p=[0.855, 0.096, 0.031, 0.01, 0.008])
    hours = np.where(rng.random(n) < 0.47, 40, np.clip(rng.normal(40, 14, n), 1, 99)).round()
    gain = np.where(rng.random(n) < 0.08, np.exp(rng.normal(8.5, 1.2, n)), 0).round()
    country = rng.choice(20, n, p=[0.9, *(0.1 * _zipf(19, 1.2))])
    return np.stack([age, work, education, married, relation, race, hours, gain, country], axis=1).astype(np.float64)


def _zipf(count: int, power: float) -> Floats:
    weights = 1 / np.arange(1.0, count + 1) ** power
    return np.asarray(weights / weights.sum())


def _quantised(rng: np.random.Generator, clock: Clock) -> Floats:
    return np.asarray(np.round(2 * series(rng, clock.count, 0.9, FIELDS)) / 2)


def _correlated(rng: np.random.Generator, clock: Clock) -> Floats:
    noise = series(rng, clock.count, 0.5, FIELDS + 1)
    return np.asarray(np.sqrt(0.1) * noise[:, :FIELDS] + np.sqrt(0.9) * noise[:, FIELDS:])


def _cycle(rng: np.random.Generator, clock: Clock) -> Floats:
    phase = 2 * np.pi * (clock.day[:, None] - np.arange(FIELDS) / 12)
    return np.asarray(np.sin(phase) + series(rng, clock.count, 0.5, FIELDS))


def _unequal_cycle(rng: np.random.Generator, clock: Clock) -> Floats:
    """Make a day whose spread is three times that of the night."""
    light = np.sin(2 * np.pi * (clock.day[:, None] - 0.25))
    return np.asarray(light + (0.65 + 0.35 * light) * series(rng, clock.count, 0.5, FIELDS))


def _weather(rng: np.random.Generator, clock: Clock) -> Floats:
    """Make sun, temperature, humidity, pressure, wind and load under clouds that last for hours and fronts for days."""
    hours = int(np.ceil(clock.day[-1] * 24)) + 2
    fronts = series(rng, hours, 0.97, 2)
    clouds = series(rng, hours, 0.8, 1)[:, 0]
    at = clock.day * 24
    front, gust, cloud = (np.interp(at, np.arange(hours), part) for part in (fronts[:, 0], fronts[:, 1], clouds))
    height = np.maximum(0.0, np.sin(2 * np.pi * (clock.day - 0.25)))
    clear = 1 / (1 + np.exp(-1.5 * (cloud - 0.7 * front)))
    noise = series(rng, clock.count, 0.9, FIELDS)
    sun = height * (0.25 + 0.75 * clear) * (1 + 0.05 * noise[:, 0])
    temperature = 15 + 5 * np.sin(2 * np.pi * (clock.day - 0.4)) - 2 * front + 0.3 * noise[:, 1]
    humidity = np.clip(60 - 2 * (temperature - 15) + 8 * front + noise[:, 2], 5, 100)
    pressure = 1013 - 6 * front + 0.3 * noise[:, 3]
    wind = np.exp(0.8 + 0.4 * gust + 0.3 * noise[:, 4])
    load = 2 + np.maximum(0.0, np.sin(2 * np.pi * (clock.day - 0.3))) + 0.2 * noise[:, 5]
    return np.stack([sun, temperature, humidity, pressure, wind, load], axis=1)


def _regimes(windows: float, *, known: bool) -> Make:
    """Make the rows of a machine with three regimes, two sd apart, with their mean duration in windows."""

    def make(rng: np.random.Generator, clock: Clock) -> Floats:
        regime = _last_for(rng, clock.count, windows * clock.rows, REGIMES)
        centers = np.random.default_rng(99).normal(0, 2, (REGIMES, FIELDS))
        spreads = np.random.default_rng(98).uniform(0.5, 1.5, (REGIMES, FIELDS))
        rows = centers[regime] + spreads[regime] * series(rng, clock.count, 0.5, FIELDS)
        return np.concatenate([rows, regime[:, None]], axis=1) if known else rows

    return make


def _rest(rng: np.random.Generator, clock: Clock) -> Floats:
    """Make the rows of sensors that rest at 0 for six rows in ten."""
    on = np.stack([_last_for(rng, clock.count, 20, 5) < 2 for _ in range(FIELDS)], axis=1)
    return np.where(on, 3 + series(rng, clock.count, 0.9, FIELDS), 0.0)


def _household(rng: np.random.Generator, clock: Clock) -> Floats:
    """Make a house's power: appliances that are on for minutes, of very different size."""
    count = 7
    watts = np.random.default_rng(97).lognormal(0, 1, (count, FIELDS)) * (
        np.random.default_rng(96).random((count, FIELDS)) < 0.4
    )
    state = _last_for(rng, clock.count, 12, count, _zipf(count, 1.3))
    base = 0.3 + 0.05 * series(rng, clock.count, 0.9, FIELDS)
    return np.asarray(base + watts[state] * (1 + 0.1 * series(rng, clock.count, 0.5, FIELDS)))


def _last_for(rng: np.random.Generator, n: int, rows: float, count: int, p: Floats | None = None) -> Whole:
    """Return a state (n,), one of `count`, that changes after `rows` on average."""
    begins = rng.random(n) < 1 / rows
    begins[0] = True
    return np.asarray(rng.choice(count, int(begins.sum()), p=p)[np.cumsum(begins) - 1])


POPULATIONS = (
    Population("independent", _normal(0.0)),
    Population("AR(0.9)", _normal(0.9)),
    Population("AR(0.99)", _normal(0.99)),
    Population("Student's t, 3 degrees", _t3),
    Population("log-normal", _lognormal),
    Population("Poisson", _poisson),
    Population("binary", _binary),
    Population("codes, as of a census", _codes),
    Population("quantised", _quantised),
    Population("correlated by 0.9", _correlated),
    Population("cycle of a day, equal spread", _cycle, days=3, watched=240),
    Population("cycle of a day, unequal spread", _unequal_cycle, days=3, watched=240),
    Population("weather", _weather, days=3, watched=240),
    Population("regimes of 4 windows, unknown", _regimes(4, known=False)),
    Population("regimes of 0.2 windows, unknown", _regimes(0.2, known=False)),
    Population("regimes of 4 windows, named", _regimes(4, known=True), labels=REGIMES),
    Population("one field", _normal(0.5, 1)),
    Population("64 fields", _normal(0.5, 64)),
    Population("rest values", _rest),
    Population("household", _household),
    Population("AR(0.9), model windows of 10 rows", _normal(0.9), model_rows=10),
)
