"""JSONPath: singular queries, which select at most one value of a JSON document.

`$` selects the document, `$.data.temp` a nested member, `$.values[0]` an element, and `$['outside temperature']` a
member with any name. `$.` may be omitted before a name.

Source: RFC 9535, sections 2.3.1, 2.3.3 and 2.3.5.1.
"""

from __future__ import annotations

import re
from typing import Any

JsonPath = tuple[str | int, ...]

_NAME = r"[^\W\d][\w-]*"
_SEGMENT = re.compile(
    rf"\.({_NAME})|\[(0|-?[1-9]\d{{0,8}})\]|\['((?:[^'\\]|\\['\\])*)'\]|\[\"((?:[^\"\\]|\\[\"\\])*)\"\]"
)
MISSING = object()


def parse(text: str) -> JsonPath:
    """Parse a path. Raises ValueError."""
    rest = text[1:] if text.startswith("$") else text if text.startswith("[") else f".{text}"
    path: list[str | int] = []
    at = 0
    while at < len(rest):
        step = _SEGMENT.match(rest, at)
        if step is None:
            raise ValueError(f"{text!r} is not a path to a value; write $.data.temp, $.values[0] or $['any name']")
        name, index, *quoted = step.groups()
        member = next((name for name in quoted if name is not None), None)
        path.append(int(index) if index else name or re.sub(r"\\(.)", r"\1", member or ""))
        at = step.end()
    return tuple(path)


def find(document: Any, path: JsonPath) -> Any:
    """Return the value at `path`, or MISSING."""
    for step in path:
        if isinstance(step, str):
            document = document.get(step, MISSING) if isinstance(document, dict) else MISSING
        elif isinstance(document, list) and -len(document) <= step < len(document):
            document = document[step]
        else:
            return MISSING
    return document
