"""What a site's statistics do in the course of a day, so that no night alarms.

Each test's values over the learned windows are fitted with a few waves of a day, by least squares; the fit is kept only
where the hour explains a good part of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agent.drift.codec import Floats, Ints

DAY_US = 86_400_000_000
HOUR_US = DAY_US // 24
WAVES = 3  # of one day, a half and a third
DAYS = 3  # learned, before a cycle is looked for unasked
HOURS = 12  # of the day that were seen
EXPLAINS = 0.2  # share of the variance, beyond what as many waves explain by chance
ODD = 6.0  # robust sd from the fit: drawn in


@dataclass(frozen=True, eq=False)
class Fit:
    """Of values (K, T): `mean` (T,), `waves` (2W, T), zero where there is no cycle, and what is `left` (K, T)."""

    mean: Floats
    waves: Floats
    left: Floats


def told(t: Ints, strata: str) -> bool:
    """Whether windows at `t` (K,) can tell a daily cycle, or are asked to (`strata` hour)."""
    if strata == "none" or len(t) < 2:
        return False
    days = (int(t.max()) - int(t.min())) / DAY_US
    seen = len(np.unique(t // HOUR_US % 24))
    # The last window of a day that was watched begins a window before its end.
    return seen >= HOURS and days >= (0.9 if strata == "hour" else DAYS - 0.1)


def fit(values: Floats, t: Ints) -> Fit:
    """Of tests' values (K, T) of windows in the middle of `t` (K,) epoch µs."""
    windows = len(values)
    design = np.concatenate([np.ones((windows, 1)), waves(t)], axis=1)
    middle = np.median(values, axis=0)
    reach = ODD * 1.4826 * np.median(np.abs(values - middle), axis=0) + 1e-12
    drawn = np.clip(values, middle - reach, middle + reach)
    found, *_ = np.linalg.lstsq(design, drawn, rcond=None)
    # What each window differs from a fit without it.
    leverage = (design * np.linalg.pinv(design).T).sum(1)
    left = (values - design @ found) / np.maximum(1 - leverage, 0.1)[:, None]
    plain = values - values.mean(0)
    explained = 1 - (left**2).mean(0) / np.maximum((plain**2).mean(0), 1e-24)
    cycle = explained > EXPLAINS
    return Fit(
        mean=np.where(cycle, found[0], values.mean(0)),
        waves=np.where(cycle, found[1:], 0.0),
        left=np.where(cycle, left, plain),
    )


def waves(t: Ints) -> Floats:
    """(n, 2W) of times (n,) epoch µs."""
    phase = 2 * np.pi * (np.asarray(t)[:, None] % DAY_US) / DAY_US * np.arange(1, WAVES + 1)
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=1)


def hours(t: Ints) -> Ints:
    """(24,) how many windows were in each hour of the day, UTC."""
    return np.bincount(np.asarray(t) // HOUR_US % 24, minlength=24)
