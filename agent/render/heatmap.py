"""Counts of pairs as a grid: a row for what was true, a column for what was said."""

from __future__ import annotations

from collections.abc import Sequence

from agent.render.svg import Drawing, text_width, truncate_text
from agent.render.theme import PAGE_THEME, Theme

WIDTH = 380.0
_MAX_LABEL_WIDTH = 96.0


def render_heatmap(labels: Sequence[str], counts: Sequence[Sequence[int]], *, theme: Theme = PAGE_THEME) -> str:
    """An inline SVG, each cell as dark as its share of the row; mistakes in another colour."""
    draw = Drawing(WIDTH, "Confusion: a row for what was true, a column for what was said")
    n = len(labels)
    left = min(_MAX_LABEL_WIDTH, 1.25 * max(text_width(label, 12) for label in labels) + 12)
    cell = min(90.0, (WIDTH - left) / n)
    high = min(34.0, cell) if n <= 12 else cell
    steep = n > 8 or max(text_width(label, 11) for label in labels) > cell - 4
    top = 24.0 if not steep else min(_MAX_LABEL_WIDTH, max(text_width(label, 11) for label in labels)) * 0.72 + 16
    for j, label in enumerate(labels):
        x = left + cell * (j + 0.5)
        if steep:
            draw.rotated_text(x + 4, top - 8, truncate_text(label, 11, _MAX_LABEL_WIDTH), theme.muted, size=11)
        else:
            draw.text(x, top - 9, label, theme.muted, size=11, anchor="middle", css_class="said")
    for i, (label, row) in enumerate(zip(labels, counts, strict=True)):
        y, total = top + high * i, max(1, sum(row))
        draw.text(left - 8, y + high / 2 + 4, truncate_text(label, 12, left - 10), theme.ink, size=12, anchor="end")
        for j, count in enumerate(row):
            share = count / total
            color = theme.series[0] if i == j else theme.fault
            box = (left + cell * j + 1, y + 1, cell - 2, high - 2)
            draw.rect(*box, theme.panel, r=3)
            if count:
                draw.rect(*box, color, r=3, fill_opacity=f"{0.12 + 0.68 * share:.2f}", css_class="cell")
            if count and n <= 14:
                ink = theme.paper if share > 0.55 else theme.ink
                draw.text(left + cell * (j + 0.5), y + high / 2 + 4, f"{count}", ink, size=11.5, anchor="middle")
    return draw.to_inline_svg(top + high * n + 6)
