"""What devices and strangers wrote, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line, with everything that could steer a terminal escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
