"""Words: docstrings open with a noun or a verb, and names are made of the field's terms (docs/concepts/glossary.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Rooms that still hold names or docstrings of the kind below. This list only shrinks.
PENDING: set[str] = set()

_OPENINGS = re.compile(r"(Of|What|Whatever|Whether|With|By|How|Where|Who|Whose|Which|That|The same|As|So|Such|Some)\b")
# Parts of names that nobody searches for; "fleet-wide" is a term.
_PARTS = {
    "apart", "asked", "begun", "beside", "came", "deed", "found", "gone", "hear", "heard", "kept", "laid", "lay",
    "mend", "said", "say", "told", "thing", "things", "whatever", "whose", "wide",
}  # fmt: skip
_WHOLE = {"of", "one", "ones", "so", "some", "such", "what", "whom"}


def _names(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, int]]:
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


@cache
def _is_dialect(name: str) -> bool:
    plain = re.sub(r"fleet_?wide", "", name, flags=re.IGNORECASE)
    words = {word.lower() for part in plain.split("_") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", part)}
    return bool(words & _PARTS or plain.lower() in _WHOLE)


def problems(text: str) -> list[str]:
    """Return one line for each docstring and each name that breaks the rules."""
    nodes = list(ast.walk(ast.parse(text)))
    lines = [f"{line}: the name {name!r}" for name, line in _names(nodes) if _is_dialect(name)]
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            if _OPENINGS.match(docstring.lstrip()):
                lines.append(f"{getattr(node, 'lineno', 1)}: the docstring opens {docstring[:40]!r}")
    return lines


def _room(path: Path) -> str:
    return path.parent.relative_to(ROOT).as_posix()


ROOMS = sorted({_room(path) for top in ("agent", "scripts", "tests") for path in (ROOT / top).rglob("*.py")})


@pytest.mark.parametrize("room", ROOMS)
def test_names_and_docstrings_use_the_fields_terms(room: str) -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / room).glob("*.py"))
        for line in problems(path.read_text(encoding="utf-8"))
    ]
    if room in PENDING:
        assert lines, f"{room} is clean: take it from PENDING"
    else:
        assert lines == []


@pytest.mark.parametrize(
    "text",
    [
        '"""What a window says."""',
        'def f():\n    """Of two numbers the larger."""',
        "def told(x): ...",
        "found = 1",
        "for one in (): ...",
        "class Kept: ...",
        "def f(beside_it): ...",
    ],
)
def test_the_check_itself_sees_the_dialect(text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize(
    "text", ['"""Summary of a window."""', "def compute_psi(counts): ...", "fleet_wide_alerts = 1"]
)
def test_the_check_itself_lets_terms_pass(text: str) -> None:
    assert problems(text) == []
