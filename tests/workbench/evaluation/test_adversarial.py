"""Attacks on a model's input: the changes that are found are as small as a linear model's geometry says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from outstation.foundation.errors import UsageError
from outstation.ml.model.bundle.manifest import Manifest, ModelInput, ModelOutput, WindowSpec
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.inference import Inference
from outstation.workbench.cli.model.evaluate import evaluate
from outstation.workbench.evaluation import gate
from outstation.workbench.evaluation.adversarial import attack, noise, patches, substitution
from outstation.workbench.evaluation.adversarial.results import ALL_FIELDS, AdversarialResult, SmallestChange
from outstation.workbench.evaluation.adversarial.substitution import Recording
from outstation.workbench.evaluation.adversarial.target import SensorLimits, Target
from scripts.kit.bundles import CLASSIFY, packed
from scripts.kit.write_models import model
from tests.kit.evaluations import evaluated
from tests.ml.model.test_evaluate import labelled

WEIGHTS = np.array([1.0, -0.5, 0.0, 3.0], np.float32)
SD = np.array([1.0, 2.0, 1.0, 0.1], np.float32)
REACH = WEIGHTS * SD


def linear_target(windows: NDArray[np.float32], kind: str = "classify", tolerance: float = 0.0) -> Target:
    """Return a model with the answer `high` where the mean over the rows of WEIGHTS · x is above 0."""
    _, rows, fields = windows.shape
    weights = np.tile(WEIGHTS / rows, rows)
    is_class = kind == "classify"
    columns = np.stack([-weights / 2, weights / 2], axis=1) if is_class else weights[:, None]
    manifest = Manifest(
        format=1,
        name="linear",
        version="1",
        created="",
        kind=kind,  # type: ignore[arg-type]
        input=ModelInput(
            fields=[*"abcd"], window=WindowSpec(rows, rows) if rows > 1 else None, roles=["sensor"] * fields
        ),
        output=ModelOutput(labels=["low", "high"] if is_class else [], activation="softmax" if is_class else "none"),
        files={},
    )
    content = model("float32", columns.T.astype(np.float32), np.zeros(columns.shape[1], np.float32))
    inference = Inference(manifest, runtime.load_model(manifest, content))
    limits = SensorLimits(-10 * SD, 10 * SD, 0 * SD, SD, np.ones(fields, np.bool_))
    t = np.tile(np.arange(rows) * 10_000, (len(windows), 1))
    return Target(inference, limits, windows, t, None, tolerance)


def draw_windows(count: int, rows: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(0, 0.3, (count, rows, 4)) * SD).astype(np.float32)


def margins(windows: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(np.abs((windows.mean(axis=1) @ WEIGHTS).astype(np.float64)))


@pytest.mark.parametrize("rows", [1, 6])
def test_the_smallest_noise_is_that_of_the_geometry(rows: int) -> None:
    windows = draw_windows(60, rows)
    target = linear_target(windows)
    allowed = np.ones((60, 4), np.bool_)
    sizes = noise.find_smallest_noise(
        target, np.arange(60), allowed, (0.1, 0.25, 0.5, 1.0), 24, np.random.default_rng(1)
    )
    least = margins(windows) / np.abs(REACH).sum()
    near = least < 0.95
    assert near.sum() > 50
    # Never below the distance from the border, and near to it.
    assert (sizes[near] >= least[near] * 0.999).all()
    assert np.median(sizes[near] / least[near]) < 1.5


@pytest.mark.parametrize("field", [0, 1, 3])
def test_the_smallest_change_of_one_field_is_exact(field: int) -> None:
    windows = draw_windows(40, 1)
    allowed = np.broadcast_to(np.arange(4) == field, (40, 4))
    sizes = noise.find_smallest_noise(
        linear_target(windows), np.arange(40), allowed, (0.25, 0.5, 1.0, 2.0, 4.0), 8, np.random.default_rng(1)
    )
    least = margins(windows) / np.abs(REACH[field])
    reached = least < 3.9
    assert (np.isfinite(sizes) == (least <= 4.0))[np.abs(least - 4.0) > 0.1].all()
    assert sizes[reached] == pytest.approx(least[reached], abs=4.0 / 2**noise.HALVINGS)
    assert (sizes[reached] >= least[reached] * 0.999).all()


def test_a_field_without_weight_flips_nothing() -> None:
    allowed = np.broadcast_to(np.arange(4) == 2, (20, 4))
    target = linear_target(draw_windows(20, 1))
    assert np.isinf(
        noise.find_smallest_noise(target, np.arange(20), allowed, (1.0, 4.0), 8, np.random.default_rng(0))
    ).all()


def test_a_number_flips_beyond_its_tolerance() -> None:
    windows = draw_windows(30, 1)
    target = linear_target(windows, "regress", tolerance=1.0)
    sizes = noise.find_smallest_noise(
        target, np.arange(30), np.ones((30, 4), np.bool_), (0.1, 0.5, 1.0), 24, np.random.default_rng(0)
    )
    assert sizes == pytest.approx(np.full(30, 1.0 / np.abs(REACH).sum()), rel=0.5)
    assert (sizes >= 1.0 / np.abs(REACH).sum() * 0.999).all()


def test_a_whole_replayed_window_always_flips_and_a_delay_of_a_steady_stream_never() -> None:
    windows = draw_windows(50, 6)
    target, index = linear_target(windows), np.arange(50)
    replayed = substitution.replay_windows(target, index, np.random.default_rng(0))
    assert replayed is not None
    assert (replayed.points[-1].strength, replayed.points[-1].value) == ("6 of 6 rows", 1.0)
    assert [point.value for point in replayed.points] == sorted(point.value for point in replayed.points)
    steady = Recording(np.repeat(windows[:1], 20, axis=0).reshape(-1, 4), np.full(50, 60), np.zeros(50, np.int64))
    same = linear_target(np.repeat(windows[:1], 50, axis=0))
    delayed = substitution.delay_windows(same, index, steady)
    assert delayed is not None
    assert [point.value for point in delayed.points if int(point.strength.split()[0]) % 6 == 0] == [0.0, 0.0]


def test_no_delay_crosses_a_gap() -> None:
    windows = draw_windows(10, 6)
    first = np.arange(10) * 6
    recording = Recording(windows.reshape(-1, 4), first, first)
    assert substitution.delay_windows(linear_target(windows), np.arange(10), recording) is None


def test_a_searched_trigger_flips_more_than_a_random_patch() -> None:
    target = linear_target(draw_windows(200, 6))
    searched, control = patches.search_patches(target, np.arange(200), np.random.default_rng(3))
    # All answers are one class after a perfect trigger: it flips the half that had the other one.
    assert max(point.value for point in searched.points) >= 0.4
    assert sum(p.value for p in searched.points) > sum(p.value for p in control.points)


@given(
    arrays.arrays(np.float32, (3, 2, 4), elements=st.floats(-1e6, 1e6, width=32)),
    arrays.arrays(np.float32, (3, 2, 4), elements=st.floats(-1e6, 1e6, width=32)),
)
@settings(max_examples=50, deadline=None)
def test_changed_readings_stay_within_the_limits_or_as_far_out_as_they_were(
    original: NDArray[np.float32], change: NDArray[np.float32]
) -> None:
    limits = SensorLimits(-SD, SD, 0 * SD, SD, np.ones(4, np.bool_))
    clipped = limits.clip(original + change, original)
    assert (clipped <= np.maximum(original, SD)).all()
    assert (clipped >= np.minimum(original, -SD)).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_the_first_windows_are_of_all_classes_alike(codes: list[int], seed: int) -> None:
    order = attack.order_by_class(np.array(codes), seed)
    assert sorted(order.tolist()) == list(range(len(codes)))
    kinds = len(set(codes))
    assert len({codes[i] for i in order[:kinds]}) == kinds


@pytest.mark.parametrize("most", [1000, 2500, 20_000])
def test_invocations_are_bounded(tmp_path: Path, most: int) -> None:
    result = attacked(tmp_path, max_invocations=most)
    assert most / 4 < result.invocations <= most


def test_values_that_are_missing_stay_missing(tmp_path: Path) -> None:
    windows = draw_windows(20, 6)
    windows[:, 2, 1] = np.nan
    target = linear_target(windows)
    result = attack.attack(
        target, Recording(windows.reshape(-1, 4), np.arange(20) * 6, np.arange(20) * 6), 5000, 0, lambda _: None
    )
    assert all(change.smallest_sd is None or change.smallest_sd > 0 for change in result.smallest_changes)
    changed = target.limits.clip(windows + 1, windows)
    assert np.isnan(changed[:, 2, 1]).all()


def attacked(tmp_path: Path, **options: object) -> AdversarialResult:
    result = evaluated(
        packed(tmp_path, CLASSIFY), labelled(tmp_path / "rows.csv"), adversarial=True, **options
    ).adversarial
    assert result is not None
    return result


def of_field(changes: Sequence[SmallestChange], field: str, label: str = "") -> SmallestChange:
    [change] = [change for change in changes if (change.field, change.label) == (field, label)]
    return change


def test_each_field_and_class_has_its_smallest_change_in_sd_and_in_units(tmp_path: Path) -> None:
    result = attacked(tmp_path)
    for field in CLASSIFY.fields:
        for label in ("", *CLASSIFY.labels):
            change = of_field(result.smallest_changes, field, label)
            assert change.n > 0
        whole = of_field(result.smallest_changes, field)
        assert whole.smallest_sd is not None
        assert whole.smallest is not None
        assert 0.5 < whole.smallest / whole.smallest_sd < 3.0  # the sd of the field's rows
    every = of_field(result.smallest_changes, ALL_FIELDS)
    assert every.median_sd is not None
    assert all((of_field(result.smallest_changes, f).median_sd or np.inf) >= every.median_sd for f in CLASSIFY.fields)


def test_a_search_that_was_left_out_is_named(tmp_path: Path) -> None:
    bundle, data = packed(tmp_path, CLASSIFY), labelled(tmp_path / "rows.csv")
    notes = [
        evaluated(bundle, data, adversarial=True, max_invocations=most).notes for most in (1000, attack.MAX_INVOCATIONS)
    ]
    assert ["No trigger was searched" in " ".join(each) for each in notes] == [True, False]


def test_privacy_leaves_out_the_change_of_a_single_window(tmp_path: Path) -> None:
    result = attacked(tmp_path, min_count=20)
    assert {change.smallest_sd for change in result.smallest_changes} == {None}
    assert {change.smallest for change in result.smallest_changes} == {None}
    assert (result.low, result.high) == ([], [])
    assert all(change.n >= 20 for change in result.smallest_changes)
    # Without a reference they are the extremes of single rows.
    assert (result.low, result.high) == ([], [])
    assert all(point.n >= 20 for each in result.attacks for point in each.points)


def test_a_gate_fails_for_a_model_that_small_noise_fools(tmp_path: Path) -> None:
    bundle = packed(tmp_path, CLASSIFY)
    data = labelled(tmp_path / "rows.csv")
    evaluation = evaluated(bundle, data, adversarial=True, max_invocations=5000)
    texts = (
        "adversarial(noise, 0.1 sd).flipped <= 0.5",
        "adversarial(*).median_sd >= 100",
        "adversarial(a).median_sd > 0",
    )
    states = {result.requirement: result.state for result in gate.check(gate.read_gate(texts), evaluation)}
    assert states == {texts[0]: "passed", texts[1]: "failed", texts[2]: "passed"}
    without = evaluated(bundle, data)
    with pytest.raises(UsageError, match="--adversarial measures it"):
        gate.check(gate.read_gate(texts), without)


def test_no_right_answer_leaves_nothing_to_attack(tmp_path: Path) -> None:
    bundle = packed(tmp_path, CLASSIFY)
    wrong = [CLASSIFY.labels[(i // 7 + 1) % 3] for i in range(600)]
    rows = labelled(tmp_path / "rows.csv", label=wrong)
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[:60]) + "\n")
    with pytest.raises(UsageError, match="no answer is right"):
        evaluated(bundle, rows, adversarial=True)


def test_a_trigger_is_not_measured_on_a_few_windows(tmp_path: Path) -> None:
    result = evaluated(
        packed(tmp_path, CLASSIFY), labelled(tmp_path / "rows.csv"), adversarial=True, max_invocations=1000
    ).adversarial
    assert result is not None
    assert result.attacks
    assert all(point.n >= 10 for each in result.attacks if each.attack == "trigger" for point in each.points)


def test_a_limit_of_invocations_without_attacks_is_refused(tmp_path: Path) -> None:
    arguments = [str(packed(tmp_path, CLASSIFY)), str(labelled(tmp_path / "rows.csv")), "--max-invocations", "5000"]
    result = CliRunner().invoke(evaluate, arguments)
    assert isinstance(result.exception, UsageError) or "--max-invocations limits --adversarial" in result.output
    assert result.exit_code != 0
