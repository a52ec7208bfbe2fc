"""Derived features: by hand, and bit by bit the same whatever pieces a stream comes in."""

from __future__ import annotations

import math
import re
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from outstation.ml.model.bundle.feature_set import DerivedFeature
from outstation.ml.model.bundle.manifest import Manifest, ModelInput, ModelOutput, WindowSpec
from outstation.ml.model.inference import derived_features, features
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.quantization import Quantization
from outstation.ml.model.inference.runtime import FinishedRun, TfliteModel

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
STEP_US, LONG_US, BACK_US = 10_000, 700_000, -30_000
T0 = 1_764_022_680_000_000
nan = math.nan


class Echo:
    """Stands for a model: answers with what it was given, so that every bit of it is compared."""

    seconds = 0.0
    input = output = Quantization("float32")

    def __init__(self, spec: ModelInput) -> None:
        self.input_shape = (spec.rows * len(spec.columns),)

    def allocate(self, count: int) -> Floats:
        return np.empty((count, *self.input_shape), np.float32)

    def start_run(self, windows: Floats) -> FinishedRun:
        return FinishedRun(windows, 0.0)

    def wait(self, run: FinishedRun) -> Floats:
        return run.numbers


def feature(function: Any, field: str = "a", rows: int = 0, **more: Any) -> DerivedFeature:
    return DerivedFeature(name=f"{function}_{field}_{rows}", function=function, field=field, rows=rows, **more)


DERIVED = st.one_of(
    st.builds(feature, st.sampled_from(["mean", "std"]), st.sampled_from("ab"), st.integers(2, 40)),
    st.builds(feature, st.sampled_from(["lag", "difference", "last"]), st.sampled_from("ab"), st.integers(1, 40)),
    st.builds(
        feature,
        st.just("band"),
        st.sampled_from("ab"),
        st.integers(8, 40),
        band=st.sampled_from([(0.0, 0.5), (0.1, 0.3), (0.25, 0.5)]),
    ),
    st.builds(feature, st.sampled_from(["hour", "weekday"]), st.just(""), offset_h=st.sampled_from([0.0, -5.5])),
)
WINDOWS = st.none() | st.integers(1, 9).flatmap(
    lambda rows: st.builds(
        WindowSpec, rows=st.just(rows), step=st.integers(1, rows), max_gap_s=st.sampled_from([None, 0.5])
    )
)


@st.composite
def inputs(draw: st.DrawFn) -> ModelInput:
    window = draw(WINDOWS)
    return ModelInput(
        fields=["a", "b"],
        derived=draw(st.lists(DERIVED, min_size=1, max_size=4, unique_by=lambda made: made.name)),
        window=window,
        max_gap_s=draw(st.sampled_from([None, 0.5])) if window is None else None,
        scaling=draw(st.sampled_from(["fixed", "window"])) if window is not None else "fixed",
        max_missing=0.25,
    )


@st.composite
def streams(draw: st.DrawFn) -> tuple[Floats, Ints]:
    """Rows (n, 2), some values missing or beyond float32, with pauses and rows that came late."""
    steps = draw(st.lists(st.sampled_from([STEP_US] * 12 + [0, LONG_US, BACK_US]), min_size=1, max_size=150))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    rows = (random.normal(0, 10 ** random.uniform(-3, 6), (len(steps), 2))).astype(np.float32)
    rows[random.random(rows.shape) < draw(st.sampled_from([0, 0.1, 0.6]))] = nan
    rows[random.random(rows.shape) < draw(st.sampled_from([0, 0.02]))] = np.inf
    return rows, np.cumsum([T0, *steps[1:]], dtype=np.int64)


def inference(spec: ModelInput) -> Inference:
    manifest = Manifest(
        format=1,
        name="echo",
        version="1",
        created="",
        kind="embedding",
        input=spec,
        output=ModelOutput(centroid=[0.0] * (spec.rows * len(spec.columns))),
        files={},
    )
    return Inference(manifest, cast(TfliteModel, Echo(spec)))


