"""Places in a JSON document: singular queries of JSONPath, which name at most one value.

`$` is the whole, `$.data.temp` a member of a member, `$.values[0]` an element, `$['outside temperature']` a member with
any name. `$.` may be left out before a name.

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
    """Raises ValueError."""
    rest = text[1:] if text.startswith("$") else text if text.startswith("[") else f".{text}"
    path: list[str | int] = []
    at = 0
    while at < len(rest):
        step = _SEGMENT.match(rest, at)
        if step is None:
            raise ValueError(f"{text!r} is no path to a value; write it as $.data.temp, $.values[0] or $['any name']")
        name, index, *quoted = step.groups()
        given = next((one for one in quoted if one is not None), None)
        path.append(int(index) if index else name or re.sub(r"\\(.)", r"\1", given or ""))
        at = step.end()
    return tuple(path)


def find(document: Any, path: JsonPath) -> Any:
    """The value there; MISSING where there is none."""
    for step in path:
        if isinstance(step, str):
            document = document.get(step, MISSING) if isinstance(document, dict) else MISSING
        elif isinstance(document, list) and -len(document) <= step < len(document):
            document = document[step]
        else:
            return MISSING
    return document
