"""Defects planted in the shipped recordings are reported, and sound recordings raise no warning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from outstation.workbench.evaluation import label_quality, leakage
from outstation.workbench.evaluation.document import Evaluation
from tests.kit.evaluations import Recorded, check_result, exercise, recorded

TRAINING = Path(__file__).parents[3] / "models" / "sources" / "exercise" / "reference.npz"


@pytest.fixture(scope="module")
def shipped() -> Recorded:
    return recorded()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, shipped: Recorded) -> Evaluation:
    data = shipped.npz(tmp_path_factory.mktemp("sound") / "held-out.npz")
    return exercise(data, group="subject", slices=("side", "subject"), train=TRAINING)


def test_the_shipped_model_is_as_good_as_its_card_says(sound: Evaluation) -> None:
    accuracy = sound.metrics[0]
    assert (accuracy.metric, accuracy.n) == ("accuracy", 749)
    assert accuracy.value == pytest.approx(0.9146, abs=0.03)  # runtimes differ by a few windows
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert accuracy.low < 0.9 < 0.93 < accuracy.high
    assert sum(map(sum, sound.confusion)) == 749


def test_sound_data_raise_no_warning(sound: Evaluation) -> None:
    assert sound.warnings == []
    assert check_result(sound, leakage.TRAIN_TEST_DUPLICATES).state == "ok"
    assert check_result(sound, leakage.GROUP_LEAKAGE).state == "ok"
    assert check_result(sound, leakage.DUPLICATE_GROUPS).state == "ok"
    assert check_result(sound, leakage.TARGET_LEAKAGE).state == "ok"


def test_group_leakage_names_the_subject(tmp_path: Path, shipped: Recorded) -> None:
    seen = recorded(TRAINING)
    both = shipped.also(seen.pick(seen.each["subject"] == 3))
    evaluation = exercise(both.npz(tmp_path / "both.npz"), group="subject", train=TRAINING)
    rows, groups = (
        check_result(evaluation, leakage.TRAIN_TEST_DUPLICATES),
        check_result(evaluation, leakage.GROUP_LEAKAGE),
    )
    assert (rows.state, groups.state) == ("warning", "warning")
    assert groups.summary.startswith("subject 3 is in the training data")
    share = float(rows.summary.partition("(")[2].partition("%")[0])
    assert share == pytest.approx(100 * (evaluation.data.windows - 749) / evaluation.data.windows, abs=1)


def test_group_leakage_is_detected_with_a_split_column(tmp_path: Path, shipped: Recorded) -> None:
    of_nine = shipped.each["subject"] == 9
    split = np.where(of_nine & (np.arange(len(of_nine)) % 2 == 0), "train", "test")
    data = shipped.with_columns(split=split).csv(tmp_path / "rows.csv", "split", "subject")
    evaluation = exercise(data, group="subject", split="split")
    assert check_result(evaluation, leakage.GROUP_LEAKAGE).summary.startswith("subject 9 is in the training data")
    assert check_result(evaluation, leakage.TRAIN_TEST_DUPLICATES).state == "ok"
    assert set(evaluation.data.splits) == {"test"}
    order = check_result(evaluation, leakage.TEMPORAL_LEAKAGE)
    assert order.state == "warning"
    assert "not later than the last training row (2025-11-2" in order.summary


def test_duplicate_groups_are_detected(tmp_path: Path, shipped: Recorded) -> None:
    twin = shipped.pick(shipped.each["subject"] == 8)
    both = shipped.also(twin.with_columns(subject=np.full(len(twin.sizes), 11)))
    check = check_result(exercise(both.npz(tmp_path / "both.npz"), group="subject"), leakage.DUPLICATE_GROUPS)
    assert check.state == "warning"
    assert check.summary.startswith("subject 11, 8 share rows")


def test_target_leakage_names_the_field(tmp_path: Path, shipped: Recorded) -> None:
    rows = shipped.rows.copy()
    code = np.array([3, 0, 5, 1, 6, 2, 4])[shipped.per_row("label")]
    rows[:, 5] = code * 0.3 + np.random.default_rng(0).normal(0, 0.02, len(rows))
    planted = Recorded(rows, shipped.sizes, shipped.each, shipped.fields, shipped.labels)
    evaluation = exercise(planted.npz(tmp_path / "leaking.npz"))
    check = check_result(evaluation, leakage.TARGET_LEAKAGE)
    assert check.state == "warning"
    assert check.summary.startswith("wz (1.000) alone predicts the label")
    assert check.summary in evaluation.warnings


@pytest.mark.parametrize("group", [None, "recording"])
def test_a_slice_with_a_reversed_sensor_is_worse(tmp_path: Path, shipped: Recorded, group: str | None) -> None:
    firmware = np.array(["1.0", "1.1", "2.0"])[np.arange(len(shipped.sizes)) // 2 % 3]
    rows = shipped.rows.copy()
    rows[np.repeat(firmware == "1.1", shipped.sizes)] *= np.array([1, -1, -1, 1, -1, -1], np.float32)
    planted = Recorded(rows, shipped.sizes, shipped.each | {"firmware": firmware}, shipped.fields, shipped.labels)
    evaluation = exercise(planted.npz(tmp_path / "bad.npz"), group=group, slices=("firmware", "side"))
    states = {check.slice: check.state for check in evaluation.slices}
    assert states["firmware=1.1"] == "worse"
    assert [slice for slice, state in states.items() if state == "worse"] == ["firmware=1.1"]
    assert any(warning.startswith("firmware=1.1: accuracy 0.") for warning in evaluation.warnings)


def test_swapped_labels_are_suspects(tmp_path: Path, shipped: Recorded) -> None:
    label = shipped.each["label"].copy()
    wrong = np.flatnonzero(label == shipped.labels.index("ROW"))[:2]
    label[wrong] = shipped.labels.index("PEN")
    evaluation = exercise(shipped.with_columns(label=label).npz(tmp_path / "mixed.npz"))
    assert check_result(evaluation, label_quality.LABEL_NOISE).state == "warning"
    assert {(check.label, check.predicted) for check in evaluation.suspects} == {("PEN", "ROW")}
    starts = np.concatenate([[0], np.cumsum(shipped.sizes)])
    inside = [any(starts[i] < check.row <= starts[i + 1] for i in wrong) for check in evaluation.suspects]
    assert all(inside)


def test_a_small_class_is_a_warning(tmp_path: Path, shipped: Recorded) -> None:
    rare = shipped.each["label"] == shipped.labels.index("TRAP")
    keep = ~rare | (np.cumsum(rare) == 1)
    evaluation = exercise(shipped.pick(keep).npz(tmp_path / "rare.npz"))
    assert any(
        check.check == label_quality.SMALL_CLASS and check.summary.startswith("TRAP has ")
        for check in evaluation.label_checks
    )


def test_intervals_by_subject_are_wider_than_of_independent_windows(sound: Evaluation) -> None:
    low, high = sound.metrics[0].low, sound.metrics[0].high
    assert low is not None
    assert high is not None
    assert high - low > 0.05  # Wilson's, of 749 independent windows, is 0.041 wide
    assert "3 groups cannot show how much groups differ" in sound.intervals
