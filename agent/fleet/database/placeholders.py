"""SQLite's placeholders as psycopg's."""

from __future__ import annotations

import re
from functools import lru_cache

# Quoted text and names stay as they are, but for the percent signs that psycopg looks for in them, too.
_PARTS = re.compile(r"('(?:[^']|'')*'|\"[^\"]*\"|::)|\?|(?<![\w:]):([a-z_]+)|%")


# Statements are constants, a few with a table's name in them.
@lru_cache(maxsize=1000)
def to_psycopg(sql: str) -> str:
    """`?` as `%s`, `:name` as `%(name)s`."""
    return _PARTS.sub(_replace_placeholder, sql)


def _replace_placeholder(match: re.Match[str]) -> str:
    quoted, name = match.groups()
    if quoted:
        return str(quoted).replace("%", "%%")
    if name:
        return f"%({name})s"
    return "%s" if match.group() == "?" else "%%"
