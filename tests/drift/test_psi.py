"""PSI limits: few false alarms where nothing changes, and limits that follow from their budget."""

from __future__ import annotations

import numpy as np
import pytest

from agent.drift.detectors import psi
from agent.drift.detectors.cusum import Cusum
from agent.drift.detectors.psi import PsiConfirmation
from agent.drift.numeric import divergence, false_alarm_budget


def counts(seed: int, windows: int, fields: int = 6) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """(windows, fields, 16) of 300 rows each."""
    return np.random.default_rng(seed).multinomial(300, np.full(16, 1 / 16), size=(windows, fields))


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (0.5, [2.7055, 6.6349, 10.8276]),
        (2.0, [1.9449, 3.3192, 4.6167]),
        (12.0, [1.3832, 1.7908, 2.1324]),
        (80.0, [1.1457, 1.2783, 1.3814]),
    ],
)
def test_gamma_quantiles_are_near_those_of_the_gamma_distribution(a: float, expected: list[float]) -> None:
    """Expected: scipy.stats.gamma.ppf(p, a) / a."""
    for p, quantile in zip((0.9, 0.99, 0.999), expected, strict=True):
        assert float(psi.gamma_quantile(np.array(a), p)) == pytest.approx(quantile, rel=0.06)


def test_two_of_three_windows_rarely_exceed_a_limit_by_chance() -> None:
    alarms = windows = 0
    for seed in range(8):
        learned, live = counts(seed, 40), counts(100 + seed, 250)
        level, allotted = false_alarm_budget.exceedance_level(6), false_alarm_budget.PSI_BUDGET / 6
        limit = psi.fit_limits(psi.leave_one_out_psi(learned), level, allotted)
        sums = PsiConfirmation.empty(6)
        for beyond in psi.compute_psi(divergence.smoothed_shares(learned.sum(0))[None], live) > limit:
            before = sums.alarm
            sums = sums.update(beyond, np.ones(6, np.bool_), 1)
            alarms += int((sums.alarm & ~before).sum())
            windows += 1
    assert windows == 2000
    assert alarms <= 3


def test_another_shape_is_beyond_its_limit() -> None:
    learned = counts(1, 40)
    limit = psi.fit_limits(
        psi.leave_one_out_psi(learned), false_alarm_budget.exceedance_level(6), false_alarm_budget.PSI_BUDGET / 6
    )
    hollow = np.full(16, 1 / 16) * np.repeat([1.6, 0.4, 0.4, 1.6], 4)
    changed = np.random.default_rng(3).multinomial(300, hollow, size=6)
    assert (psi.compute_psi(divergence.smoothed_shares(learned.sum(0)), changed) > limit).all()


def test_one_window_beyond_the_limit_is_no_alarm_and_two_of_three_are() -> None:
    yes, no, tested = np.array([True]), np.array([False]), np.array([True])
    sums = PsiConfirmation.empty(1).update(yes, tested, 10)
    assert not sums.alarm[0]
    sums = sums.update(no, tested, 20).update(yes, tested, 30)
    assert sums.alarm[0]
    assert (int(sums.windows[0]), int(sums.since[0])) == (3, 10)
    for t in (40, 50):
        sums = sums.update(no, tested, t)
        assert sums.alarm[0]
    assert not sums.update(no, tested, 60).alarm[0]


def test_a_window_without_anything_to_compare_changes_nothing() -> None:
    yes, nothing = np.array([True]), np.array([False])
    sums = PsiConfirmation.empty(1).update(yes, np.array([True]), 10)
    assert sums.update(yes, nothing, 20).exceeded_at.tolist() == sums.exceeded_at.tolist()


@pytest.mark.parametrize(("tests", "windows"), [(32, 40), (32, 100), (12, 40)])
def test_the_limit_gives_about_the_false_alarms_it_was_allotted(tests: int, windows: int) -> None:
    rng = np.random.default_rng(tests + windows)
    limit = false_alarm_budget.cusum_limit(tests, windows, 1.0, 7e-3, min_limit=3.0)
    alarms = judged = 0
    for _ in range(40):
        learned = rng.normal(size=(windows, tests))
        mean, sd = learned.mean(0), learned.std(0, ddof=1) * np.sqrt(1 + 1 / windows)
        sums = Cusum.zeros(tests)
        for z in (rng.normal(size=(100, tests)) - mean) / sd:
            before = sums.alarm.any(0)
            sums = sums.update(z, z, limit=limit)
            alarms += int((sums.alarm.any(0) & ~before).sum())
            judged += 1
    assert 2e-3 < alarms / judged < 1.6e-2


def test_more_tests_and_fewer_learned_windows_ask_for_higher_limits() -> None:
    assert (
        false_alarm_budget.cusum_limit(64, 40, 1.0, 4e-3)
        > false_alarm_budget.cusum_limit(32, 40, 1.0, 4e-3)
        > false_alarm_budget.cusum_limit(32, 100, 1.0, 4e-3)
    )
    assert false_alarm_budget.cusum_limit(0, 40, 1.0, 4e-3) == false_alarm_budget.MIN_CUSUM_LIMIT


def test_windows_that_are_like_the_one_before_stretch_the_limits() -> None:
    rng = np.random.default_rng(0)
    separate = rng.normal(size=(80, 12))
    alike = separate.copy()
    for at in range(1, 80):
        alike[at] = 0.4 * alike[at - 1] + 0.9 * alike[at]
    assert 1.0 <= false_alarm_budget.stretch_factor(false_alarm_budget.autocorrelation(separate)) < 1.15
    assert 1.7 < false_alarm_budget.stretch_factor(false_alarm_budget.autocorrelation(alike)) <= 3.0
    assert false_alarm_budget.stretch_factor(false_alarm_budget.autocorrelation(np.zeros((40, 3)))) == pytest.approx(
        1.0, abs=0.06
    )
