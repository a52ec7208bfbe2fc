"""Commands of other packages: listed, run, never in the place of a shipped one, and blamed for their own defects."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from outstation.workbench.testing.process import run_outstation
from tests.kit.plugins import install_module

pytestmark = pytest.mark.exec

COMMAND = """
import click
from outstation.foundation.errors import UsageError

@click.command()
@click.argument("word")
def greet(word):
    if word == "nobody":
        raise UsageError("nobody: this argument names no person")
    click.echo(f"hello {word} {1 // len(word)}")
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_outstation(*words, env={**os.environ, "PYTHONPATH": str(folder)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    install_module(tmp_path, "greeter", COMMAND, "outstation.commands", "greet", "greet")
    return tmp_path


def test_a_command_of_another_package_is_listed_under_its_package_and_runs(folder: Path) -> None:
    help_text = run(folder, "--help").stdout
    assert "Commands of other packages:\n  greet  From greeter 1.0." in help_text
    assert "Commands of other packages" not in run_outstation("--help").stdout
    assert run(folder, "greet", "x").stdout == "hello x 1\n"
    assert "Usage: outstation greet" in run(folder, "greet", "--help").stdout
    mistyped = run(folder, "gret", "x")
    assert (mistyped.returncode, "did you mean 'greet'?" in mistyped.stderr) == (2, True)


def test_its_wrong_use_is_one_line_and_its_defect_is_its_own(folder: Path) -> None:
    wrong = run(folder, "greet", "nobody")
    assert (wrong.returncode, wrong.stderr) == (2, "outstation: nobody: this argument names no person\n")
    defect = run(folder, "greet", "")
    assert defect.returncode == 1
    assert "internal error: ZeroDivisionError" in defect.stderr
    assert "this is a defect of greeter 1.0: report it" in defect.stderr


@pytest.mark.attack("package index")
def test_no_package_replaces_a_shipped_command(tmp_path: Path) -> None:
    install_module(tmp_path, "thief", "raise SystemExit('taken over')", "outstation.commands", "privacy", "x")
    assert "Usage: outstation privacy" in run(tmp_path, "privacy", "--help").stdout
    assert "thief" not in run(tmp_path, "--help").stdout


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1 / 0", "'greet' of package broken 1.0 cannot be loaded: ZeroDivisionError"),
        ("greet = 3", "broken:greet is no click command; see docs/guides/plugins.md"),
        ("", "'greet' of package broken 1.0 cannot be loaded: AttributeError"),
    ],
)
def test_a_broken_package_is_named_and_the_list_of_commands_still_shows(
    tmp_path: Path, text: str, problem: str
) -> None:
    install_module(tmp_path, "broken", text, "outstation.commands", "greet", "greet")
    refused = run(tmp_path, "greet")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert problem in refused.stderr
    assert "From broken 1.0." in run(tmp_path, "--help").stdout


def test_two_packages_with_one_command_are_both_named(folder: Path) -> None:
    install_module(folder, "another", COMMAND, "outstation.commands", "greet", "greet")
    refused = run(folder, "greet", "x")
    assert "'greet' is in several packages: another 1.0, greeter 1.0; uninstall all but one" in refused.stderr
