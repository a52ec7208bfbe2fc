"""Models solar and machine: equal to the output of their sources, and as accurate as their cards state."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from outstation.foundation.media import SoundFormat
from outstation.ml.datasets import training_data
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.inference import derived_features, inference, runtime, sound
from outstation.workbench.evaluation import evaluate, leakage
from outstation.workbench.evaluation.context import EvaluationRequest
from outstation.workbench.evaluation.document import Evaluation
from tests.kit.evaluations import check_result
from tests.kit.tensorflow_python import find_tensorflow

SOURCES = Path(__file__).resolve().parents[2] / "models" / "sources"
RECORDINGS = builtin.recordings_dir()
BOTH = pytest.mark.parametrize("name", ["solar", "machine"])


def module(name: str, file: str) -> ModuleType:
    """Import a script of the model's sources, which are not a package."""
    spec = importlib.util.spec_from_file_location(f"{name}_{file}", SOURCES / name / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def evaluated(name: str, **options: Any) -> Evaluation:
    content = bundle.read(builtin.bundles_dir() / name, builtin.publisher_keys())
    options = {"data": RECORDINGS / f"{name}.npz"} | options
    request = EvaluationRequest(train=SOURCES / name / "reference.npz", latency=False, **options)
    model = runtime.load_model(content.manifest, content.model_bytes)
    return evaluate.evaluate(content, inference.Inference(content.manifest, model), "", request, lambda _: None)


@pytest.fixture(scope="module")
def solar() -> Evaluation:
    return evaluated("solar", label="power", group="day", slices=("sky", "month"))


@pytest.fixture(scope="module")
def machine() -> Evaluation:
    return evaluated("machine", group="recording", slices=("fault", "subject"))


def card(name: str) -> str:
    return (SOURCES / name / "MODEL_CARD.md").read_text(encoding="utf-8")


def stated(name: str, metric: str) -> float:
    match = re.search(rf"^\| {metric} \| ([\d.]+) \|", card(name), re.MULTILINE)
    assert match, f"the card no longer says `| {metric} | …`"
    return float(match[1])


@BOTH
@pytest.mark.timeout(300)
def test_converting_the_committed_weights_gives_the_committed_model(tmp_path: Path, name: str) -> None:
    made = tmp_path / "model.tflite"
    command = [find_tensorflow(), str(SOURCES / name / "convert.py"), "-o", str(made)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert made.read_bytes() == (SOURCES / name / "model.tflite").read_bytes()


@BOTH
def test_the_bundle_has_the_model_scaling_and_cards_of_its_sources(name: str) -> None:
    content = bundle.read(builtin.bundles_dir() / name, builtin.publisher_keys())
    spec = tomllib.loads((SOURCES / name / "bundle.toml").read_text(encoding="utf-8"))
    assert content.model_bytes == (SOURCES / name / "model.tflite").read_bytes()
    assert content.files["MODEL_CARD.md"].decode() == card(name)
    assert f"sha256:{hashlib.sha256(content.model_bytes).hexdigest()}" in card(name)
    with np.load(SOURCES / name / "weights.npz", allow_pickle=False) as z:
        for key in ("mean", "std"):
            assert content.manifest.input.__getattribute__(key) == spec["input"][key]
            np.testing.assert_allclose(spec["input"][key], z[key], atol=1e-4)


def test_the_error_of_solar_is_what_its_card_says_on_days_it_has_not_seen(solar: Evaluation) -> None:
    error = solar.metrics[0]
    assert error.metric == "mae"
    # int8 kernels round differently between runtimes and CPUs.
    assert error.value == pytest.approx(stated("solar", "mean absolute error"), rel=0.02)
    assert check_result(solar, leakage.TRAIN_TEST_DUPLICATES).state == "ok"
    assert check_result(solar, leakage.GROUP_LEAKAGE).state == "ok"
    assert check_result(solar, leakage.DUPLICATE_GROUPS).state == "ok"
    assert check_result(solar, leakage.TEMPORAL_LEAKAGE).state == "ok"


def test_the_card_of_machine_states_its_anomalies_and_its_missed_fault(
    machine: Evaluation,
) -> None:
    [auc] = [measured for measured in machine.metrics if measured.metric == "auc"]
    assert auc.value == pytest.approx(stated("machine", "ROC AUC"), abs=0.01)
    assert [metric.slice for metric in machine.slices if metric.state == "worse"] == ["fault=loose, slight"]


def planted(path: Path, **changed: Any) -> Evaluation:
    """Return the held-out data of solar with other arrays."""
    with np.load(RECORDINGS / "solar.npz") as z:
        arrays = {key: z[key] for key in ("rows", "scale", "fields", "t", "power", "day")}
    arrays |= changed
    np.savez(path, **arrays)
    return evaluated("solar", data=path, label="power", group="day")


def test_rows_of_the_training_time_in_the_test_data_are_reported(tmp_path: Path) -> None:
    with np.load(RECORDINGS / "solar.npz") as late, np.load(SOURCES / "solar" / "reference.npz") as early:
        both = {key: np.concatenate([early[key][:4_000], late[key][4_000:]]) for key in ("rows", "power")}
    report = planted(tmp_path / "both.npz", **both)
    assert check_result(report, leakage.TRAIN_TEST_DUPLICATES).state == "warning"


def test_a_day_in_the_test_data_under_two_names_is_reported(tmp_path: Path) -> None:
    with np.load(RECORDINGS / "solar.npz") as z:
        rows, power, day = z["rows"].copy(), z["power"].copy(), z["day"]
    first, other = np.flatnonzero(day == day[9_600]), np.flatnonzero(day == day[19_200])
    rows[other], power[other] = rows[first], power[first]
    check = check_result(planted(tmp_path / "twin.npz", rows=rows, power=power), leakage.DUPLICATE_GROUPS)
    assert check.state == "warning"
    assert check.summary.startswith(f"day {day[9_600]}, {day[19_200]} share rows with another day")


def test_a_field_that_is_the_power_in_disguise_is_named(tmp_path: Path) -> None:
    with np.load(RECORDINGS / "solar.npz") as z:
        rows = z["rows"].copy()
        rows[:, 2] = np.nan_to_num(z["power"]) / 4 + np.random.default_rng(0).normal(0, 5, len(rows))
    check = check_result(planted(tmp_path / "leak.npz", rows=rows), leakage.TARGET_LEAKAGE)
    assert check.state == "warning"
    assert "temp_air" in check.summary


def test_two_weeks_lie_between_the_times_of_training_and_test() -> None:
    with np.load(SOURCES / "solar" / "reference.npz") as early, np.load(RECORDINGS / "solar.npz") as late:
        assert late["t"][0] - early["t"][-1] > 13 * 86_400
        assert not set(early["day"].tolist()) & set(late["day"].tolist())
        assert set(np.diff(late["t"]).tolist()) == {900}


def test_no_machine_of_the_test_was_trained_or_set_a_threshold() -> None:
    subjects = []
    for path in (SOURCES / "machine" / "reference.npz", SOURCES / "machine" / "calibrate.npz"):
        with np.load(path) as z:
            subjects += z["subject"].tolist()
            assert set(z["fault"].tolist()) == {"none"}
    with np.load(RECORDINGS / "machine.npz") as z:
        assert not set(subjects) & set(z["subject"].tolist())


def test_features_of_training_are_those_that_the_device_derives() -> None:
    recordings = module("solar", "recordings")
    content = bundle.read(builtin.bundles_dir() / "solar", builtin.publisher_keys())
    spec = content.manifest.input
    known = recordings.load(RECORDINGS / "solar.npz")
    given = training_data.read(RECORDINGS / "solar.npz", spec)
    made = derived_features.compute(given.features, given.t, spec)
    np.testing.assert_allclose(made[3:2000], known.features()[3:2000], rtol=1e-5, atol=1e-5)
    assert spec.columns == list(recordings.FEATURES)


def test_ten_seconds_of_a_machine_reproduce_the_committed_rows() -> None:
    sounds = module("machine", "sounds")
    made = sounds.record(9, 0)
    assert np.array_equal(made, sounds.record(9, 0))
    assert not np.array_equal(made, sounds.record(9, 1))
    spec = tomllib.loads((SOURCES / "machine" / "bundle.toml").read_text(encoding="utf-8"))["input"]["sound"]
    rows = sound.compute_mel_rows(made, SoundFormat(**spec))
    with np.load(RECORDINGS / "machine.npz") as z:
        committed = z["rows"][: z["starts"][1]] * z["scale"]
    assert np.abs(rows - committed).max() <= 0.26
