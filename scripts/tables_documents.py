"""Columns of the fleet database and of exports on their pages, made from the tables that the programs read.

python -m scripts.tables_documents      updates docs/reference/fleet-database.md and docs/guides/export.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from outstation.fleet.database.schema.message_tables import TABLES, Column, Table
from outstation.fleet.export.tables import KINDS, arrow_schema
from scripts.kit.usage import answer_help

DOCS = Path(__file__).parents[1] / "docs"
_MADE = "<!-- Made by `python -m scripts.tables_documents`: do not edit until the end. -->\n"
_END = "<!-- end -->\n"
_ARROW_NAMES = {
    "text": "string (dictionary)",
    "rfc3339": "timestamp[us, UTC]",
    "epoch_us": "timestamp[us, UTC]",
    "outputs": "map<string, double>",
    "names": "list<string>",
}


def render_pages() -> dict[Path, str]:
    """Return the text of each page by its file."""
    parts = {
        DOCS / "reference" / "fleet-database.md": (
            text for table in TABLES.values() for text in _describe_table(table)
        ),
        DOCS / "guides" / "export.md": (text for name in KINDS for text in _describe_kind(name)),
    }
    return {file: _replace_part(file.read_text(encoding="utf-8"), lines) for file, lines in parts.items()}


def _replace_part(page: str, lines: Iterable[str]) -> str:
    part = "\n".join([_MADE, *lines]) + _END
    return re.sub(f"{re.escape(_MADE)}.*?{re.escape(_END)}", lambda _: part, page, count=1, flags=re.DOTALL)


def _describe_table(table: Table) -> Iterator[str]:
    yield f"### `{table.name}`\n"
    yield f"{table.row[0].upper()}{table.row[1:]}.\n"
    yield from _list_columns((column, _name_sql_type(column)) for column in table.columns)


def _describe_kind(name: str) -> Iterator[str]:
    kind = KINDS[name]
    yield f"**`{name}`**, by `{kind.time}`\n"
    types = (_ARROW_NAMES.get(column.type, str(arrow_schema(name).field(column.name).type)) for column in kind.columns)
    yield from _list_columns(zip(kind.columns, types, strict=True))


def _list_columns(columns: Iterable[tuple[Column, str]]) -> Iterator[str]:
    yield "| column | type | unit | meaning |\n|---|---|---|---|"
    for column, kind in columns:
        yield f"| `{column.name}` | {kind} | {column.unit or '–'} | {column.meaning} |"
    yield ""


def _name_sql_type(column: Column) -> str:
    kind = column.sql.removeprefix(f'"{column.name}" ').split()[0].lower()
    return f"{kind} or NULL" if column.is_optional else kind


if __name__ == "__main__":
    answer_help(__doc__)
    for file, page in render_pages().items():
        file.write_text(page, encoding="utf-8")
