"""SVG drawing: elements, text measurement and escaping."""

from __future__ import annotations

import html
from collections.abc import Sequence

from outstation.foundation.text import count_columns, printable, printable_lines

FONT = "'Inter', 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
Point = tuple[float, float]
_GLYPH_WIDTH = 0.505  # average, relative to the font size; East Asian wide characters take two


def text_width(text: str, size: float) -> float:
    """Return the approximate width in pixels."""
    return count_columns(text) * size * _GLYPH_WIDTH


def truncate_text(text: str, size: float, width: float) -> str:
    max_columns = max(1, int(width / (size * _GLYPH_WIDTH)))
    if count_columns(text) <= max_columns:
        return text
    cut = text[: max_columns - 1]
    while count_columns(cut) > max_columns - 1:
        cut = cut[:-1]
    return cut.rstrip() + "…"


def wrap_text(text: str, size: float, width: float) -> list[str]:
    """Return at most two lines. The second one ends in an ellipsis if text is left."""
    max_columns, lines, words = max(1, int(width / (size * _GLYPH_WIDTH))), [""], text.split(" ")
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".lstrip()
        if count_columns(longer) <= max_columns:
            lines[-1] = longer
        elif len(lines) == 2:
            rest = " ".join([lines[-1], *words[i:]])
            return [*lines[:-1], truncate_text(rest.lstrip(), size, width)]
        else:
            lines.append(truncate_text(word, size, width))
    return lines


class Drawing:
    """Drawing of a given width. Later elements cover earlier ones; coordinates are pixels."""

    def __init__(self, width: float, title: str) -> None:
        self.width, self._title = width, title
        self._elements: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, fill: str, *, r: float = 0, **attributes: str) -> None:
        corner = f' rx="{r:g}"' if r else ""
        geometry = f'x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{max(h, 0):.1f}"{corner}'
        self._add("rect", geometry, fill=fill, **attributes)

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, **attributes: str) -> None:
        geometry = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self._add("line", geometry, stroke=stroke, **attributes)

    def path(
        self, points: Sequence[Point], stroke: str, *, fill: str = "none", closed: bool = False, **attributes: str
    ) -> None:
        if points:
            d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if closed else "")
            self._add("path", f'd="{d}"', fill=fill, stroke=stroke, stroke_linejoin="round", **attributes)

    def circle(self, x: float, y: float, r: float, fill: str, **attributes: str) -> None:
        self._add("circle", f'cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"', fill=fill, **attributes)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        fill: str,
        *,
        size: float = 12,
        anchor: str = "start",
        weight: int = 400,
        css_class: str = "",
    ) -> None:
        bold = f' font-weight="{weight}"' if weight != 400 else ""
        end = f' text-anchor="{anchor}"' if anchor != "start" else ""
        kind = f' class="{css_class}"' if css_class else ""
        place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"'
        self._elements.append(f"<text{kind} {place}{end}{bold}>{html_text(printable(text))}</text>")

    def rotated_text(self, x: float, y: float, text: str, fill: str, *, size: float) -> None:
        """Draw text rising to the right from (x, y), for heads of narrow columns."""
        place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}" transform="rotate(-45 {x:.1f} {y:.1f})"'
        self._elements.append(f"<text {place}>{html_text(printable(text))}</text>")

    def to_inline_svg(self, height: float) -> str:
        """Return an SVG element for an HTML page, as wide as its container, with the page's colours."""
        head = f'<svg viewBox="0 0 {self.width:g} {height:g}" role="img">'
        return "".join([head, f"<title>{html_text(printable(self._title))}</title>", *self._elements, "</svg>"])

    def to_svg_document(self, height: float, background: str, style: str = "") -> str:
        """Return an SVG file. `style` is CSS for a drawing whose colours are variables."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{height:g}" '
            f'viewBox="0 0 {self.width:g} {height:g}" role="img" font-family="{FONT}">'
        )
        title = f"<title>{html_text(printable(self._title))}</title>"
        paper = f'<rect width="100%" height="100%" fill="{background}"/>'
        colors = [f"<style>{style}</style>"] if style else []
        return "\n".join([head, title, *colors, paper, *self._elements, "</svg>"]) + "\n"

    def _add(self, tag: str, geometry: str, *, css_class: str = "", **attributes: str) -> None:
        kind = f' class="{css_class}"' if css_class else ""
        rest = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
        self._elements.append(f"<{tag}{kind} {geometry}{rest}/>")


def html_text(text: str) -> str:
    """Return text for an element or attribute, with its lines; control and bidi characters are escaped."""
    return html.escape(printable_lines(text))
