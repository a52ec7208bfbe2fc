"""Templates of pages: each value is escaped, and its control and bidi characters become visible.

Jinja escapes what is markup; `show` runs before it and escapes what could reorder or hide text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from outstation.foundation.text import printable_lines

Environment = jinja2.Environment


def create_environment(folder: Path, max_text: int | None = None) -> Environment:
    """Return an environment for the templates in a folder, which cuts values after `max_text` characters."""

    def show(value: Any) -> Any:
        if value is None or isinstance(value, Markup):
            return "" if value is None else value
        text = printable_lines(str(value))
        return text if max_text is None or len(text) <= max_text else text[:max_text] + "…"

    return Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, finalize=show,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
