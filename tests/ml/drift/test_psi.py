"""PSI limits: few false alarms where nothing changes, and limits that follow from their budget."""

from __future__ import annotations

import numpy as np
import pytest

from outstation.ml.drift.detectors import psi
from outstation.ml.drift.detectors.cusum import Cusum
from outstation.ml.drift.detectors.psi import PsiConfirmation
from outstation.ml.drift.numeric import control_limits, divergence, false_alarm_budget
from outstation.ml.drift.numeric.control_limits import ScoreNoise, cusum_limits, fit_noise, fit_tail


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
    limit = cusum_limits(noise(tests, windows), 1.0, 7e-3, min_limit=3.0)
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


def noise(tests: int, windows: int, coefficients: float = 1.0) -> ScoreNoise:
    return ScoreNoise(
        windows, np.full(tests, coefficients), np.ones(tests), np.zeros(tests), np.ones(tests), np.full(tests, 3.0)
    )


def test_more_tests_and_fewer_windows_for_each_coefficient_ask_for_higher_limits() -> None:
    limits = [cusum_limits(noise(*case), 1.0, 4e-3)[0] for case in ((32, 100), (32, 40), (64, 40), (64, 40, 7.0))]
    assert limits == sorted(set(limits))
    assert cusum_limits(noise(1, 1000), 1.0, 4e-3)[0] == false_alarm_budget.MIN_CUSUM_LIMIT
    assert not len(cusum_limits(noise(0, 40), 1.0, 4e-3))


@pytest.mark.parametrize(("thinning", "steady"), [(1, 0.0), (1, 0.5), (2, 0.5)])
def test_the_memory_of_scores_is_estimated_without_its_bias_to_the_long_side(thinning: int, steady: float) -> None:
    rng = np.random.default_rng(0)
    alike = rng.normal(size=(400 * thinning, 40))
    for at in range(1, len(alike)):
        alike[at] = steady * alike[at - 1] + np.sqrt(1 - steady**2) * alike[at]
    for learned in np.split(alike[::thinning], 5):
        estimated = fit_noise(learned, np.ones(40), np.ones(40), thinning, 1.0, (slice(0, 40),)).autocorrelation
        assert np.abs(estimated - steady).max() < 0.25
        assert -0.05 < estimated.mean() - steady < 0.17


def test_a_score_with_heavy_tails_asks_for_a_higher_limit_than_others() -> None:
    rng = np.random.default_rng(1)
    learned = rng.normal(size=(100, 3))
    learned[::25, 2] = 5.0
    plain, other, heavy = fit_tail(learned, 1.0)
    assert 1.0 <= min(plain, other) <= max(plain, other) < 1.2 < heavy <= control_limits.MAX_TAIL_FACTOR
