"""The forecast: hours until something undelivered would have to go, from growth seen through a sawtooth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.device.store.forecast import Growth

MIB = 1 << 20


def grown(hours: float, base_per_h: float, tooth: float = 0.0, period_s: float = 60.0, start: int = MIB) -> Growth:
    """What cannot go, seen every ten seconds: a base that grows, and teeth that every `period_s` fall back to it."""
    growth = Growth()
    for at_s in range(0, round(hours * 3600), 10):
        growth.add_sample(at_s, round(start + base_per_h * at_s / 3600 + tooth * (at_s % period_s) / period_s))
    return growth


@pytest.mark.parametrize("tooth", [0.0, 50.0 * MIB])
def test_a_steady_growth_is_told_however_high_the_teeth_on_it_are(tooth: float) -> None:
    hours = grown(6.0, MIB, tooth).hours_until(101 * MIB)
    assert hours == pytest.approx(94.0, abs=1.0)


def test_what_does_not_grow_has_no_end() -> None:
    assert grown(6.0, 0.0, 50.0 * MIB).hours_until(101 * MIB) is None
    assert grown(6.0, -MIB, start=20 * MIB).hours_until(101 * MIB) is None


def test_nothing_is_told_before_there_is_enough_to_tell() -> None:
    assert Growth().hours_until(MIB) is None
    assert grown(0.4, MIB).hours_until(101 * MIB) is None
    assert grown(0.8, MIB).hours_until(101 * MIB) is not None


def test_an_outage_after_a_quiet_day_is_told_within_two_hours() -> None:
    growth = grown(24.0, 0.0)
    for at_s in range(24 * 3600, 26 * 3600, 10):
        growth.add_sample(at_s, round(MIB + MIB * (at_s - 24 * 3600) / 3600))
    assert growth.hours_until(101 * MIB) == pytest.approx(98.0, abs=2.0)


def test_a_restart_goes_on_where_it_was() -> None:
    growth = Growth.from_json(grown(6.0, MIB).to_json())
    assert growth.hours_until(101 * MIB) == pytest.approx(94.0, abs=1.0)
    growth.add_sample(7 * 3600.0, 8 * MIB)
    assert growth.hours_until(101 * MIB) == pytest.approx(94.0, abs=1.0)


@given(st.lists(st.tuples(st.floats(1, 5000), st.integers(0, 2**40)), max_size=200))
def test_it_is_never_negative_and_never_grows_without_bound(steps: list[tuple[float, int]]) -> None:
    growth, at_s = Growth(), 0.0
    for step_s, size in steps:
        at_s += step_s
        growth.add_sample(at_s, size)
        hours = growth.hours_until(2**30)
        assert hours is None or 0.0 <= hours <= 87_600.0
    assert len(growth.samples) <= 145
