"""Output of commands: one JSON document, or text for people.

A file or pipe gets it without click, whose import takes some 10 ms.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from outstation.foundation.errors import UsageError, explain
from outstation.foundation.text import count_columns, pad, pluralize, printable, printable_json, printable_lines

_MAX_SHOWN = 20
_MIN_WIDTH, _MIN_SENTENCE = 40, 32
# Chinese, Japanese and Korean lines may end after each character, but none begins with a closing mark.
_CJK = r"\u2e80-\u2fff\u3003-\u9fff\uac00-\ud7a3\uf900-\ufaff"
_CLOSING = r"\u3001\u3002\u3009\u300b\u300d\u300f\u3011\u30fc\uff01\uff09\uff0c\uff1a\uff1b\uff1f"
_WORD = rf" *(?:[{_CJK}][{_CLOSING}]*|[^ {_CJK}]+)"
_STYLE = r"\033\[[;?0-9]*[a-zA-Z]"


def echo(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Print text of any author: control and bidi characters are escaped."""
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


def echo_wrapped(text: str, indent: int = 0, *, in_terminal_only: bool = False) -> None:
    """Print styled text in lines of the terminal's width, 80 columns without one; further lines are indented."""
    width = len(text) if in_terminal_only and not _has_width() else _terminal_width()
    for paragraph in text.split("\n"):
        for line in _wrap(paragraph, width, indent):
            echo_styled(line)


def _has_width() -> bool:
    return sys.stdout.isatty() or "COLUMNS" in os.environ


def _terminal_width() -> int:
    # Imported here: commands without tables do not need it.
    import shutil

    return max(_MIN_WIDTH, shutil.get_terminal_size().columns)


def _wrap(text: str, width: int, indent: int) -> Iterator[str]:
    """Yield lines of at most `width` columns, but for longer words."""
    line = ""
    # Spaces at the end, which are in no word, would be tried from each of them.
    for word in re.findall(_WORD, text.rstrip(" ")):
        if line and count_columns(re.sub(_STYLE, "", line + word)) > width:
            yield line
            line = " " * indent + word.lstrip(" ")
        else:
            line += word
    yield line


def emit(document: object, as_json: bool, print_human: Callable[[], None], *, passed: bool = True) -> None:
    """Print the document as JSON, or call `print_human`; unless `passed`, the command then ends with exit code 1."""
    if as_json:
        _write(printable_json(_encode(document)))
    else:
        print_human()
    if not passed:
        sys.exit(1)


def _encode(document: object) -> str:
    try:
        return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    except UnicodeEncodeError:
        # Text that was damaged on the disk: its bytes become escapes.
        return json.dumps(msgspec.to_builtins(document), indent=2)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> None:
    """Print aligned columns with numbers to the right, or `empty` without rows.

    Where a terminal is narrower, the last column is wrapped, if need be on lines of its own.
    """
    if not rows:
        echo(empty)
        return
    head, cells = list(map(printable, columns)), [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(count_columns(line[i]) for line in [head, *cells]) for i in range(len(columns))]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    width = _terminal_width() if _has_width() else sum(widths) + 2 * len(widths)
    place = sum(widths[:-1]) + 2 * len(widths[:-1])
    has_own_lines = place + min(widths[-1], _MIN_SENTENCE) > width
    for number, line in enumerate([head, *cells]):
        parts = [pad(c, w, right=r) for c, w, r in zip(line, widths, right, strict=True)]
        if has_own_lines and not right[-1]:
            lines = ["  ".join(parts[:-1]).rstrip(), *_wrap(f"    {line[-1]}", width, 4)]
        else:
            lines = [*_wrap("  ".join(parts).rstrip(), width, place)]
        for text in lines:
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
    """Print how many lines of a file were accepted, why the first others were not, and what to do.

    `noun` is one of them.
    """
    echo(f"{pluralize(accepted, noun)} accepted, {len(rejected)} rejected")
    for line, reason in sorted(rejected.items())[:_MAX_SHOWN]:
        echo(f"  line {line}: {reason}")
    if len(rejected) > _MAX_SHOWN:
        echo(f"  … and {len(rejected) - _MAX_SHOWN} more; --json lists them all")
    for remedy in dict.fromkeys(text for r in rejected.values() for part, text in _REMEDIES.items() if part in r):
        echo(f"What to do: {remedy}")


def require_writable(file: Path, inputs: Iterable[Path] = ()) -> None:
    """Check before long work that a file can be written and is none of `inputs`, and make its folder.

    Raises UsageError.
    """
    if file.exists() and any(path.exists() and file.samefile(path) for path in inputs):
        raise UsageError(f"{file}: is read by this command, which would overwrite it; name another file")
    # Imported here: commands that write no file do not need it.
    import tempfile

    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {explain(error)}") from None


def write_output(file: Path, data: bytes) -> Path:
    """Write a file, whose folder is made, and return it. Raises UsageError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {explain(error)}") from None
    return file


def require_plot_format(file: Path | None) -> None:
    """Check that the plot file ends in .svg or .png. Raises UsageError."""
    if file is not None and file.suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {file}: name a file that ends in .svg or .png")


NOT_CLEAN = "the labelled data are not known to be clean (--require-clean)"
