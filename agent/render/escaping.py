"""Foreign text in HTML and SVG."""

from __future__ import annotations

import html

from agent.text import printable_lines


def html_text(text: str) -> str:
    """Return text for an element or attribute, with its lines; control and bidi characters are escaped."""
    return html.escape(printable_lines(text))
