"""Rows of sensors without a fault, of many kinds, and faults to put into them.

A kind's rows look odd but are honest: a machine that holds a level, codes cut off at a top, a signal that seldom moves.
What a site had while it learned is no fault later.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.ml.drift import DriftMonitor, DriftState, MonitorSettings
from outstation.ml.drift.baseline.learning import build_reference
from outstation.protocol.alerts.alert import Alert

Floats = NDArray[np.float64]
EVERY_US = 1_000_000
BEGIN_US = 1_700_000_000_000_000
LEARN = 40  # drift windows of a site


def _ar(rng: np.random.Generator, rows: int, fields: int, steady: float) -> Floats:
    noise = rng.normal(size=(rows, fields)) * np.sqrt(1 - steady**2)
    out, now = np.empty_like(noise), rng.normal(size=fields)
    for row, step in enumerate(noise):
        now = steady * now + step
        out[row] = now
    return np.asarray(out)


def independent(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    return np.asarray(rng.normal(size=(rows, fields)))


def autocorrelated(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    return _ar(rng, rows, fields, 0.9)


def slow(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    """Wander as air pressure does: a few hours tell little of the levels to come."""
    return np.asarray(_ar(rng, rows, fields, 0.9995) + 0.05 * rng.normal(size=(rows, fields)))


def integers(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    return np.asarray(np.round(3 * _ar(rng, rows, fields, 0.9)))


def counts(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    return rng.poisson(2.0, (rows, fields)).astype(np.float64)


def heavy_tailed(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    return rng.standard_t(3, (rows, fields))


def plateaus(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    """Drive a machine to a level of its own and hold it there, again and again."""
    out = np.empty((rows, fields))
    for field in range(fields):
        at = 0
        while at < rows:
            ramp, hold = int(rng.integers(20, 60)), int(rng.integers(10, 40))
            level = float(rng.normal(10, 2))
            cycle = np.concatenate([np.linspace(0, level, ramp) + rng.normal(0, 0.05, ramp), np.full(hold, level)])
            out[at : at + len(cycle), field] = cycle[: rows - at]
            at += len(cycle)
    return out


def top_coded(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    """Cut values off at a top, as ages and incomes of a census are; few rows reach it."""
    return np.minimum(np.round(np.exp(rng.normal(3, 0.7, (rows, fields))), 1), 60.0)


def quantized(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    return np.asarray(np.round(_ar(rng, rows, fields, 0.98) * 2) / 2)


def resting(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    """Return a light that is off for long, many times in each window of 60 rows."""
    active = _ar(rng, rows, fields, 0.7) > 0.4
    return np.where(active, np.abs(rng.normal(50, 15, (rows, fields))), 0.0)


def steep(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    """Switch a machine between far levels in each window."""
    level = np.where(np.cumsum(rng.random((rows, fields)) < 1 / 4, axis=0) % 2, 100.0, 1.0)
    return np.asarray(level + rng.normal(0, 1, (rows, fields)))


def patchy(rng: np.random.Generator, rows: int, fields: int) -> Floats:
    """Drop a few readings in a row, as a radio does."""
    out, lost = _ar(rng, rows, fields, 0.9), np.zeros((rows, fields), np.bool_)
    for row, field in np.argwhere(rng.random((rows, fields)) < 0.002).tolist():
        lost[row : row + int(rng.integers(1, 10)), field] = True
    out[lost] = np.nan
    return out


QUIET: dict[str, Callable[[np.random.Generator, int, int], Floats]] = {
    each.__name__: each
    for each in (
        independent,
        autocorrelated,
        slow,
        integers,
        counts,
        heavy_tailed,
        plateaus,
        top_coded,
        quantized,
        resting,
        steep,
        patchy,
    )
}


# What a faulty sensor makes of values (n,).
FAULTS: dict[str, Callable[[Floats], Floats]] = {
    "stuck": lambda values: np.full(len(values), 0.25),
    "scale": lambda values: 1000 * values,
    "clip": lambda values: np.minimum(values, np.quantile(values, 0.7)),
    "spikes": lambda values: values + 60 * (np.arange(len(values)) % 20 == 0),
}


class Site(msgspec.Struct, frozen=True):
    """A site that has learned its reference from rows of one kind, in drift windows of `window` rows."""

    monitor: DriftMonitor
    state: DriftState

    @classmethod
    def learn(
        cls, kind: str, window: int, fields: int, seed: int, *, learn: int = LEARN, units: tuple[str, ...] = ()
    ) -> Site:
        """Learn from `learn` drift windows; the shipped reference comes from other rows of that kind."""
        make, names = QUIET[kind], tuple(f"f{field}" for field in range(fields))
        count = max(learn * window, min(3000, 400 * window))
        rows = make(np.random.default_rng([seed, 0]), count, fields)
        shipped = build_reference(
            rows.astype(np.float32), np.arange(count), 1, np.zeros(count, np.int64), None, window, fields=names
        )
        monitor = DriftMonitor(
            MonitorSettings(shipped, labels=(), window=window, learn_windows=learn, units=units, seasonality="none")
        )
        site, rng = cls(monitor, monitor.start()), np.random.default_rng([seed, 1])
        # Windows that are like their neighbors are learned for longer.
        for windows in (learn + 4, 4 * learn):
            site, _ = site.feed(make(rng, windows * window, fields))
            if site.state.site_reference is not None:
                break
        return site

    def feed(self, rows: Floats, *, batch: int = 5000) -> tuple[Site, list[Alert]]:
        """Return the site after these rows, and the alerts that they raised and cleared."""
        state, alerts = self.state, []
        for at in range(0, len(rows), batch):
            part, first = rows[at : at + batch].astype(np.float32), max(0, state.last_counted_row) + 1
            none = np.zeros(len(part), np.int64)
            state, results = self.monitor.process_batch(
                state, part, np.arange(len(part)), 1, none, None,
                rows=(first, first + len(part) - 1), t=BEGIN_US + np.arange(first, first + len(part)) * EVERY_US,
            )  # fmt: skip
            alerts += [alert for result in results for alert in result.alerts]
        return Site(self.monitor, state), alerts

    def rows_until(self, rows: Floats, is_awaited: Callable[[Alert], bool], piece: int) -> int | None:
        """Return after how many rows, in pieces, an awaited alert was raised."""
        site = self
        for at in range(0, len(rows), piece):
            site, alerts = site.feed(rows[at : at + piece])
            if any(alert.state == "raised" and is_awaited(alert) for alert in alerts):
                return min(at + piece, len(rows))
        return None
