"""Python with the TensorFlow that the models' sources and `scripts/shrink_keras.py` need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_BUILDER = Path(__file__).parents[2] / ".venv-models" / "bin" / "python"
_PINNED = "tensorflow_cpu-2.21.0.dist-info"


def find_tensorflow() -> str:
    """Return the interpreter; skip the test if there is none."""
    check = f"import sys, pathlib; sys.exit(not any((pathlib.Path(p) / {_PINNED!r}).exists() for p in sys.path))"
    for python in (str(_BUILDER), sys.executable):
        if Path(python).exists() and subprocess.run([python, "-c", check], check=False).returncode == 0:
            return python
    pytest.skip("tensorflow-cpu 2.21.0 is missing: scripts/build_models makes .venv-models with it")
