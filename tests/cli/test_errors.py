"""Every failure of a command ends in one line; a message that repeats in the log is counted."""

from __future__ import annotations

import builtins
import errno
import gc
import io
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from outstation.foundation.cli.log_format import PrintableFormatter, RepeatHandler
from outstation.foundation.errors import StorageError
from scripts.fuzzing import malformed, site
from scripts.fuzzing.malformed import run_command
from tests.kit.commands import call_outstation

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site.build(tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize("part", ["arguments", "files", "cells"])
def test_malformed_input_is_answered_in_one_line(made: Path, part: str) -> None:
    random = Random(3)
    chosen = random.sample([case for case in malformed.cases_of(part, made) if not case.title.startswith("batch")], 25)
    results = list(malformed.run_cases(chosen, made, random))
    assert [(case.title, outcome.problem, outcome.errors) for case, outcome in results if outcome.problem] == []
    assert sum(outcome.code > 0 for _, outcome in results) >= 3, "these inputs are not wrong"


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("results", "x"), "there is no task 'x'; the config has no task; add a section [tasks.NAME]"),
        (("tail", "x"), "there is no stream 'x'; the config has no stream; add a section [streams.NAME]"),
    ],
)
def test_a_name_on_a_device_without_any_is_answered_with_how_to_add_one(
    tmp_path: Path, args: tuple[str, ...], problem: str
) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text('[device]\nid = "pi"\nfleet = "acme"\n')
    done = call_outstation(*args, "-c", str(file))
    assert done.returncode == 2
    assert problem in done.stderr


def test_a_command_in_a_process_that_goes_on_leaves_garbage_collection_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("disable", "freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda name=name: pytest.fail(name))
    assert call_outstation("status", "-c", str(tmp_path / "no.toml")).returncode == 2
    assert gc.isenabled()


@pytest.mark.process
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_started_without_standard_output_or_error_ends_as_otherwise(tmp_path: Path, closed: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m outstation status -c no.toml {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == int("2>" not in closed), done.stderr


@pytest.mark.process
def test_an_interrupt_while_modules_are_imported_is_one_line(tmp_path: Path) -> None:
    # The import of Click ends as by Ctrl-C.
    (tmp_path / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    program = "import sys\nfrom outstation.__main__ import main\nsys.path.insert(0, sys.argv.pop(1))\n"
    program += "def restore(*_):\n    sys.path.pop(0)\n    raise KeyboardInterrupt\n"
    program += "import signal\nsignal.signal(signal.SIGINT, restore)\nmain()"
    # As a file: a fork has imported Click before.
    path = tmp_path / "program" / "interrupted.py"
    path.parent.mkdir()
    path.write_text(program)
    command = [sys.executable, str(path), str(tmp_path), "status"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (1, "outstation: interrupted\n")


def test_a_command_that_needs_a_missing_package_names_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without_rich(name: str, *more: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "rich":
            raise ModuleNotFoundError("No module named 'rich'", name="rich")
        return load(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    monkeypatch.delattr("outstation.fleet.cli.rollout_table", raising=False)
    monkeypatch.delitem(sys.modules, "outstation.fleet.cli.rollout_table", raising=False)
    folder = str(made / "fleet")
    outcome = run_command(["fleet", "rollout", "status", "--dir", folder])
    assert (outcome.code, outcome.errors.count("\n")) == (1, 1)
    assert "needs the package 'rich', which is not installed" in outcome.errors
    assert run_command(["fleet", "rollout", "status", "--json", "--dir", folder]).code == 0


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
@pytest.mark.parametrize("content", ["", "\n", "\n \n\n"])
@pytest.mark.parametrize("command", ["ingest watch", "label exercise"])
def test_an_empty_file_is_not_accepted(made: Path, tmp_path: Path, name: str, content: str, command: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    outcome = run_command([*command.split(), str(file), "-c", str(made / "device" / "outstation.toml")])
    assert (outcome.code, outcome.errors.count("\n")) == (2, 1)
    assert str(file) in outcome.errors


@pytest.fixture
def written() -> Iterator[tuple[logging.Logger, RepeatHandler, io.StringIO]]:
    """Yield a log, its handler, and what it writes."""
    text = io.StringIO()
    handler = RepeatHandler(text)
    handler.setFormatter(PrintableFormatter("%(levelname)s %(message)s"))
    log = logging.getLogger("test.repeats")
    log.addHandler(handler)
    log.propagate = False
    yield log, handler, text
    log.removeHandler(handler)


Written = tuple[logging.Logger, RepeatHandler, io.StringIO]


def test_an_error_that_repeats_is_one_line_and_then_a_count(written: Written) -> None:
    log, handler, text = written
    for number in range(10_000):
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError:
            log.exception("connection %d is refused", number)
    handler.close()
    first, last = text.getvalue().splitlines()
    assert first == "ERROR connection 0 is refused: [Errno 24] Too many open files"
    assert last.startswith("ERROR 9999 times more in ")
    assert last.endswith(" s: connection 0 is refused")


def test_a_defect_is_logged_with_its_traceback_once(written: Written) -> None:
    log, _, text = written

    def fail(error: Exception) -> None:
        try:
            raise error
        except (KeyError, StorageError):
            log.exception("a batch failed")

    for _ in range(2):
        fail(KeyError("a"))
    try:
        raise StorageError("full")
    except StorageError:
        log.exception("a batch failed")
    assert text.getvalue().count("Traceback") == 1
    assert text.getvalue().endswith("ERROR a batch failed: full\n")


def test_different_messages_are_all_written(written: Written) -> None:
    log, _, text = written
    for number in range(1000):
        log.warning("row %d", number)
    assert len(text.getvalue().splitlines()) == 1000
