"""`scripts/shrink_keras.py`: what it compares, and what it says without TensorFlow."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import shrink_keras

SCRIPT = Path(shrink_keras.__file__)


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed")
def test_without_tensorflow_the_script_names_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "model.keras", "data.npz", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "shrink_keras: TensorFlow is missing: pip install tensorflow-cpu==2.21.0\n"


def test_every_fifth_row_is_held_out_where_no_test_rows_are_given(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.arange(20).reshape(10, 2), y=np.arange(10))
    x, y, x_test, y_test = shrink_keras.read_data(tmp_path / "data.npz")
    assert (y.tolist(), y_test.tolist()) == ([1, 2, 3, 4, 6, 7, 8, 9], [0, 5])
    assert (len(x), len(x_test)) == (8, 2)
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 2)), y=np.zeros(2))
    with pytest.raises(ValueError, match="as many rows"):
        shrink_keras.read_data(tmp_path / "data.npz")


def test_the_difference_to_float32_is_paired() -> None:
    y = np.array([0, 1, 1, 0] * 25)
    rows: list[dict[str, Any]] = [
        {"name": name, "bytes": 1, "us_per_row": 1.0, "accuracy": 0.0} for name in ("float32", "int8")
    ]
    rows[0]["answers"], rows[1]["answers"] = y, np.where(np.arange(100) < 10, 1 - y, y)
    shrink_keras.compare(rows, y, is_classifier=True)
    assert (rows[1]["difference"], rows[1]["agreement"]) == (pytest.approx(-0.1), 0.9)
    assert rows[1]["low"] == pytest.approx(-0.1 - 1.96 * 0.03)
    assert "| int8 | 1 | 0.0000 | -0.1000 (-0.1588 to -0.0412) | 0.900 | 1.0 |" in shrink_keras.to_markdown(
        rows, is_classifier=True
    )


def test_a_temperature_softens_answers_in_their_order() -> None:
    softened = shrink_keras.soften(np.array([[0.9, 0.08, 0.02]], np.float32), 3.0)
    assert softened.sum() == pytest.approx(1)
    assert 0.9 > softened[0, 0] > softened[0, 1] > softened[0, 2] > 0.02
