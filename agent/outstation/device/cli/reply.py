"""Replies of devices to remote commands, as text: a status document as `outstation status` shows it, others as lists.

A reply is signed by its device, which may still be of another version, or in wrong hands: nothing of it steers the
terminal, and one of another form is shown member by member.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

from outstation.foundation.cli.output import echo
from outstation.foundation.text import count_columns, pad

_MAX_DEPTH = 8


def print_reply(command: str, data: dict[str, Any]) -> None:
    """Print the data of a reply to `command`."""
    echo((_format_status(data) if command == "report" else None) or "\n".join(_format_members(data, 0)))


def _format_status(data: dict[str, Any]) -> str | None:
    """Return a status document as text without colours; None if it has another form."""
    from outstation.device.cli.status import print_document

    text = io.StringIO()
    with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        with contextlib.redirect_stdout(text):
            print_document(data)
        return text.getvalue().rstrip("\n")
    return None


def _format_members(members: dict[str, Any], depth: int) -> list[str]:
    """Return a line for each member, with names and values aligned, and tables and lists indented below theirs."""
    indent, lines = "  " * depth, []
    width = max((count_columns(name) for name, value in members.items() if not _is_nested(value)), default=0)
    for name, value in members.items():
        if not _is_nested(value) or depth >= _MAX_DEPTH:
            lines.append(f"{indent}{pad(name, width)}  {_format_value(value)}")
            continue
        lines.append(f"{indent}{name}")
        for item in [value] if isinstance(value, dict) else value:
            lines += (
                _format_members(item, depth + 1) if isinstance(item, dict) else [f"{indent}  {_format_value(item)}"]
            )
    return lines


def _is_nested(value: Any) -> bool:
    return bool(value) and (isinstance(value, dict) or (isinstance(value, list) and any(map(_is_container, value))))


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list)


def _format_value(value: Any) -> str:
    if value is None or value in ([], {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and not any(map(_is_container, value)):
        return ", ".join(map(_format_value, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