@settings(max_examples=100)
@given(inputs(), streams(), st.data())
def test_any_pieces_of_a_stream_give_the_bits_of_the_whole(
    spec: ModelInput, stream: tuple[Floats, Ints], data: st.DataObject
) -> None:
    rows, t = stream
    run = inference(spec)
    whole = run.run(rows, t, with_outputs=True)
    starts, outputs, values, missing, at, end = [], [], [], [], 0, 0
    while end < len(rows):
        end = min(len(rows), end + data.draw(st.integers(1, 60)))
        before = min(run.history_rows + data.draw(st.sampled_from([0, 0, 3])), at)
        piece = run.run(rows[at - before : end], t[at - before : end], history_rows=before, with_outputs=True)
        assert piece.outputs is not None
        assert piece.scores.value is not None
        starts += (piece.cut.starts + at).tolist()
        outputs.append(piece.outputs)
        values.append(piece.scores.value)
        missing.append(piece.missing_share)
        at += piece.cut.consumed
    assert starts == whole.cut.starts.tolist()
    assert whole.outputs is not None
    assert whole.scores.value is not None
    assert np.concatenate(outputs).tobytes() == whole.outputs.tobytes()
    assert np.concatenate(values).tobytes() == whole.scores.value.tobytes()
    assert np.concatenate(missing).tobytes() == whole.missing_share.tobytes()


def past(rows: Floats, t: Ints, row: int, count: int, gap_s: float | None) -> list[float]:
    """The last `count` values up to `row`, oldest first, NaN where history ends: one by one, as the rules say."""
    collected: list[float] = []
    at = row
    while len(collected) < count:
        collected.append(float(rows[at]) if at >= 0 and np.isfinite(rows[at]) else nan)
        broken = at <= 0 or t[at] < t[at - 1] or (gap_s is not None and t[at] - t[at - 1] > gap_s * 1e6)
        at = -1 if broken else at - 1
    return collected[::-1]


def by_hand(spec: DerivedFeature, values: list[float]) -> float:
    """From all the values that a feature looks at, oldest first."""
    there = [v for v in values if not math.isnan(v)]
    enough = len(there) >= max(1, (len(values) + 1) // 2)
    if spec.function == "mean":
        return math.fsum(there) / len(there) if enough else nan
    if spec.function == "std":
        return float(np.std(there, ddof=1)) if enough and len(there) > 1 else nan
    if spec.function == "last":
        return there[-1] if there else nan
    if spec.function == "band":
        return spectrum(spec, values) if enough else nan
    return values[0] if spec.function == "lag" else values[-1] - values[0]


def spectrum(spec: DerivedFeature, values: list[float]) -> float:
    """The Fourier sum written out, frequency by frequency."""
    n, (low, high) = len(values), spec.band or (0.0, 0.0)
    mean = float(np.nanmean(values))
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * i / n) for i in range(n)]
    x = [0.0 if math.isnan(v) else (v - mean) * w for v, w in zip(values, hann, strict=True)]
    total = 0.0
    for k in range(n):
        frequency = min(k, n - k) / n * spec.rate
        if low <= frequency < high or (frequency == high == spec.rate / 2):
            total += abs(sum(v * np.exp(-2j * math.pi * k * i / n) for i, v in enumerate(x))) ** 2
    return total / n / sum(w * w for w in hann)


@settings(max_examples=60, deadline=None)
@given(DERIVED.filter(lambda made: not made.is_time_based), streams(), st.sampled_from([None, 0.5]))
def test_a_feature_is_what_its_rows_give_by_hand(
    spec: DerivedFeature, stream: tuple[Floats, Ints], gap_s: float
) -> None:
    rows, t = stream
    assume(len(rows))
    made = derived_features.compute(rows, t, ModelInput(fields=["a", "b"], derived=[spec], max_gap_s=gap_s))[:, 2]
    column = rows[:, "ab".index(spec.field)]
    scale = float(np.nanmax(np.where(np.isfinite(column), np.abs(column), 0), initial=1e-30))
    scale = scale**2 if spec.function == "band" else scale
    for row in range(len(rows)):
        expected = by_hand(spec, past(column, t, row, spec.history_rows + 1, gap_s))
        assert made[row] / scale == pytest.approx(expected / scale, rel=1e-4, abs=1e-5, nan_ok=True)


def columns(spec: DerivedFeature, values: Any, t: Any = None) -> list[float]:
    rows = np.array(values, np.float32)[:, None]
    times = np.arange(len(rows)) * STEP_US if t is None else np.array(t)
    result: list[float] = derived_features.compute(rows, times, ModelInput(fields=["a"], derived=[spec]))[:, 1].tolist()
    return result


def test_the_band_of_a_wave_has_its_power_and_the_others_none() -> None:
    wave = 3 * np.sin(2 * np.pi * 5 * np.arange(200) / 50)  # 5 Hz, 50 rows a second
    inside = columns(feature("band", rows=100, band=(4, 6), rate=50.0), wave)[-1]
    outside = columns(feature("band", rows=100, band=(8, 25), rate=50.0), wave)[-1]
    assert inside == pytest.approx(9 / 2, rel=1e-3)
    assert outside < 1e-6


