"""What a device gathers before it knows what is normal: however long it lasts, and whatever the clock does."""

from __future__ import annotations

import numpy as np
import pytest

from agent.drift import Judge, build
from agent.drift.baseline.learning import LEAST_KEPT, MOST, MOST_BYTES, Learning
from agent.drift.baseline.summary import Summary, of
from tests.kit.machine import LABELS, WINDOW, feed, readings, reference

YEAR_US = 365 * 86_400_000_000


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(reference(), labels=LABELS, window=WINDOW, learn=40)


def test_a_task_that_learns_from_more_windows_than_are_kept_learns_all_the_same(judge: Judge) -> None:
    many = Judge(judge.shipped, labels=LABELS, window=WINDOW, learn=MOST + 30)
    state, verdicts = feed(many, many.start(), readings(5, MOST + 31), batch=500)
    learned = [v.index for v in verdicts if v.learned is not None]
    assert learned == [MOST + 30]
    assert state.site is not None
    assert MOST // 2 <= state.site.drift_windows <= MOST


def wide(fields: int, classes: int) -> tuple[Learning, Summary]:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(30 * 40 * 20, fields)).astype(np.float32)
    starts = np.arange(0, len(rows), 20)
    labels = rng.integers(0, classes, len(starts))
    names = tuple(f"f{i}" for i in range(fields))
    known = tuple(f"c{i}" for i in range(classes))
    shipped = build(rows, starts, 20, labels, None, 40, fields=names, labels=known)
    whole = rows[: 40 * 20].astype(np.float64)
    return Learning.empty(shipped), of(shipped, whole, starts[:40], labels[:40], None)


def test_what_is_gathered_stays_small_enough_to_be_committed_however_many_fields_and_classes_there_are() -> None:
    learning, window = wide(24, 20)
    kept, most = [], 0
    for number in range(200):
        learning = learning.add(window, windowed=True, t=(number * 1000, number * 1000 + 999))
        kept.append(learning.windows)
        most = max(most, len(learning.to_bytes()))
    assert learning.gathered == 200
    assert max(kept) <= LEAST_KEPT
    assert min(kept[LEAST_KEPT:]) >= LEAST_KEPT // 2
    assert most < 3 * MOST_BYTES


def timed(*spans: tuple[int, int, int]) -> Learning:
    """Windows one after the other of (how many, begin, length) µs."""
    learning, window = wide(2, 1)
    for count, begin, length in spans:
        for number in range(count):
            t = begin + number * length
            learning = learning.add(window, windowed=True, t=(t, t + length - 1))
    return learning


MINUTE_US = 60_000_000


def test_time_that_was_watched_is_that_of_the_readings_whatever_the_clock_does() -> None:
    calm = timed((30, YEAR_US, MINUTE_US))
    assert calm.watched_s == pytest.approx(30 * 60, rel=0.01)
    assert calm.is_steady
    ahead = timed((10, 2 * YEAR_US, MINUTE_US), (20, YEAR_US, MINUTE_US))
    assert ahead.watched_s == pytest.approx(30 * 60, rel=0.05)
    assert not ahead.is_steady
    from_1970 = timed((10, 0, MINUTE_US), (20, 50 * YEAR_US, MINUTE_US))
    assert from_1970.watched_s == pytest.approx(30 * 60, rel=0.1)
    assert not from_1970.is_steady
    within = timed((10, YEAR_US, MINUTE_US), (1, YEAR_US + 10 * MINUTE_US, YEAR_US), (20, 2 * YEAR_US, MINUTE_US))
    assert within.watched_s < 40 * 60
    many = timed((MOST + 100, YEAR_US, MINUTE_US))
    assert many.windows < many.gathered
    assert many.watched_s == pytest.approx((MOST + 100) * 60, rel=0.05)


def test_a_device_that_is_off_at_night_is_watched_for_its_hours_and_its_clock_is_steady() -> None:
    days = timed(*((8, YEAR_US + day * 86_400_000_000, 60 * MINUTE_US) for day in range(5)))
    assert days.watched_s == pytest.approx(5 * 8 * 3600, rel=0.15)
    assert days.is_steady


def test_what_is_gathered_is_kept_apart_and_goes_on_after_a_restart(judge: Judge) -> None:
    r = readings(6, 60)
    state, _ = feed(judge, judge.start(), r.windows(0, 30))
    data, learning = judge.to_bytes(state), state.learning.to_bytes()
    assert len(data) < len(learning)
    again = judge.restore(data, learning)
    assert again.to_bytes() == state.to_bytes()
    whole, _ = feed(judge, state, r.windows(30, 42))
    later, _ = feed(judge, again, r.windows(30, 42))
    assert later.to_bytes() == whole.to_bytes()
    assert later.site is not None


@pytest.mark.parametrize("damaged", [b"", b"\0" * 40, b"x\x9cgarbage"])
def test_where_what_was_gathered_is_damaged_it_is_gathered_anew_and_nothing_else_is_lost(
    judge: Judge, damaged: bytes
) -> None:
    state, _ = feed(judge, judge.start(), readings(6, 10))
    again = judge.restore(judge.to_bytes(state), damaged)
    assert (again.index, again.seen, again.learning.gathered) == (state.index, state.seen, 0)


def test_answers_whose_certainty_is_not_known_are_neither_sure_nor_in_doubt(judge: Judge) -> None:
    r = readings(6, 2)
    r.scores[: WINDOW // 2] = np.nan
    state, verdicts = feed(judge, judge.start(), r)
    assert len(verdicts) == 2
    assert int(state.learning.total.scores.sum()) == 2 * WINDOW - WINDOW // 2
