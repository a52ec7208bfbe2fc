"""Journal of the daemon's unit for the support archive: the program's own words, and nothing that they spoke of.

A line is compared with the texts in the program's source. A line that matches is shown with `…` in place of every
value, so that no reading, label, name or address of a line gets out; a line that matches no text is only counted.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

_UNIT = "outstation"
_PACKAGE = Path(__file__).parents[3]
_COMMAND = ("journalctl", "--unit", _UNIT, "--output", "json", "--no-pager", "--quiet", "--lines", "5000")
_TIMEOUT_S = 30.0
_MAX_BYTES = 32 << 20
_MAX_LINE_CHARS = 4000
# Fewer letters in a text say nothing, and match too much.
_MIN_LETTERS = 12
_PLACEHOLDER = re.compile(r"%(?:\(\w+\))?[-+ #0]*\d*(?:\.\d+)?[sdrfgxi]|…")
_HEAD = re.compile(r"^(?:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} )?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) )?")


class Entry(msgspec.Struct, frozen=True):
    """`lines` equal texts between two times, µs since 1970."""

    text: str
    priority: str
    lines: int
    first_us: int
    last_us: int


def read() -> dict[str, Any]:
    """Return the journal without values, or why it is left out."""
    try:
        done = subprocess.run(_COMMAND, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return {"left_out": "this machine has no journalctl"}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"left_out": f"journalctl does not answer: {type(error).__name__}"}
    if done.returncode or not done.stdout:
        return {"left_out": f"this user may not read the journal of {_UNIT}, or it is empty; run it with sudo"}
    return {
        "unit": _UNIT,
        "entries": msgspec.to_builtins(summarize(done.stdout[-_MAX_BYTES:].splitlines(), load_texts(_PACKAGE))),
    }


def summarize(lines: Iterable[bytes], texts: Sequence[tuple[str, ...]]) -> list[Entry]:
    """Return the entries of `journalctl --output json`, consecutive equal texts as one."""
    entries: list[Entry] = []
    for line in lines:
        try:
            fields = json.loads(line)
            time_us, message = int(fields["__REALTIME_TIMESTAMP"]), str(fields["MESSAGE"])
        except (ValueError, KeyError, TypeError):
            continue
        # systemd's own lines tell of starts, ends, signals and the watchdog.
        text = message if fields.get("_PID") == "1" else withhold_values(message, texts)
        priority = str(fields.get("PRIORITY", ""))[:1]
        if entries and (entries[-1].text, entries[-1].priority) == (text, priority):
            previous = entries[-1]
            entries[-1] = msgspec.structs.replace(previous, lines=previous.lines + 1, last_us=time_us)
        else:
            entries.append(Entry(text, priority, 1, time_us, time_us))
    return entries


def withhold_values(message: str, texts: Sequence[tuple[str, ...]], depth: int = 4) -> str:
    """Return the text of the program that says most of `message`, or `…`; a value may hold a text in turn."""
    line = _HEAD.sub("", message[:_MAX_LINE_CHARS]).removeprefix("outstation: ")
    best, values = max(
        ((parts, values) for parts in texts if (values := _match(line, parts)) is not None),
        key=lambda match: sum(map(len, match[0])),
        default=((), []),
    )
    if not best:
        # The subject of a line comes first: a file, a device, a key.
        _, colon, rest = line.partition(": ")
        return f"…: {withhold_values(rest, texts, depth - 1)}" if colon and depth else "…"
    shown = [
        withhold_values(value, texts, depth - 1) if depth and len(value) > _MIN_LETTERS else "…" for value in values
    ]
    return "".join(part + value for part, value in zip(best, [*shown, ""], strict=True))


def load_texts(folder: Path) -> list[tuple[str, ...]]:
    """Return every text of the Python source in `folder` as the parts between its values."""
    texts = set[tuple[str, ...]]()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            texts.update(_iter_texts(node))
    return [parts for parts in texts if sum(c.isalpha() for part in parts for c in part) >= _MIN_LETTERS]


def _iter_texts(node: ast.AST) -> Iterator[tuple[str, ...]]:
    if isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        yield tuple(text.split("…"))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
        yield tuple(_PLACEHOLDER.split(node.value))


def _match(line: str, parts: tuple[str, ...]) -> list[str] | None:
    """Return what stands between the parts if they make up the line, else None."""
    if not line.startswith(parts[0]) or (len(parts) == 1 and line != parts[0]):
        return None
    values, at = [], len(parts[0])
    for part in parts[1:-1]:
        place = line.find(part, at) if part else at
        if place < 0:
            return None
        values.append(line[at:place])
        at = place + len(part)
    if len(parts) > 1:
        end = len(line) - len(parts[-1])
        if end < at or not line.endswith(parts[-1]):
            return None
        values.append(line[at:end])
    return values
