"""Which sites of a simulated fleet have it hard: switched off for a while, cut off in a download, slow, or worse."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec

# Bytes a second: some downloads of a small bundle take seconds.
_SLOW = (15_000.0, 40_000.0)
_MOST_CUTS = 2
# Shares of the time a roll-out is expected to take: when a device goes, and how long it stays away.
_GOES, _STAYS = (0.0, 0.4), (0.15, 0.5)


class Away(msgspec.Struct, frozen=True):
    """Switched off from `begin_s` to `end_s`, seconds since the roll-out began; 0: before it did."""

    begin_s: float
    end_s: float


class Hardship(msgspec.Struct, frozen=True):
    """By device; no device has two of these. `cuts`: so many downloads break off. `slow`: bytes a second."""

    away: dict[str, Away] = msgspec.field(default_factory=dict)
    cuts: dict[str, int] = msgspec.field(default_factory=dict)
    slow: dict[str, float] = msgspec.field(default_factory=dict)
    worse: tuple[str, ...] = ()


def draw(devices: Sequence[str], seed: int, *, away: int, cut: int, slow: int, worse: int, span_s: float) -> Hardship:
    """So many of each, as far as there are devices: the same for the same seed. Every other one away never saw the
    beginning. A roll-out is expected to take `span_s`."""
    chance = Random(f"hardship/{seed}")
    order = chance.sample(list(devices), len(devices))
    found: list[list[str]] = []
    for count in (worse, away, cut, slow):
        found.append(sorted(order[:count]))
        order = order[count:]
    return Hardship(
        away={name: _away(chance, span_s, early=bool(i % 2 == 0)) for i, name in enumerate(found[1])},
        cuts={name: chance.randint(1, _MOST_CUTS) for name in found[2]},
        slow={name: chance.uniform(*_SLOW) for name in found[3]},
        worse=tuple(found[0]),
    )


def _away(chance: Random, span_s: float, *, early: bool) -> Away:
    begin = 0.0 if early else span_s * chance.uniform(*_GOES)
    return Away(begin, begin + span_s * chance.uniform(*_STAYS))
