"""Scaffold of a SPEC, from any `.tflite` file and a table of its data, for the author to complete."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from agent.datasets import training_data
from agent.errors import BadBundle, UsageError
from agent.model.inference import inspect
from agent.model.sandbox import probe


class Scaffold(msgspec.Struct, frozen=True):
    """Text of a SPEC, the guessed kind of model, and the reason for it."""

    text: str
    kind: str
    rationale: str


def scaffold_spec(tflite: Path, out: Path | None, table: Path | None) -> Scaffold:
    """Return a SPEC whose paths are relative to the folder of `out`. Raises UsageError, BadBundle."""
    try:
        content = tflite.read_bytes()
    except OSError as error:
        raise UsageError(f"{tflite}: cannot be read: {error.strerror}; give the .tflite file") from None
    try:
        model = probe.inspect_model(content)
    except BadBundle as problem:
        raise BadBundle(f"{tflite}: {problem}") from None
    folder = out.resolve().parent if out else Path.cwd()
    table_info = None
    if table is not None:
        summary = training_data.summarize_table(table)
        table_info = inspect.TableInfo(_relative_path(table, folder), summary.columns, summary.rows, summary.labels)
    guess = inspect.guess_kind(model)
    text = inspect.render_spec(model, _relative_path(tflite, folder), tflite.stem, table_info)
    return Scaffold(text, guess.kind, guess.rationale)


def write_spec(scaffold: Scaffold, out: Path) -> None:
    """Write a new file. Raises UsageError, also if it exists, because it is somebody's work."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(scaffold.text)
    except FileExistsError:
        raise UsageError(f"{out}: exists already; name another file with -o") from None
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None


def _relative_path(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder)
