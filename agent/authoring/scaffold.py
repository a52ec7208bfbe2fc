"""From somebody's `.tflite`, and data beside it, to a SPEC to fill in."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from agent.datasets import training_data
from agent.errors import BadBundle, UsageError
from agent.model.inference import inspect
from agent.model.sandbox import probe


class Scaffold(msgspec.Struct, frozen=True):
    """The SPEC's text, the kind it guessed, and why."""

    text: str
    kind: str
    rationale: str


def scaffold_spec(tflite: Path, out: Path | None, table: Path | None) -> Scaffold:
    """`out` is where the SPEC will be, which its paths are relative to. Raises UsageError, BadBundle."""
    try:
        content = tflite.read_bytes()
    except OSError as error:
        raise UsageError(f"{tflite}: cannot be read: {error.strerror}; give the .tflite file") from None
    try:
        found = probe.inspect_model(content)
    except BadBundle as problem:
        raise BadBundle(f"{tflite}: {problem}") from None
    beside = out.resolve().parent if out else Path.cwd()
    seen = None
    if table is not None:
        head = training_data.summarize_table(table)
        seen = inspect.TableInfo(_relative_path(table, beside), head.columns, head.rows, head.labels)
    made = inspect.guess_kind(found)
    return Scaffold(
        inspect.render_spec(found, _relative_path(tflite, beside), tflite.stem, seen), made.kind, made.rationale
    )


def write_spec(scaffold: Scaffold, out: Path) -> None:
    """Raises UsageError; a file that is there is somebody's work."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(scaffold.text)
    except FileExistsError:
        raise UsageError(f"{out}: is there already; name another file with -o") from None
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None


def _relative_path(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder)