def test_a_mean_needs_half_of_its_values() -> None:
    assert columns(feature("mean", rows=4), [nan, nan, 2, 4])[-1] == 3
    assert math.isnan(columns(feature("mean", rows=4), [nan, nan, nan, 4])[-1])


def test_history_ends_at_a_late_row() -> None:
    made = columns(feature("lag", rows=1), [1, 2, 3, 4], [0, 10_000, 5_000, 15_000])
    assert [math.isnan(value) for value in made] == [True, False, True, False]


def test_noon_and_monday_stand_where_they_should() -> None:
    noon_utc = np.array([1_764_590_400_000_000])  # Monday 1 December 2025, 12:00 UTC
    spec = ModelInput(fields=["a"], derived=[feature("hour", field=""), feature("weekday", field="", offset_h=-12.0)])
    made = derived_features.compute(np.zeros((1, 1), np.float32), noon_utc, spec)[0]
    assert spec.columns == ["a", "hour__0_sin", "hour__0_cos", "weekday__0_sin", "weekday__0_cos"]
    assert made.tolist() == pytest.approx([0, 0, -1, 0, 1], abs=1e-6)


def test_order_picks_and_arranges_what_the_model_is_given() -> None:
    spec = ModelInput(fields=["a", "b"], derived=[feature("lag", "b", 1)], feature_order=["lag_b_1", "a"])
    made = derived_features.compute(np.array([[1, 10], [2, 20]], np.float32), np.array([0, 10]), spec)
    np.testing.assert_array_equal(made, [[nan, 1], [10, 2]])


def test_a_window_scaled_by_itself_forgets_level_and_spread_but_not_shape() -> None:
    spec = ModelInput(fields=["a"], window=WindowSpec(rows=4, step=4), scaling="window")
    shape = np.array([0, 1, 0, 3], np.float32)
    rows = np.concatenate([shape, 100 + 7 * shape, np.full(4, 5), [1, nan, 1, 3]]).astype(np.float32)[:, None]
    made = features.build_windows(rows, np.array([0, 4, 8, 12]), spec)[:, :, 0]
    np.testing.assert_allclose(made[0], made[1], rtol=1e-5)
    np.testing.assert_allclose([made[0].mean(), made[0].std()], [0, 1], atol=1e-6)
    assert made[2].tolist() == [0, 0, 0, 0]
    assert made[3][1] == 0


def test_the_share_of_missing_values_counts_derived_features_too() -> None:
    spec = ModelInput(fields=["a"], derived=[feature("lag", rows=2)], window=WindowSpec(rows=2, step=2))
    rows = np.array([[1], [2], [nan], [4], [5], [6]], np.float32)
    result = inference(spec).run(rows, np.arange(6, dtype=np.int64) * STEP_US).missing_share
    assert result.tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"function": "lag", "field": "a"}, "lag takes rows of at least 1, not 0"),
        ({"function": "std", "field": "a", "rows": 1}, "std takes rows of at least 2, not 1"),
        ({"function": "hour", "rows": 3}, "hour takes no rows, not 3"),
        ({"function": "mean", "rows": 3}, "needs a field"),
        ({"function": "hour", "field": "a"}, "takes no field"),
        ({"function": "band", "field": "a", "rows": 8}, "band = [low, high] in Hz goes with function band"),
        ({"function": "band", "field": "a", "rows": 8, "band": (0.2, 0.9)}, "within 0 and half the rate, 0.5 Hz"),
        (
            {"function": "band", "field": "a", "rows": 8, "band": (0.01, 0.02)},
            "no frequency of 8 rows lies in its band",
        ),
    ],
)
def test_a_derived_feature_that_makes_no_sense_is_refused(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        DerivedFeature(name="x", **spec)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"derived": [feature("lag", "c", 1)]}, "names 'c', which is not a field"),
        (
            {"derived": [DerivedFeature(name="a", function="lag", field="a", rows=1)]},
            "a name is used twice, or is a field's",
        ),
        ({"feature_order": ["a", "z"]}, "feature_order names 'z'"),
        ({"feature_order": ["a", "a"]}, "feature_order names a feature twice"),
        ({"mean": [1.0], "derived": [feature("lag", "a", 1)]}, "mean has 1 entries for 2 features"),
        ({"std": [nan]}, "std has a value that is not a finite number"),
        ({"scaling": "window"}, "needs a window"),
        ({"window": WindowSpec(rows=2, step=1), "max_gap_s": 1.0}, "write window.max_gap_s"),
        ({"definition": 2}, "definition 2 of features is newer than this agent"),
    ],
)
def test_an_input_that_makes_no_sense_is_refused(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        ModelInput(**{"fields": ["a"], **spec})
