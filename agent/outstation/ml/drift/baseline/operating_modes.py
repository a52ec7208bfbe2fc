"""Operating modes that nobody named: clusters of learned drift windows that last, such as pumping and idling.

Where windows of a few modes differ much more than windows within one, each window is compared with its nearest mode.
A window in which the machine changed its mode lies between two of them in several fields at once, and is not tested.
Distances are robust: no single field decides which mode a window belongs to, so its drift is no other mode.

Sources: Kaufman & Rousseeuw (1990), Finding Groups in Data, chapter 2, for medoids. Schwarz (1978), Estimating the
dimension of a model, Annals of Statistics 6, for the number of modes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints
from outstation.ml.drift.numeric.outliers import MIN_SD
from outstation.ml.drift.numeric.sums import median

MAX_MODES = 4
MIN_MODE_WINDOWS, MIN_MODE_VISITS = 8, 3
MIN_VISIT_WINDOWS = 2.0  # that a visit lasts on average: what changes with each window is no mode
FIELD_CLIP = 6.0  # noise sd, the most that one field says against a mode
MIN_BETWEEN_GAIN = 9.0  # of the squared distance, by which a window lies nearer to a mix of two modes than to a mode
BETWEEN_SHARE = 0.8  # of the distance beyond noise that the mix has to explain
MAX_FIELD_SHARE = 0.6  # of the distance of two modes in one field, beyond which a drift of it would look like a mix
PRIOR_WINDOWS = 10  # of all modes, beside a mode's own, that its spread is estimated from
MIN_SPREAD = 0.5  # noise sd, of a mode
_ROUNDS = 10


class OperatingModes(msgspec.Struct, frozen=True, eq=False):
    """M modes of T tests: `offset` to add to the mean of each and `scale` to multiply its sd by."""

    offset: Float64s  # (M, T)
    scale: Float64s  # (M, T)
    noise: Float64s  # (F,) sd of the means of windows in one mode, in class sd
    windows: Ints  # (M,) learned of each

    @property
    def coefficients(self) -> float:
        """Means that would be fitted if all modes were as rare as the rarest one."""
        return float(self.windows.sum() / self.windows.min())

    def assign(self, means: Float64s) -> Ints:
        """Return the mode (n,) of windows with means (n, F), less the usual ones; -1 for a window between modes."""
        return assign_modes(means / self.noise, self.offset[:, : len(self.noise)] / self.noise)

    def is_valid(self, fields: int, tests: int) -> bool:
        shape = len(self.offset), tests
        return (
            2 <= len(self.offset) <= MAX_MODES
            and self.offset.shape == self.scale.shape == shape
            and self.noise.shape == (fields,)
            and self.windows.shape == (len(self.offset),)
            and bool((self.windows > 0).all())
            and bool(np.isfinite(self.offset).all() and (self.scale > 0).all() and (self.noise > 0).all())
        )


class ModeAssignment(msgspec.Struct, frozen=True, eq=False):
    """Modes of K windows: `of_window` (K,) numbers the mode of each, -1 between modes; `noise` (F,) is as above.

    `is_settled` is False while there may be another one, of too few windows or visits to be sure.
    """

    of_window: Ints
    noise: Float64s
    is_settled: bool

    @property
    def count(self) -> int:
        return int(self.of_window.max()) + 1

    @property
    def changes(self) -> int:
        """Changes from one mode to another; windows between modes are left out."""
        return int(np.count_nonzero(np.diff(self.of_window[self.of_window >= 0])))


def find_modes(means: Float64s) -> ModeAssignment:
    """Find the modes of windows in a row with means (K, F)."""
    noise = np.maximum(1.4826 / math.sqrt(2) * median(np.abs(np.diff(means, axis=0))), MIN_SD)
    scaled = means / noise
    distances = _clipped_distances(scaled)
    best = np.zeros(len(scaled), np.int64)
    least = _criterion(scaled, best)
    for count in range(2, MAX_MODES + 1):
        centers = _fit_centers(scaled, distances, count)
        modes = assign_modes(scaled, centers)
        visits = [_Visits.of_members(modes == mode) for mode in range(count)]
        if not all(each.last for each in visits):
            break
        criterion = _criterion(scaled, modes)
        if not all(each.are_enough for each in visits):
            return ModeAssignment(best, noise, criterion >= least)
        if criterion < least:
            best, least = modes, criterion
    return ModeAssignment(best, noise, True)


def fit_modes(modes: ModeAssignment, residuals: Float64s) -> OperatingModes:
    """Fit offsets and spreads of all T tests to residuals (K, T) of the windows in which modes were found."""
    offset, square = [], []
    for mode in range(modes.count):
        own = residuals[modes.of_window == mode]
        middle = median(own)
        reach = FIELD_CLIP * 1.4826 * median(np.abs(own - middle)) + 1e-12
        inside = np.clip(own, middle - reach, middle + reach)
        offset.append(inside.mean(0))
        square.append(((inside - inside.mean(0)) ** 2).sum(0))
    windows = np.array([(modes.of_window == mode).sum() for mode in range(modes.count)], np.int64)
    counts = windows[:, None]
    squares = np.stack(square)
    together = np.maximum(squares.sum(0) / counts.sum(), 1e-12)
    scale = np.sqrt((squares + PRIOR_WINDOWS * together) / (counts + PRIOR_WINDOWS) / together)
    return OperatingModes(np.stack(offset), scale, modes.noise, windows)


def assign_modes(scaled: Float64s, centers: Float64s) -> Ints:
    """Return the nearest of `centers` (M, F) to windows (n, F), both in noise sd; -1 between two of them."""
    distance = np.stack([_distance(scaled, center) for center in centers], axis=1)
    nearest, least = distance.argmin(1), distance.min(1)
    between = np.zeros(len(scaled), np.bool_)
    for first, step in _mixing_pairs(centers):
        share = np.clip(((scaled - first) * step).sum(1) / (step**2).sum(), 0.0, 1.0)
        gain = least - _distance(scaled, first + share[:, None] * step)
        between |= (gain > MIN_BETWEEN_GAIN) & (gain > BETWEEN_SHARE * (least - scaled.shape[1]))
    return np.where(between, -1, nearest)


def _mixing_pairs(centers: Float64s) -> Iterator[tuple[Float64s, Float64s]]:
    for first, second in combinations(range(len(centers)), 2):
        step = centers[second] - centers[first]
        if (step**2).max() <= MAX_FIELD_SHARE * (step**2).sum():
            yield centers[first], step


def _distance(scaled: Float64s, center: Float64s) -> Float64s:
    return np.asarray(np.minimum((scaled - center) ** 2, FIELD_CLIP**2).sum(1))


def _clipped_distances(scaled: Float64s) -> Float64s:
    """Return the distances (K, K) of windows (K, F)."""
    out = np.zeros((len(scaled), len(scaled)))
    for column in scaled.T:
        out += np.minimum((column[:, None] - column) ** 2, FIELD_CLIP**2)
    return out


def _fit_centers(scaled: Float64s, distances: Float64s, count: int) -> Float64s:
    """Return the centers (`count`, F) of clusters: medoids first, then medians."""
    least, chosen = np.full(len(scaled), np.inf), list[int]()
    for _ in range(count):
        chosen.append(int(np.minimum(distances, least).sum(1).argmin()))
        least = np.minimum(least, distances[chosen[-1]])
    centers = scaled[chosen]
    for _ in range(_ROUNDS):
        member = np.stack([_distance(scaled, center) for center in centers], axis=1).argmin(1)
        moved = np.stack(
            [median(scaled[member == i]) if (member == i).any() else center for i, center in enumerate(centers)]
        )
        if (moved == centers).all():
            break
        centers = moved
    return centers


def _criterion(scaled: Float64s, modes: Ints) -> float:
    """Return the Bayesian information criterion of normal windows (K, F) with a mean and a spread in each mode (K,).

    Windows between modes count as if they were typical of all modes.
    """
    inside, fields = int((modes >= 0).sum()), scaled.shape[1]
    count = int(modes.max()) + 1
    total = 2 * count * fields * math.log(len(scaled))
    for mode in range(count):
        own = scaled[modes == mode]
        square = np.minimum((own - median(own)) ** 2, FIELD_CLIP**2).mean(0)
        total += len(own) * float(np.log(np.maximum(square, MIN_SPREAD**2)).sum() - 2 * math.log(len(own) / inside))
    return float(total * len(scaled) / inside)


class _Visits(msgspec.Struct, frozen=True):
    """Visits of a cluster among windows in a row."""

    windows: int
    visits: int

    @classmethod
    def of_members(cls, member: Bools) -> _Visits:
        return cls(int(member.sum()), int(member[0]) + int((member[1:] & ~member[:-1]).sum()))

    @property
    def last(self) -> bool:
        return self.windows >= MIN_VISIT_WINDOWS * self.visits > 0

    @property
    def are_enough(self) -> bool:
        return self.windows >= MIN_MODE_WINDOWS and self.visits >= MIN_MODE_VISITS
