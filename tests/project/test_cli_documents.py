"""Command line: reference page, man pages and completion agree with the commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from scripts import cli_documents

COMMANDS = list(cli_documents.walk())


def test_the_reference_pages_agree_with_the_commands() -> None:
    pages = cli_documents.render_pages()
    folder = cli_documents.REFERENCE
    assert {"cli.md", *(f"cli/{path.name}" for path in (folder / "cli").iterdir())} == set(pages)
    for name, text in pages.items():
        assert (folder / name).read_text(encoding="utf-8") == text, "run python -m scripts.cli_documents"


def test_each_command_is_described_once() -> None:
    text = "\n".join(cli_documents.render_pages().values())
    for path, _ in COMMANDS[1:]:
        assert len(re.findall(rf"^#+ {re.escape(' '.join(path))}$", text, re.MULTILINE)) == 1, path


def test_the_fleet_lists_at_most_twenty_commands_under_headings() -> None:
    group = dict(COMMANDS)["outstation", "fleet"]
    assert isinstance(group, click.Group)
    shown = group.get_help(click.Context(group))
    names = re.findall(r"^  ([a-z][a-z-]*)  ", shown, re.MULTILINE)
    assert len(names) <= 20
    assert sorted(names) == sorted(group.list_commands(click.Context(group)))
    assert "Commands:" not in shown


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
    assert done.stdout.split() == ["plain,enrol"]
