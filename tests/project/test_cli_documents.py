"""Command line: reference page, man pages and completion agree with the commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from scripts import cli_documents

COMMANDS = list(cli_documents.walk())


def test_the_reference_page_agrees_with_the_commands() -> None:
    page = cli_documents.PAGE.read_text(encoding="utf-8")
    assert page == cli_documents.render_page(), "run python -m scripts.cli_documents"


def test_every_command_has_an_example_that_calls_it() -> None:
    wrong = [
        " ".join(path)
        for path, command in COMMANDS
        if not isinstance(command, click.Group) and f"Example: {' '.join(path)}" not in (command.epilog or "")
    ]
    assert wrong == []


@pytest.mark.skipif(not shutil.which("groff"), reason="needs groff")
def test_the_man_pages_are_sound(tmp_path: Path) -> None:
    for path, command in COMMANDS:
        text = cli_documents.render_man_page(path, command)
        (tmp_path / f"{'-'.join(path)}.1").write_text(text, encoding="utf-8")
    pages = sorted(map(str, tmp_path.glob("*.1")))
    done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", *pages], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "outstation fleet enrol pi-07 --request" in done.stdout.replace("\u2010", "-")


@pytest.mark.parametrize("shell", cli_documents.COMPLETIONS)
def test_completion_asks_the_program(shell: str) -> None:
    assert "_OUTSTATION_COMPLETE" in cli_documents.render_completion(shell)


def test_words_are_completed() -> None:
    variables = {"_OUTSTATION_COMPLETE": "bash_complete", "COMP_WORDS": "outstation fleet enr", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "outstation"], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["plain,enrol", "plain,enrol-list"]
