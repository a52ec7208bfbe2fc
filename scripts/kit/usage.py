"""Usage of scripts without a parser of options: their docstring."""

from __future__ import annotations

import sys


def answer_help(usage: str | None) -> None:
    """Print the usage and exit if an argument asks for it."""
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        print((usage or "").strip())
        sys.exit()
