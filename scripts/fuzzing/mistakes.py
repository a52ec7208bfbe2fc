"""Command `python -m scripts.fuzzing.mistakes`: mistakes of the first hours, and a rating of their answers.

An answer has three points: it is one line, with the documented exit code; it names the file, key or value; it says what
to do. A traceback has none.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from scripts.fuzzing import site
from scripts.fuzzing.malformed import run_command
from scripts.fuzzing.mistake_table import MISTAKES, Mistake

FULL_MARKS = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """`faults` says what is missing; `points` is at most FULL_MARKS."""

    mistake: Mistake
    code: int
    text: str
    faults: list[str]
    points: int


def make_mistakes(chosen: Iterable[Mistake], site_folder: Path) -> Iterator[Answer]:
    """Make each mistake in a copy of the site of its own."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="m") as scratch:
        folder = Path(scratch) / "c"
        for mistake in chosen:
            shutil.copytree(site_folder, folder, symlinks=True)
            os.chdir(folder)
            try:
                yield _make(mistake, folder)
            finally:
                os.chdir(here)
                shutil.rmtree(folder, ignore_errors=True)


def _make(mistake: Mistake, folder: Path) -> Answer:
    for name, text in mistake.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    config = folder / "device" / "outstation.toml"
    before = config.read_text(encoding="utf-8")
    assert mistake.swap[0] in before, mistake
    config.write_text(before.replace(*mistake.swap, 1) + mistake.append, encoding="utf-8")
    words = [re.sub(r"\{(.+)\}", r"\1", word) for word in mistake.command.split()]
    outcome = run_command(words)
    lines = [line for line in outcome.errors.splitlines() if not line.startswith("INFO: ")]
    text = "\n".join(lines) or outcome.output
    return _rate(mistake, outcome.code, text, lines, outcome.problem)


def _rate(mistake: Mistake, code: int, text: str, lines: list[str], problem: str) -> Answer:
    form = [f"exit code {code}, not {mistake.code}"] if code != mistake.code else []
    form += [problem] if problem else [f"{len(lines)} lines"] if len(lines) > 1 else []
    names = [f"does not name {name!r}" for name in mistake.names if name not in text]
    remedy = [] if mistake.remedy in text else [f"does not say {mistake.remedy!r}"]
    crash = "traceback" in problem.lower() or problem.startswith("hangs")
    points = 0 if crash else FULL_MARKS - bool(form) - bool(names) - bool(remedy)
    return Answer(mistake, code, text, [*form, *names, *remedy], points)


@click.command()
@click.option("--only", default="", help="Only mistakes whose command contains this text.")
@click.option("-v", "verbose", is_flag=True, help="Print every answer, not only those with less than full marks.")
def main(only: str, verbose: bool) -> None:
    """Make every mistake; exit code 1 if an answer has less than full marks."""
    with tempfile.TemporaryDirectory(prefix="s") as made:
        with contextlib.redirect_stdout(io.StringIO()):
            folder = site.build(Path(made) / "site")
        answers = [*make_mistakes([mistake for mistake in MISTAKES if only in mistake.command], folder)]
    for answer in answers:
        if verbose or answer.faults:
            click.echo(f"{answer.points} $ outstation {answer.mistake.command}  (exit code {answer.code})")
            if added := answer.mistake.append or answer.mistake.swap[1] or "".join(answer.mistake.files.values()):
                click.echo(f"    with {added[:150]!r}")
            click.echo("\n".join(f"    > {line[:400]}" for line in answer.text.splitlines()[:6]))
            click.echo("".join(f"    ! {fault[:300]}\n" for fault in answer.faults), nl=False)
    mean = sum(answer.points for answer in answers) / max(1, len(answers))
    click.echo(
        f"{len(answers)} mistakes, mean {mean:.2f} of {FULL_MARKS}; {sum(bool(a.faults) for a in answers)} below"
    )
    sys.exit(any(answer.faults for answer in answers))


if __name__ == "__main__":
    main()
