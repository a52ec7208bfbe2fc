"""Which sites of a simulated fleet have it hard: switched off for a while, cut off in a download, slow, or worse."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec

# Bytes a second: some downloads of a small bundle take seconds.
_SLOW_RATE = (15_000.0, 40_000.0)
_MAX_CUTS = 2
# Shares of the time a roll-out is expected to take: when a device goes, and how long it stays away.
_OUTAGE_START, _OUTAGE_DURATION = (0.0, 0.4), (0.15, 0.5)


class Outage(msgspec.Struct, frozen=True):
    """Switched off from `begin_s` to `end_s`, seconds since the roll-out began; 0: before it did."""

    begin_s: float
    end_s: float


class Disturbances(msgspec.Struct, frozen=True):
    """By device; no device has two of these. `cuts`: so many downloads break off. `slow`: bytes a second."""

    outages: dict[str, Outage] = msgspec.field(default_factory=dict)
    download_cuts: dict[str, int] = msgspec.field(default_factory=dict)
    slow_rates: dict[str, float] = msgspec.field(default_factory=dict)
    degraded: tuple[str, ...] = ()


def draw(
    devices: Sequence[str], seed: int, *, away: int, cut: int, slow: int, worse: int, span_s: float
) -> Disturbances:
    """So many of each, as far as there are devices: the same for the same seed. Every other one away never saw the
    beginning. A roll-out is expected to take `span_s`."""
    chance = Random(f"hardship/{seed}")
    order = chance.sample(list(devices), len(devices))
    found: list[list[str]] = []
    for count in (worse, away, cut, slow):
        found.append(sorted(order[:count]))
        order = order[count:]
    return Disturbances(
        outages={name: _draw_outage(chance, span_s, early=bool(i % 2 == 0)) for i, name in enumerate(found[1])},
        download_cuts={name: chance.randint(1, _MAX_CUTS) for name in found[2]},
        slow_rates={name: chance.uniform(*_SLOW_RATE) for name in found[3]},
        degraded=tuple(found[0]),
    )


def _draw_outage(rng: Random, span_s: float, *, early: bool) -> Outage:
    begin = 0.0 if early else span_s * rng.uniform(*_OUTAGE_START)
    return Outage(begin, begin + span_s * rng.uniform(*_OUTAGE_DURATION))
