"""Disturbances of a simulated fleet: devices offline, downloads cut, slow links, degraded sensors."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec

# Bytes per second: a download of a small bundle takes seconds.
_SLOW_RATE = (15_000.0, 40_000.0)
_MAX_CUTS = 2
# Start and length of an outage, as shares of the expected duration of a rollout.
_OUTAGE_START, _OUTAGE_DURATION = (0.0, 0.4), (0.15, 0.5)


class Outage(msgspec.Struct, frozen=True):
    """A device is off from `begin_s` to `end_s`, seconds since the start of the rollout; 0: before it."""

    begin_s: float
    end_s: float


class Disturbances(msgspec.Struct, frozen=True):
    """Disturbances by device, at most one each: number of cut downloads, bytes per second, degraded sensors."""

    outages: dict[str, Outage] = msgspec.field(default_factory=dict)
    download_cuts: dict[str, int] = msgspec.field(default_factory=dict)
    slow_rates: dict[str, float] = msgspec.field(default_factory=dict)
    degraded: tuple[str, ...] = ()


def draw(names: Sequence[str], seed: int, *, away: int, cut: int, slow: int, worse: int, span_s: float) -> Disturbances:
    """Draw this many devices for each disturbance, as far as there are devices; the same for the same seed.

    Every other outage begins before the rollout. `span_s`: expected duration of the rollout.
    """
    rng = Random(f"hardship/{seed}")
    remaining = rng.sample(list(names), len(names))
    drawn: list[list[str]] = []
    for count in (worse, away, cut, slow):
        drawn.append(sorted(remaining[:count]))
        remaining = remaining[count:]
    outages = {}
    for i, name in enumerate(drawn[1]):
        begin = 0.0 if i % 2 == 0 else span_s * rng.uniform(*_OUTAGE_START)
        outages[name] = Outage(begin, begin + span_s * rng.uniform(*_OUTAGE_DURATION))
    return Disturbances(
        outages=outages,
        download_cuts={name: rng.randint(1, _MAX_CUTS) for name in drawn[2]},
        slow_rates={name: rng.uniform(*_SLOW_RATE) for name in drawn[3]},
        degraded=tuple(drawn[0]),
    )
