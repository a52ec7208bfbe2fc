"""Pages of the fleet database and of exports: they have the columns of the code."""

from __future__ import annotations

from scripts.tables_documents import render_pages


def test_the_pages_have_the_columns_of_the_code() -> None:
    for file, page in render_pages().items():
        assert file.read_text(encoding="utf-8") == page, "run python -m scripts.tables_documents"
        assert page.count("| `device` | ") > 6
