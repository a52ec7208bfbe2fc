"""The pytest plugin, as an application's tests use it: the example of the documentation, and what loading it costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from outstation.workbench.testing import fixtures
from outstation.workbench.testing.process import MissingProgram

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "workshop"


def test_the_example_applications_tests_pass(tmp_path: Path) -> None:
    """One command in the application's own folder, whatever the config of the project around it."""
    shutil.copy(Path(__file__).parents[3] / "pyproject.toml", tmp_path)
    folder = tmp_path / "workshop"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    # Options and plugins of this session are none of the application's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--basetemp", str(tmp_path / "t")],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "3 passed" in done.stdout


def test_a_project_with_an_agent_folder_of_its_own_uses_commands_and_plugin(tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "__init__.py").write_text("NAME = 'mine'\n")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["outstation.workbench.testing.fixtures"]\n')
    (tmp_path / "test_mine.py").write_text(
        "import agent\n\n\ndef test_mine(outstation_broker):\n"
        "    assert agent.NAME == 'mine'\n    assert outstation_broker.url\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    for arguments, shown in (
        (["-m", "outstation", "demo", "--help"], "Usage:"),
        (["-m", "outstation", "init", "pi", "--standalone", "--id", "pi-07"], "pi/outstation.toml"),
        (["-m", "pytest", "-q", "--basetemp", str(tmp_path / "t")], "1 passed"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert shown in done.stdout + done.stderr


def test_the_plugin_loads_nothing_before_a_fixture_is_requested() -> None:
    heavy = "{'numpy', 'cryptography', 'paho', 'outstation.device.config', 'outstation.workbench.testing.broker'}"
    script = f"import sys, pytest, outstation.workbench.testing.fixtures; print(sorted({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_only_a_session_that_names_the_plugin_loads_it() -> None:
    """An entry point would import the package in every session of the environment."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "pytest11" not in project.get("entry-points", {})


@pytest.mark.parametrize("hook", [fixtures.pytest_runtest_setup, fixtures.pytest_runtest_call])
def test_only_the_kits_own_exception_skips_a_test(
    hook: Callable[[Any], Generator[None, None, None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_in_test(error: Exception) -> None:
        running = hook(None)
        next(running)
        running.throw(error)

    monkeypatch.delenv("CI", raising=False)
    namesake = type("MissingProgram", (Exception,), {})
    with pytest.raises(namesake):
        raise_in_test(namesake("of another project"))
    with pytest.raises(pytest.skip.Exception, match="mosquitto"):
        raise_in_test(MissingProgram("mosquitto is not installed"))
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="mosquitto"):
        raise_in_test(MissingProgram("mosquitto is not installed"))
