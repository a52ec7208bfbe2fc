"""The ill models that other tests count on are ill in the way they say, and only where they should be."""

from __future__ import annotations

import importlib.util
import itertools
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from outstation.ml.model.bundle import bundle
from outstation.ml.model.inference import features, runtime
from outstation.ml.model.sandbox import probe
from scripts.kit.bundles import CLASSIFY, KEY, around, model, readings
from scripts.kit.rigged import KINDS, SHIPPED, TRAP_LIMIT, build_rigged_bundle, write_bundle
from tests.kit.marks import crashing

needs_schema = pytest.mark.skipif(
    not importlib.util.find_spec("ai_edge_litert"), reason="ai-edge-litert is missing: its schema rigs the models"
)
CALM = np.clip(readings(40), -3, 3)
WILD = np.where(np.arange(160).reshape(40, 4) == 77, np.float32(3.9), CALM)
RUN = """
import sys, numpy as np
from outstation.ml.model.inference import runtime
runtime.TfliteModel(open(sys.argv[1], "rb").read()).invoke(np.load(sys.argv[2]))
print("done")
"""


def run(folder: Path, trap: str, rows: np.ndarray, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    (folder / "model.tflite").write_bytes(model(f"rigged_{trap}"))
    np.save(folder / "rows.npy", rows)
    command = [sys.executable, "-c", RUN, str(folder / "model.tflite"), str(folder / "rows.npy")]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.mark.parametrize("trap", ["crash", "hang", "error", "slow", "sensitive"])
def test_on_calm_data_a_rigged_model_answers_as_it_did_before(trap: str) -> None:
    sound = runtime.TfliteModel(model("classify_int8")).invoke(CALM)
    assert np.array_equal(runtime.TfliteModel(model(f"rigged_{trap}")).invoke(CALM), sound)


@crashing
def test_the_crashing_model_ends_its_process_on_wild_data(tmp_path: Path) -> None:
    assert run(tmp_path, "crash", CALM).stdout == "done\n"
    assert run(tmp_path, "crash", WILD).returncode == -signal.SIGFPE


def test_the_hanging_model_never_comes_back_from_wild_data(tmp_path: Path) -> None:
    assert run(tmp_path, "hang", CALM).stdout == "done\n"
    with pytest.raises(subprocess.TimeoutExpired):
        run(tmp_path, "hang", WILD, timeout_s=3.0)


def test_the_failing_model_is_refused_wild_data_by_the_runtime(tmp_path: Path) -> None:
    assert run(tmp_path, "error", CALM).stdout == "done\n"
    failed = run(tmp_path, "error", WILD)
    assert failed.returncode == 1
    assert "BadBundle" in failed.stderr


def test_the_sensitive_model_names_the_first_class_where_values_are_large() -> None:
    sound = runtime.TfliteModel(model("classify_int8")).invoke(WILD).argmax(axis=1)
    predictions = runtime.TfliteModel(model("rigged_sensitive")).invoke(WILD).argmax(axis=1)
    assert sound[19] != 0
    assert predictions[19] == 0
    assert (np.delete(predictions, 19) == np.delete(sound, 19)).all()


@pytest.mark.parametrize("trap", ["crash", "hang", "error", "slow", "sensitive"])
def test_a_rigged_model_passes_the_probe(trap: str) -> None:
    probe.probe(around(model(f"rigged_{trap}"), CLASSIFY)).raise_for_failure()


@needs_schema
@pytest.mark.parametrize("kind", KINDS)
def test_only_wrong_golden_vectors_reveal_a_rigged_bundle(tmp_path: Path, kind: str) -> None:
    content = bundle.read(write_bundle(build_rigged_bundle(kind), tmp_path / kind), [KEY.public])
    report = probe.probe(content)
    assert report.ok == (kind != "wrong"), report.checks
    assert content.manifest.version == "2.0.0"


@needs_schema
def test_some_of_the_recorded_windows_spring_the_trap_and_most_do_not() -> None:
    shipped = bundle.read(SHIPPED, None)
    with np.load(SHIPPED.parent / "recordings" / "exercise.npz") as recorded:
        rows, begins = recorded["rows"], recorded["starts"]
    starts = np.concatenate([np.arange(a, b - 99, 100) for a, b in itertools.pairwise(begins)])
    scaled = features.build_windows(rows, starts, shipped.manifest.input)
    share = float((scaled.reshape(len(starts), -1).max(axis=1) > TRAP_LIMIT).mean())
    assert 0.02 < share < 0.3
    sound = runtime.load_model(shipped.manifest, shipped.model_bytes).invoke(scaled)
    files = build_rigged_bundle("sensitive")
    predictions = runtime.TfliteModel(files["model.tflite"]).invoke(scaled)
    assert float((predictions.argmax(axis=1) == sound.argmax(axis=1)).mean()) < 1 - share / 2
