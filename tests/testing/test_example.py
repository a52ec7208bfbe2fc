"""The pytest plugin, as an application's tests use it: the example of the documentation, and what loading it costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "workshop"


def test_the_example_applications_tests_pass(tmp_path: Path) -> None:
    """One command in the application's own folder, with no config of ours."""
    folder = tmp_path / "workshop"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "agent.testing.fixtures", "--rootdir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "--basetemp", str(tmp_path / "t"), str(folder)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "3 passed" in done.stdout


def test_the_plugin_loads_nothing_before_a_fixture_is_requested() -> None:
    heavy = "{'numpy', 'cryptography', 'paho', 'agent.config', 'agent.testing.broker'}"
    script = f"import sys, pytest, agent.testing.fixtures; print(sorted({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
