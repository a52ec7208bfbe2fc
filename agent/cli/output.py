"""Output of commands: one JSON document, or text for people.

A file or pipe gets it without click, whose import takes some 10 ms.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.errors import UsageError
from agent.text import printable, printable_json, printable_lines

_MAX_SHOWN = 20


def echo(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Print text, whoever wrote it: control and bidi characters are escaped."""
    _write(printable_lines(text), nl=nl, err=err)


def echo_styled(text: str) -> None:
    """Print text with colours, of which the caller has made the foreign parts `printable`."""
    import click

    click.echo(text)


def _write(text: str, *, nl: bool = True, err: bool = False) -> None:
    stream = sys.stderr if err else sys.stdout
    # Click shows terminals, and replaces what another encoding lacks.
    if stream.encoding == "utf-8" and not stream.isatty():
        stream.write(f"{text}\n" if nl else text)
        stream.flush()
    else:
        import click

        click.echo(text, nl=nl, err=err)


def emit(document: object, as_json: bool, print_human: Callable[[], None]) -> None:
    """Print the document as JSON, or call `print_human`."""
    if as_json:
        _write(printable_json(_encode(document)))
    else:
        print_human()


def _encode(document: object) -> str:
    try:
        return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    except UnicodeEncodeError:
        # Text that was damaged on the disk: its bytes become escapes.
        return json.dumps(msgspec.to_builtins(document), indent=2)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> None:
    """Print aligned columns with numbers to the right, or `empty` without rows."""
    if not rows:
        echo(empty)
        return
    head, cells = list(map(printable, columns)), [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(columns))]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    for number, line in enumerate([head, *cells]):
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        text = "  ".join(parts).rstrip()
        _write(f"\033[1m{text}\033[0m" if number == 0 and sys.stdout.isatty() else text)


# Part of a reason → what to do about such lines.
_REMEDIES = {
    "is missing": "`optional = true` for this field in the config allows missing values",
    "runs backwards": "sort the file by t, or give its parts in order of time",
    "is no number": "write numbers as 1.5, and times as 2026-11-27T10:00:00Z or seconds since 1970",
    "is too large for": 'type = "f64" for this field in the config holds larger numbers',
    "the header names": "give every line as many values as the first one, and quote texts that hold the separator",
    "not one JSON object": 'write one object a line, with quoted names: {"ax": 1.5, "ay": 0.2}',
    "is above max": "max and min are in the config; correct them, or the sensor",
    "is below min": "max and min are in the config; correct them, or the sensor",
    "does not exist yet": "label rows that are stored: `outstation results` shows them",
}


def print_rejected(accepted: int, rejected: Mapping[int, str], noun: str) -> None:
    """Print how many lines of a file were accepted, why the first others were not, and what to do."""
    echo(f"{accepted} {noun} accepted, {len(rejected)} rejected")
    for line, reason in sorted(rejected.items())[:_MAX_SHOWN]:
        echo(f"  line {line}: {reason}")
    if len(rejected) > _MAX_SHOWN:
        echo(f"  … and {len(rejected) - _MAX_SHOWN} more; --json lists them all")
    for part in dict.fromkeys(part for reason in rejected.values() for part in _REMEDIES if part in reason):
        echo(f"What to do: {_REMEDIES[part]}")


def require_plot_format(file: Path | None) -> None:
    """Check that the plot file ends in .svg or .png. Raises UsageError."""
    if file is not None and file.suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {file}: name a file that ends in .svg or .png")


NOT_CLEAN = "the labelled data are not known to be clean (--require-clean)"
