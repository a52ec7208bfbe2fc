"""Poisoning checks on sets with known truth: what they detect, and that they accuse nobody of clean data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from msgspec.structs import replace

from outstation.ml.poisoning import labelled_windows, triggers
from outstation.ml.poisoning.inspect import inspect
from outstation.ml.poisoning.labelled_windows import LabelledWindows
from scripts.poisoning import attacks, sets, trials
from scripts.poisoning.attacks import Attack

FIRST_SEED = range(1)


@pytest.fixture(scope="module")
def exercise() -> LabelledWindows:
    return sets.exercise()


@pytest.mark.parametrize("load", [sets.exercise, sets.machine, sets.solar])
def test_recordings_with_honest_noise_are_not_accused(load: Callable[[], LabelledWindows]) -> None:
    assert [text for _, text in trials.accuse_clean(load(), FIRST_SEED)] == ["", ""]


@pytest.mark.parametrize("name", sorted(sets.list_generated(0)))
def test_a_misleading_clean_set_is_not_accused(name: str) -> None:
    assert [text for _, text in trials.accuse_clean(sets.list_generated(0)[name], FIRST_SEED)] == ["", ""]


@pytest.mark.parametrize(
    "attack",
    [
        attacks.flip_class(0.4),
        attacks.flip_by_labeller(0.4),
        attacks.trigger(0.01),
        attacks.trigger(0.03),
        attacks.clean_label_trigger(0.1),
        attacks.copy_window(0.02),
        attacks.resend(0.02),
    ],
    ids=lambda attack: attack.name,
)
def test_poisoned_windows_are_named_and_hardly_any_others(exercise: LabelledWindows, attack: Attack) -> None:
    result = trials.try_attack(exercise, attack, FIRST_SEED)
    assert result.hits == 1
    assert result.precision >= 0.7


def test_flips_both_ways_alike_are_documented_as_a_miss(exercise: LabelledWindows) -> None:
    assert trials.try_attack(exercise, attacks.flip_any(0.2), FIRST_SEED).hits == 0


def test_a_device_that_flips_is_named_and_the_others_are_not() -> None:
    windows = sets.machine()
    device = windows.providers["device"]
    flipped = (device == "device-10") & (np.random.default_rng(0).random(len(windows)) < 0.4)
    report = inspect(replace(windows, label=np.where(flipped, 1 - windows.label, windows.label)))
    assert {each.subject for each in report.findings if each.check == "device"} == {"device-10"}


def test_two_devices_are_not_compared(exercise: LabelledWindows) -> None:
    devices = np.where(np.arange(len(exercise)) % 2, "a", "b")
    report = inspect(replace(exercise, providers={"device": devices}))
    assert report.reasons == ["devices are not compared: a comparison takes 4 with 20 labels each"]


def test_more_devices_than_are_compared_are_a_reason_that_is_shown() -> None:
    rows = np.random.default_rng(0).normal(size=(3000, 2))
    table = sets.make_table(rows, (rows[:, 0] > 0).astype(np.int64))
    report = inspect(replace(table, providers={"device": np.arange(3000).astype(np.str_)}))
    assert report.reasons == ["devices are not compared: there are 3000, a comparison takes at most 1000"]
    assert [*report.describe()][-1] == report.reasons[0]


@pytest.mark.parametrize("missing", [(np.nan,) * 3, (np.inf, -np.inf, np.nan)])
@pytest.mark.parametrize("window_rows", [1, 4])
def test_windows_without_a_number_are_no_copies_and_no_pattern(window_rows: int, missing: tuple[float, ...]) -> None:
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 1000)
    rows = random.normal(size=(1000, window_rows, 3)) + 2 * label[:, None, None]
    rows[(random.random(1000) < 0.2) & (label == 0)] = missing
    ends = np.arange(1000) * window_rows + window_rows - 1
    table = sets.make_table(rows.reshape(-1, 3), np.repeat(label, window_rows))
    report = inspect(replace(table, window_rows=window_rows).select(ends))
    assert report.findings == []


def test_copies_are_named_though_their_missing_values_have_other_bits(exercise: LabelledWindows) -> None:
    poisoned, mask = attacks.copy_window(0.02).poison(exercise, np.random.default_rng(0))
    bits = poisoned.rows.view(np.uint32)
    for number, last in enumerate(poisoned.last[mask].tolist()):
        bits[last - 50, 0] = 0x7FC00000 + number
    assert {each.check for each in inspect(poisoned).findings} >= {"copies"}


@pytest.mark.parametrize(("codes", "share"), [(1, 0.5), (2, 0.3), (5, 0.5)])
def test_random_labels_of_equal_windows_are_not_accused(codes: int, share: float) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        rows = random.integers(0, codes, (1000, 1)).astype(np.float32)
        report = inspect(sets.make_table(rows, (random.random(1000) < share).astype(np.int64)))
        assert report.findings == []


def test_random_labels_of_more_windows_than_are_compared_are_not_accused() -> None:
    random = np.random.default_rng(0)
    rows = random.integers(0, 2, (3000, 1)).astype(np.float32)
    assert inspect(sets.make_table(rows, (random.random(3000) < 0.3).astype(np.int64))).findings == []


def test_a_search_for_patterns_is_bounded_and_the_report_says_how(
    exercise: LabelledWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triggers, "_MAX_VALUES", 800 * 600 + 1)
    poisoned, mask = attacks.trigger(0.03).poison(exercise, np.random.default_rng(0))
    report = inspect(poisoned)
    reason = (
        "patterns: 800 of 1,620 windows were searched, spread evenly; "
        "a search takes at most 480,001 values and 8,388,608 rows"
    )
    assert report.reasons[0] == reason
    assert reason in list(report.describe())
    [finding] = [each for each in report.findings if each.check in ("trigger", "repeated pattern")]
    assert 0.4 * mask.sum() < finding.n < 0.6 * mask.sum()
    assert {*finding.rows} <= {poisoned.names[i] for i in np.flatnonzero(mask).tolist()}


def test_the_same_set_gives_the_same_report(exercise: LabelledWindows) -> None:
    poisoned, _ = attacks.trigger(0.03).poison(exercise, np.random.default_rng(0))
    assert inspect(poisoned) == inspect(poisoned)


def test_few_windows_or_one_class_are_not_checked(exercise: LabelledWindows) -> None:
    few = inspect(exercise.select(np.arange(50)))
    single = inspect(exercise.select(np.flatnonzero(exercise.label == 0)))
    assert (few.state, few.reasons) == ("not checked", ["50 labelled windows, the checks take 100"])
    assert (single.state, single.reasons) == ("not checked", ["1 classes, the checks take 2 to 64"])


def test_more_windows_than_the_bound_are_thinned_evenly() -> None:
    n = labelled_windows.MAX_WINDOWS + 50_000
    table = sets.make_table(np.arange(2 * n).reshape(n, 2), np.arange(n) % 2)
    thinned = table.thin()
    assert len(thinned) == labelled_windows.MAX_WINDOWS
    assert (thinned.names[0], thinned.names[-1]) == (1, n)


def test_a_set_that_was_thinned_says_so_in_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled_windows, "MAX_WINDOWS", 200)
    report = inspect(sets.make_table(np.random.default_rng(0).normal(size=(500, 2)).astype("<f4"), np.arange(500) % 2))
    reason = "200 of 500 windows were inspected, spread evenly"
    assert (report.windows, report.reasons[0]) == (200, reason)
    assert reason in list(report.describe())


def test_no_finding_rests_on_fewer_windows_than_the_least_count(exercise: LabelledWindows) -> None:
    poisoned, _ = attacks.trigger(0.004).poison(exercise, np.random.default_rng(0))
    assert all(finding.n >= 10 for finding in inspect(poisoned).findings)


@settings(max_examples=25, deadline=None)
@given(
    rows=arrays.arrays(np.float32, (150, 2), elements=st.floats(width=32)),
    label=arrays.arrays(np.int64, 150, elements=st.integers(0, 3)),
    window_rows=st.integers(1, 6),
)
def test_any_bits_as_rows_give_a_report(rows: np.ndarray, label: np.ndarray, window_rows: int) -> None:
    windows = replace(sets.make_table(rows, label, labels=list("abcd")), window_rows=window_rows)
    report = inspect(windows.select(np.arange(window_rows - 1, 150)))
    assert 0 <= report.contradicted <= 1
    assert all(0 <= finding.low <= finding.share <= finding.high <= 1 for finding in report.findings)
