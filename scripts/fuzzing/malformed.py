"""Command `python -m scripts.fuzzing.malformed`: wrong files, arguments and table cells for every command.

A run passes if the command ends in time, with exit code 0, 1 or 2, with no traceback, and with at most one line of its
own on standard error besides those of its log.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType

import click

from outstation import __main__ as cli
from scripts.fuzzing import site
from scripts.fuzzing.mutate import mutated

PARTS = ("arguments", "files", "cells")
TIMEOUT_S = 20
_NAME_MAX = 255
# Words in braces are files of the site; `-c` and `--dir` follow.
_ON_DEVICE = """
status / status --json / check / batch / batch exercise / cost / cost exercise / head / drift exercise
drift exercise --plot {out.svg} / disclose exercise --rows 1-100 / reference show exercise
reference relearn exercise --wait 0 / ingest watch {rows.csv} / label exercise {labels.csv}
"""
_ON_FLEET = """
devices / devices --db {fleet/fleet.db} / alerts / alerts --all / audit / audit --json / log gaps / drift / keys show
repository status / repository refresh / repository copy {out} / rollout status / rollout start {rows.csv}
log accept pi-07 / devices token pi-08 / enrol pi-08 --request {out.json} / devices revoke pi-07
log disclosed {labels.csv} / labels add pi-07 exercise {labels.csv} / publish {bundle} --no-probe
keys collector north / keys collector north --revoke / keys reissue operator / devices renew
devices enrol-list {rows.csv} --out {out} / devices watch --raw --seconds 1 / evidence {out}
"""
_ON_FILES = """
init {new} / init {new} --standalone / join {device/device.key} --dir {new}
request {new} --fleet acme --id pi-09 --out {out.json}
model check {bundle} / model check {bundle} --publisher {publisher.key.pub} / model keygen {new.key}
model config {bundle}
model sign {bundle} --sign-with {publisher.key} / model pack {bundle/manifest.json}
model evaluate {bundle} {rows.csv} --no-latency --html {out.html} --card {out.md}
model run {bundle} {rows.csv} -o {out.csv} / model reference {rows.csv} --bundle {bundle} -o {out.json}
fleet repository sign-root {labels.csv} --sign-with {publisher.key} / fleet init {new} --broker mqtt://127.0.0.1:1
fleet evidence verify {fleet} --operator {publisher.key.pub} / fleet simulate --rollout {rows.csv} --dir {new}
"""


def _split(text: str, before: str = "", after: str = "") -> list[str]:
    return [before + command.strip() + after for line in text.strip().split("\n") for command in line.split(" / ")]


COMMANDS = (
    *_split(_ON_DEVICE, after=" -c {device/outstation.toml}"),
    *_split(_ON_FLEET, "fleet ", " --dir {fleet}"),
    *_split(_ON_FILES),
)
_WRITERS = (
    *(
        "ingest",
        "label",
        "check",
        "reference relearn",
        "fleet repository",
        "fleet rollout start",
        "fleet devices token",
    ),
    *("fleet enrol", "fleet devices revoke", "fleet labels add", "fleet log disclosed", "fleet publish", "fleet keys"),
    "fleet devices watch",
)
# For damaged tables: all commands that read one, and those that open the store to write.
READERS = tuple(c for c in COMMANDS if ("{device/" in c or "{fleet}" in c) and not c.startswith(_WRITERS))
CELLS = (
    *(None, -1, 0, 2**62, 1e300, float("inf"), "", "x", "{}", "[]", "[1]", "null", "[[]]", '{"a":1}', "1" * 400),
    *("\x00", "a/b/c", b"", b"\xff\xfe", b"{" * 70, "2026-99-99T99:99:99Z"),
)


class Hang(BaseException):
    """The command did not end in time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`problem` is empty if the run passed."""

    code: int
    errors: str
    problem: str
    output: str = ""


def run_command(words: list[str], stdin: bytes = b"") -> Outcome:
    """Run a command in this process, as `outstation` does."""
    written, logged = io.BytesIO(), io.BytesIO()
    out = io.TextIOWrapper(written, encoding="utf-8", errors="surrogateescape")
    err = io.TextIOWrapper(logged, encoding="utf-8", errors="backslashreplace")

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang("".join(traceback.format_stack(frame)[-4:]))

    before = signal.signal(signal.SIGALRM, stop)
    logging.getLogger().handlers.clear()
    # Again and again: what tidies up may hang, too.
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S, 5)
    code, problem = 0, ""
    argv, sys.argv = sys.argv, ["outstation", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except Hang as hang:
        problem = f"hangs:\n{hang}"
    except BaseException:
        problem = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.argv = argv
    err.flush()
    out.flush()
    errors = logged.getvalue().decode("utf-8", "replace")
    own = [line for line in errors.splitlines() if line.startswith("outstation: ")]
    if not problem:
        if code not in (0, 1, 2):
            problem = f"exit code {code}"
        elif "Traceback" in errors or "internal error" in errors:
            problem = "traceback"
        elif len(own) > 1 or (code and not errors.strip() and not written.getvalue()):
            problem = f"{len(own)} lines of error"
    return Outcome(code, errors, problem, written.getvalue().decode("utf-8", "replace"))


# --- wrong files ---


def _junk(path: Path, random: Random) -> Path:
    path.write_bytes(random.randbytes(3000))
    return path


def _fifo(path: Path, random: Random) -> Path:
    os.mkfifo(path)
    return path


def _folder(path: Path, random: Random) -> Path:
    path.mkdir()
    return path


def _empty(path: Path, random: Random) -> Path:
    path.write_bytes(b"")
    return path


def _dangling(path: Path, random: Random) -> Path:
    path.symlink_to(path.with_name("nothing here"))
    return path


def _loop(path: Path, random: Random) -> Path:
    path.symlink_to(path.name)
    return path


def _huge(path: Path, random: Random) -> Path:
    with path.open("wb") as file:
        file.truncate(1 << 33)
    return path


def _socket(path: Path, random: Random) -> Path:
    if len(os.fsencode(path)) < 100:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    return path


def _non_utf8(path: Path, random: Random) -> Path:
    named = path.with_name(os.fsdecode(b"n\xff\xfe") + path.suffix)
    return _junk(named, random)


Kind = Callable[[Path, Random], Path]
KINDS: dict[str, Kind] = {
    "missing": lambda path, _: path,
    "a folder": _folder,
    "a pipe": _fifo,
    "/dev/null": lambda path, _: Path("/dev/null"),
    "/dev/zero": lambda path, _: Path("/dev/zero"),
    "/proc/self/mem": lambda path, _: Path("/proc/self/mem"),
    "/proc": lambda path, _: Path("/proc/1/nothing"),
    "a dangling link": _dangling,
    "a loop of links": _loop,
    "a long name": lambda path, _: path.with_name("n" * (_NAME_MAX - len(path.suffix)) + path.suffix),
    "a longer name": lambda path, _: path.with_name("n" * _NAME_MAX + path.suffix),
    "no UTF-8": _non_utf8,
    "a surrogate": lambda path, _: path.with_name("\ud800"),
    "below a file": lambda path, _: _junk(path, Random(1)) / "x",
    "empty": _empty,
    "junk": _junk,
    "huge": _huge,
    "a socket": _socket,
}
_REPLACED = ("a folder", "a pipe", "a dangling link", "a loop of links", "empty", "junk", "huge", "missing")


def damaged(name: str) -> Kind:
    """Return a kind that writes the site's own file, cut off or changed."""

    def write(path: Path, random: Random) -> Path:
        source = path.parents[2] / "site" / name
        if source.is_file():
            data = source.read_bytes()
            path.write_bytes(data[: len(data) // 2] if random.random() < 0.5 else mutated([data], random, 1 << 20))
        return path

    return write


@dataclass(frozen=True, slots=True)
class Case:
    """`prepare` spoils a copy of the site and returns the words of the command."""

    title: str
    prepare: Callable[[Path, Random], list[str]]


def _fill(text: str, folder: Path, replaced: dict[str, Path] | None = None) -> list[str]:
    words = []
    for word in text.split(" "):
        name = word.strip("{}") if word.startswith("{") else None
        words.append(word if name is None else str((replaced or {}).get(name, folder / name)))
    return words


def _replace_argument(text: str, name: str, kind: Kind, folder: Path, random: Random) -> list[str]:
    spot = folder / "spot"
    spot.mkdir()
    return _fill(text, folder, {name: kind(spot / Path(name).name, random)})


def _replace_word(text: str, at: int, wrong: str, folder: Path, random: Random) -> list[str]:
    filled = _fill(text, folder)
    filled[at] = wrong
    return filled


def _replace_file(text: str, name: str, title: str, folder: Path, random: Random) -> list[str]:
    (folder / name).unlink()
    KINDS[title](folder / name, random)
    return _fill(text, folder)


def _replace_cell(
    text: str, name: str, table: str, column: str, value: object, folder: Path, random: Random
) -> list[str]:
    spoil_cell(folder / name, table, column, value)
    return _fill(text, folder)


def argument_cases() -> Iterator[Case]:
    """Yield every kind of wrong file for every argument of every command, and wrong words for the others."""
    for text in COMMANDS:
        words = text.split(" ")
        for name in sorted({word.strip("{}") for word in words if word.startswith("{")}):
            for title, kind in [*KINDS.items(), *((f"damaged {i}", damaged(name)) for i in range(4))]:
                yield Case(f"{text}: {name} is {title}", partial(_replace_argument, text, name, kind))
        for at, word in enumerate(words[1:], 1):
            if not word.startswith(("-", "{")):
                for wrong in (
                    "\ud800",
                    os.fsdecode(b"\xff"),
                    "x" * 5000,
                    "",
                    "../..",
                    "\x1b[2J",
                    "-",
                    "9" * 400,
                    "\u202e",
                ):
                    yield Case(f"{text}: word {at} is {wrong[:20]!r}", partial(_replace_word, text, at, wrong))


def file_cases(site_folder: Path) -> Iterator[Case]:
    """Yield every kind of wrong file in place of every file of the site, with each command that may read it."""
    for path in sorted(p for p in site_folder.rglob("*") if p.is_file() or p.is_socket()):
        name = str(path.relative_to(site_folder))
        part = name.partition("/")[0]
        commands = [text for text in COMMANDS if f"{{{part}" in text]
        for text in commands:
            for title in _REPLACED:
                yield Case(f"{text}: file {name} is {title}", partial(_replace_file, text, name, title))


def cell_cases(site_folder: Path) -> Iterator[Case]:
    """Yield junk in every column of every table of both databases, with each command that reads it."""
    for name, prefix in (("device/data/outstation.db", "{device"), ("fleet/fleet.db", "{fleet")):
        commands = [text for text in READERS if prefix in text]
        with contextlib.closing(sqlite3.connect(f"file:{site_folder / name}?mode=ro&immutable=1", uri=True)) as db:
            tables = [str(row[0]) for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            columns = [(table, str(row[1])) for table in tables for row in db.execute(f"PRAGMA table_info({table})")]
        for table, column in columns:
            for value in CELLS:
                for text in commands:
                    title = f"{text}: {table}.{column} is {value!r:.30}"
                    yield Case(title, partial(_replace_cell, text, name, table, column, value))


def spoil_cell(database: Path, table: str, column: str, value: object) -> None:
    """Write a value into one row of a table, whatever type and key the column has; bytes become text."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        wanted = "CAST(? AS TEXT)" if isinstance(value, bytes) else "?"
        with contextlib.suppress(sqlite3.IntegrityError, sqlite3.OperationalError):
            condition = f'"{column}" IS (SELECT "{column}" FROM {table} LIMIT 1)'
            db.execute(f'UPDATE OR IGNORE {table} SET "{column}" = {wanted} WHERE {condition}', (value,))


def cases_of(part: str, site_folder: Path) -> Iterator[Case]:
    """Yield all cases of one of PARTS."""
    if part == "arguments":
        return argument_cases()
    return file_cases(site_folder) if part == "files" else cell_cases(site_folder)


def run_cases(cases: list[Case], site_folder: Path, random: Random) -> Iterator[tuple[Case, Outcome]]:
    """Run each case on a copy of the site of its own."""
    with tempfile.TemporaryDirectory(prefix="m") as scratch:
        (Path(scratch) / "site").symlink_to(site_folder)
        folder = Path(scratch) / "c"
        for case in cases:
            shutil.copytree(site_folder, folder, symlinks=True)
            here = Path.cwd()
            os.chdir(folder)
            try:
                try:
                    words = case.prepare(folder, random)
                    outcome = run_command(words)
                except (OSError, ValueError) as error:
                    outcome = (
                        Outcome(0, "", f"the case itself fails: {error}")
                        if "surrogate" not in str(error)
                        else Outcome(0, "", "")
                    )
                yield case, outcome
            finally:
                os.chdir(here)
                shutil.rmtree(folder, ignore_errors=True)


@click.command()
@click.option("--inputs", default=500, show_default=True, help="Number of inputs, drawn from all of them.")
@click.option("--seed", default=1, show_default=True)
@click.option("--only", default="", help="Only inputs whose title contains this text.")
@click.option("--part", type=click.Choice(PARTS), help="Only this kind of inputs.")
@click.option("-v", "verbose", is_flag=True, help="Print every outcome.")
def main(inputs: int, seed: int, only: str, part: str | None, verbose: bool) -> None:
    """Run malformed inputs; exit code 1 if one of them was not answered in one line."""
    random = Random(seed)
    with tempfile.TemporaryDirectory(prefix="s") as made:
        with contextlib.redirect_stdout(io.StringIO()):
            folder = site.build(Path(made) / "site")
        chosen: list[Case] = []
        wanted = (part,) if part else PARTS
        for name in wanted:
            cases = [case for case in cases_of(name, folder) if only in case.title]
            chosen += random.sample(cases, min(len(cases), -(-inputs // len(wanted))))
        failed, codes = 0, [0, 0, 0]
        for case, outcome in run_cases(chosen, folder, random):
            codes[outcome.code if outcome.code in (0, 1, 2) else 1] += 1
            if outcome.problem or verbose:
                failed += bool(outcome.problem)
                click.echo(f"--- {case.title!r}: {outcome.code} {outcome.problem}\n{outcome.errors[-600:]}")
    click.echo(f"{len(chosen)} inputs: {codes[0]} ended with 0, {codes[1]} with 1, {codes[2]} with 2; {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
