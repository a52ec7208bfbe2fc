"""Committed model: equal to the output of its sources, and as accurate as its card states."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kit.tensorflow_python import find_tensorflow

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "models" / "sources" / "exercise"
RECORDINGS = ROOT / "models" / "recordings" / "exercise.npz"
CARD = (SOURCE / "MODEL_CARD.md").read_text()
SPEC = tomllib.loads((SOURCE / "bundle.toml").read_text())


def interpreter() -> Any:
    for module in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"):
        if find_spec(module.split(".")[0]):
            return import_module(module).Interpreter(model_path=str(SOURCE / "model.tflite"), num_threads=1)
    pytest.skip("neither ai-edge-litert nor tflite-runtime is installed")


def held_out_windows() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return windows (w, 100, 6) in physical units from each recording's first row, and their labels (w,)."""
    rows = SPEC["input"]["window"]["rows"]
    with np.load(RECORDINGS, allow_pickle=False) as z:
        parts = [z["rows"][a:b] for a, b in zip(z["starts"][:-1], z["starts"][1:], strict=True)]
        windows = [p[: len(p) // rows * rows].reshape(-1, rows, p.shape[1]) for p in parts]
        return np.concatenate(windows), np.repeat(z["label"].astype(np.int64), [len(w) for w in windows])


def answer(windows: NDArray[np.float32], batch: int) -> NDArray[np.int8]:
    """Return the raw int8 outputs (w, 7)."""
    model = interpreter()
    entry, leave = model.get_input_details()[0], model.get_output_details()[0]
    step, zero = entry["quantization"]
    scaled = (windows - np.array(SPEC["input"]["mean"], np.float32)) / np.array(SPEC["input"]["std"], np.float32)
    counts = np.clip(np.round(scaled / step) + zero, -128, 127).astype(np.int8)
    out = []
    for i in range(0, len(counts), batch):
        model.resize_tensor_input(entry["index"], counts[i : i + batch].shape, strict=True)
        model.allocate_tensors()
        model.set_tensor(entry["index"], counts[i : i + batch])
        model.invoke()
        out.append(model.get_tensor(leave["index"]))
    return np.concatenate(out)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.timeout(300)
def test_converting_the_committed_weights_gives_the_committed_model(tmp_path: Path) -> None:
    made = tmp_path / "model.tflite"
    run = subprocess.run(
        [find_tensorflow(), str(SOURCE / "convert.py"), "-o", str(made)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert digest(made) == digest(SOURCE / "model.tflite")


def test_the_int8_model_has_the_held_out_accuracy_its_card_states() -> None:
    stated = re.search(r"int8 accuracy +(0\.\d{4})", CARD)
    assert stated, "the card no longer prints `int8 accuracy 0.…`"
    windows, label = held_out_windows()
    # Two windows of tolerance: int8 kernels round differently between runtimes and CPUs.
    assert np.mean(answer(windows, 64).argmax(1) == label) == pytest.approx(float(stated[1]), abs=2 / len(label))


def test_a_batch_gives_the_same_outputs_as_one_window_at_a_time() -> None:
    windows, _ = held_out_windows()
    np.testing.assert_array_equal(answer(windows[:150], 64), answer(windows[:150], 1))


def test_the_model_is_int8_at_both_ends_with_a_free_batch_size() -> None:
    model = interpreter()
    entry, leave = model.get_input_details()[0], model.get_output_details()[0]
    assert (entry["dtype"], leave["dtype"]) == (np.int8, np.int8)
    assert entry["shape_signature"].tolist() == [-1, SPEC["input"]["window"]["rows"], len(SPEC["input"]["fields"])]
    assert leave["shape_signature"].tolist() == [-1, len(SPEC["labels"])]


def test_the_bundle_scales_inputs_as_the_weights_were_trained() -> None:
    with np.load(SOURCE / "weights.npz", allow_pickle=False) as z:
        np.testing.assert_allclose(SPEC["input"]["mean"], z["mean"], rtol=1e-6)
        np.testing.assert_allclose(SPEC["input"]["std"], z["std"], rtol=1e-6)


def test_no_held_out_subject_is_among_the_training_subjects() -> None:
    with np.load(SOURCE / "reference.npz", allow_pickle=False) as train, np.load(RECORDINGS) as test:
        assert set(train["subject"].tolist()) == {1, 2, 3, 4, 5, 6, 7}
        assert set(test["subject"].tolist()) == {8, 9, 10}
        assert train["labels"].tolist() == test["labels"].tolist() == SPEC["labels"]
        assert train["fields"].tolist() == test["fields"].tolist() == SPEC["input"]["fields"]
