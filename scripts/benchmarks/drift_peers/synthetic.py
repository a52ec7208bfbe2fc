"""Synthetic rows with and without a change: 16 fields, the model's answer and its certainty.

All columns derive from independent standard normal series. Rows are either independent or autocorrelated with 0.9, as
readings of real sensors are. Any part of a site's rows is reproducible.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Table = NDArray[np.float32]  # (n, COLUMNS): fields, the answer's number, its certainty

FIELDS = 16
# The remaining columns of a table, and a subject that is not a column.
ANSWER, CERTAINTY, JOINT = FIELDS, FIELDS + 1, FIELDS + 2
COLUMNS = FIELDS + 2
ROWS = 500  # of a window
LEARN = 40  # windows
WATCHED = 20  # windows within which a change has to be detected
RAMP = 10  # windows
SHARES = (0.4, 0.3, 0.2, 0.1)  # of the answers
OTHER_SHARES = (0.25, 0.45, 0.2, 0.1)
BLOCK = 125  # rows generated at once


class Kind(msgspec.Struct, frozen=True):
    """Autocorrelation of rows: each depends on the previous one by `steady`."""

    name: str
    steady: float


KINDS = (Kind("independent", 0.0), Kind("AR(0.9)", 0.9))


class Change(msgspec.Struct, frozen=True):
    """A change: `of` transforms series (n, FIELDS); a detection must name one of `subjects`."""

    name: str
    subjects: tuple[int, ...]
    transform: Callable[[Floats], Floats]
    shares: tuple[float, ...] = SHARES


QUARTER, HALF, WIDER, RAMPED, TOGETHER, ANSWERS = (
    "+0.25 sd", "+0.5 sd", "variance × 1.5", "ramp to 0.5 sd", "correlation 0.5", "label shares",
)  # fmt: skip


def changes(fields: int) -> tuple[Change, ...]:
    """Return changes of the first `fields` fields (at least two for their correlation) and of the answers."""
    first_fields, several = tuple(range(fields)), tuple(range(max(2, fields)))
    return (
        Change(QUARTER, first_fields, _first(fields, lambda series: series + 0.25)),
        Change(HALF, first_fields, _first(fields, lambda series: series + 0.5)),
        Change(WIDER, first_fields, _first(fields, lambda series: series * np.sqrt(1.5))),
        Change(RAMPED, first_fields, _first(fields, _ramped)),
        Change(TOGETHER, (*several, JOINT), _first(len(several), _correlated)),
        Change(ANSWERS, (ANSWER,), lambda series: series, OTHER_SHARES),
    )


def training(kind: Kind) -> Table:
    """Return the rows of a bundle's reference."""
    return table(kind, (0,), LEARN)


def learning(kind: Kind, site: int) -> Table:
    """Return the rows of a site's learning phase."""
    return table(kind, (1, site), LEARN)


def quiet(kind: Kind, site: int, windows: int) -> Table:
    return table(kind, (2, site), windows)


def trial(kind: Kind, site: int, number: int, change: Change) -> Table:
    return table(kind, (3, site, number), WATCHED, change)


def table(kind: Kind, seed: tuple[int, ...], windows: int, change: Change | None = None) -> Table:
    """Return the rows of the given number of windows; a longer table begins with the same rows."""
    made = series(np.random.default_rng(seed), windows * ROWS, kind.steady)
    fields, answer, certainty = made[:, :FIELDS], made[:, ANSWER], made[:, CERTAINTY]
    shares = SHARES if change is None else change.shares
    columns = [
        fields if change is None else change.transform(fields),
        np.searchsorted(_normal_quantiles(shares), answer)[:, None],
        (0.5 + 0.5 / (1 + np.exp(-1.5 * certainty - 1)))[:, None],
    ]
    return np.concatenate(columns, axis=1).astype(np.float32)


def series(rng: np.random.Generator, rows: int, steady: float, columns: int = COLUMNS) -> Floats:
    """Return series (rows, columns) of mean 0 and variance 1."""
    before = rng.normal(size=columns)
    noise = rng.normal(size=(-(-rows // BLOCK), BLOCK, columns))
    if not steady:
        return noise.reshape(-1, columns)[:rows]
    back = np.subtract.outer(np.arange(BLOCK), np.arange(BLOCK))
    within = np.where(back >= 0, np.sqrt(1 - steady**2) * steady ** np.abs(back), 0.0) @ noise
    fading = steady ** np.arange(1, BLOCK + 1)[:, None]
    for block in within:
        block += fading * before
        before = block[-1]
    return np.asarray(within.reshape(-1, columns)[:rows])


def _first(count: int, change: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    return lambda series: np.concatenate([change(series[:, :count]), series[:, count:]], axis=1)


def _ramped(series: Floats) -> Floats:
    return series + 0.5 * np.minimum(1, np.arange(len(series)) / (RAMP * ROWS))[:, None]


def _correlated(series: Floats) -> Floats:
    """Correlate each pair of fields by 0.5, with variance 1."""
    count = series.shape[1]
    return np.asarray(series @ np.linalg.cholesky(np.full((count, count), 0.5) + 0.5 * np.eye(count)).T)


def _normal_quantiles(shares: tuple[float, ...]) -> Floats:
    return np.array([NormalDist().inv_cdf(p) for p in np.cumsum(shares[:-1])])
