"""Blocks of README.md: each is run, in order, or is marked with a reason. CONTRIBUTING.md defines the convention."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from scripts import faults
from scripts.kit.bundles import MODELS, THIRD_PARTY

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"<!-- (run|not run: \S.*) -->")
# They run the test suite, or change the system.
NEVER_RUN = re.compile(r"scripts/(test|check|demo|bench|torture)|\.ci/run|\bsudo\b|\bapt-get\b|\bgit clone\b")


@dataclass(frozen=True, slots=True)
class Block:
    """One ```sh block, which a reader pastes as a whole; `mark` is the text of the comment above it, or `""`."""

    line: int
    mark: str
    script: str


def blocks(text: str) -> list[Block]:
    """Return the shell blocks of a Markdown text."""
    lines = text.splitlines()
    shell_blocks = []
    for at, line in enumerate(lines):
        if line.strip() == "```sh":
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            above = next((line_above for line_above in reversed(lines[:at]) if line_above.strip()), "")
            mark = MARK.fullmatch(above.strip())
            shell_blocks.append(Block(at + 1, mark[1] if mark else "", "\n".join(lines[at + 1 : end])))
    return shell_blocks


class Shell:
    """A bash process that keeps its folder and variables across blocks, as a reader's terminal does."""

    def __init__(self, folder: Path) -> None:
        tools = Path(sys.executable).parent
        assert shutil.which("outstation", path=str(tools)), "the package is not installed; run scripts/setup"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTSTATION_")}
        environment |= {"PATH": f"{tools}:{environment['PATH']}:/usr/sbin", "HOME": str(folder), "COLUMNS": "120"}
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str) -> tuple[int, str]:
        """Return exit code and output of a command; 130 if it ended the shell."""
        assert self._bash.stdin
        assert self._bash.stdout
        # Quoted, so that a command with an open quote or here-document fails instead of consuming the next ones.
        # Without input, so that a command that reads does not consume them either.
        self._bash.stdin.write(f"eval {shlex.quote(command)} </dev/null\nprintf '\\n=== %d ===\\n' $?\n")
        self._bash.stdin.flush()
        output: list[str] = []
        for line in self._bash.stdout:
            if code := re.fullmatch(r"=== (\d+) ===\n", line):
                return int(code[1]), "".join(output)
            output.append(line)
        return 130, "".join(output)

    def close(self) -> None:
        """End bash and its background processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGTERM)
        self._bash.communicate(timeout=60)


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_shell_block_of_the_readme_says_whether_it_is_run() -> None:
    shell_blocks = blocks(README)
    assert shell_blocks, "README.md has no ```sh block"
    assert [f"line {block.line}" for block in shell_blocks if not block.mark] == []
    assert [f"line {block.line}" for block in shell_blocks if runs(block) and NEVER_RUN.search(block.script)] == []


def test_the_readme_is_short_and_its_blocks_can_be_pasted() -> None:
    assert len(README.splitlines()) <= 120
    assert "```console" not in README
    prompts = [line for block in blocks(README) for line in block.script.splitlines() if re.match("[$>#] ", line)]
    assert prompts == []


def test_the_numbers_of_the_readme_are_measured_ones() -> None:
    page = ROOT / "docs" / "internals" / "drift-benchmarks.md"
    section = page.read_text(encoding="utf-8").partition("| quiet data |")[2].partition("\n\n")[0]
    rates = [[float(rate) for rate in re.findall(r"\| ([\d.]+) of ", line)] for line in section.splitlines()[2:]]
    text = " ".join(README.split())
    quiet = sum(max(row) <= 10 for row in rates)
    assert f"At most 10 of 1,000 quiet windows raise an alarm, on {quiet} of {len(rates)} kinds of data" in text
    largest = max(map(max, rates))
    assert f", {largest:.0f} do ([measured]" in text if largest > 10 else "kinds of data ([measured]" in text
    assert f"injects [{len(faults.read_table())} faults]" in text


@pytest.mark.timeout(300)
def test_the_blocks_of_the_readme_work_in_order(tmp_path: Path) -> None:
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    with contextlib.closing(Shell(tmp_path)) as shell:
        for block in filter(runs, blocks(README)):
            code, output = shell.run(f"set -ev\n{block.script}\nset +ev")
            assert code == 0, f"README.md line {block.line} ended with {code}:\n{output}"


def test_a_third_party_model_runs_by_the_ten_lines_of_the_readme(tmp_path: Path) -> None:
    theirs = THIRD_PARTY / "mlperf_kws_int8.tflite"
    shutil.copy(theirs if theirs.exists() else MODELS / "foreign_keywords.tflite", tmp_path / "mymodel.tflite")
    # Half a minute of cepstral features, in the authors' layout, as a table.
    cepstra = np.random.default_rng(0).normal(0, 20, (49 * 30, 10))
    lines = [",".join(f"{value:.3f}" for value in (1_764_022_680 + i / 50, *row)) for i, row in enumerate(cepstra)]
    (tmp_path / "readings.csv").write_text("\n".join(["t,c0,c1,c2,c3,c4,c5,c6,c7,c8,c9", *lines]) + "\n")
    [block] = [candidate for candidate in blocks(README) if "--from mymodel.tflite" in candidate.script]
    # The first line creates the model file that the block assumes.
    first, *rest = block.script.splitlines()
    assert first.startswith("cp ")
    assert len(rest) < 10
    with contextlib.closing(Shell(tmp_path)) as shell:
        code, output = shell.run("\n".join(["set -ev", *rest, "set +ev"]))
        assert code == 0, f"README.md line {block.line} ended with {code}:\n{output}"
        code, output = shell.run("outstation status -c site/outstation.toml --json 2>/dev/null")
    [task] = [candidate for candidate in json.loads(output)["tasks"] if candidate["task"] == "mymodel"]
    assert task["row"] == len(cepstra)


def runs(block: Block) -> bool:
    return block.mark.startswith("run")


def test_a_block_is_read_with_its_mark() -> None:
    text = "<!-- run -->\n\n```sh\necho a \\\n    b\ncat <<E\nx\n\nE\n```\n\n```sh\nfalse\n```\n"
    first, second = blocks(text)
    assert first == Block(3, "run", "echo a \\\n    b\ncat <<E\nx\n\nE")
    assert (second.mark, runs(second)) == ("", False)


@pytest.mark.parametrize("comment", ["<!-- not run -->", "<!-- not run: -->", "<!-- runs -->"])
def test_a_block_is_left_out_only_with_a_reason(comment: str) -> None:
    assert blocks(f"{comment}\n```sh\ntrue\n```\n")[0].mark == ""


def test_the_shell_keeps_its_folder_and_reports_how_a_command_ended(tmp_path: Path) -> None:
    with contextlib.closing(Shell(tmp_path)) as shell:
        assert shell.run("mkdir inner && cd inner && name=x") == (0, "\n")
        assert shell.run('echo "$name" && pwd') == (0, f"x\n{tmp_path}/inner\n\n")
        assert shell.run("cat; false")[0] == 1
        assert shell.run("cat <<'E'\na 'b\nE") == (0, "a 'b\n\n")
        assert shell.run("echo 'open")[0] == 2
        assert shell.run("sleep 60 &")[0] == 0
