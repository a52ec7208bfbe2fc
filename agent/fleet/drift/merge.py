"""Drift summaries of many devices as one: counts add, moments merge, whatever the order and grouping."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from agent.arrays import Ints
from agent.drift.reporting.parsed_message import FieldReport


class MergedMoments(msgspec.Struct, frozen=True):
    """Count, mean and sum of squared deviations; nothing has mean 0."""

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def __add__(self, other: MergedMoments) -> MergedMoments:
        """Of both together.

        Source: Chan, Golub & LeVeque (1979), Updating formulae and a pairwise algorithm for computing sample variances.
        """
        n = self.n + other.n
        if not self.n or not other.n:
            return self if self.n else other
        apart = other.mean - self.mean
        mean = (self.n * self.mean + other.n * other.mean) / n
        return MergedMoments(n, mean, self.m2 + other.m2 + apart * apart * self.n * other.n / n)

    @property
    def variance(self) -> float:
        return self.m2 / self.n if self.n else 0.0

    @property
    def sd(self) -> float:
        return math.sqrt(self.variance)


class MergedField(msgspec.Struct, frozen=True, eq=False):
    """One field over drift windows: rows below, in the reference's bins, above; rows without a value; moments."""

    counts: Ints
    missing: int
    moments: MergedMoments

    @classmethod
    def from_field(cls, field: FieldReport) -> MergedField:
        return cls(field.histogram(), field.missing, MergedMoments(field.n, field.mean, field.m2))

    def __add__(self, other: MergedField) -> MergedField:
        """Raises ValueError where the bins are not the same number."""
        if len(self.counts) != len(other.counts):
            raise ValueError(f"histograms of {len(self.counts) - 2} and {len(other.counts) - 2} bins do not add up")
        return MergedField(self.counts + other.counts, self.missing + other.missing, self.moments + other.moments)

    @classmethod
    def empty_like(cls, template: MergedField) -> MergedField:
        return cls(np.zeros_like(template.counts), 0, MergedMoments())

    def counts_without(self, part: MergedField) -> Ints:
        """The counts of what was merged besides `part`; exact."""
        return self.counts - part.counts
