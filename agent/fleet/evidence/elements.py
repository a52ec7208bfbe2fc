"""Parts that chapters of the page have in common."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from agent.evaluation import page
from agent.evaluation.page import Markup, element
from agent.fleet.evidence.contents import Decision
from agent.fleet.evidence.words import moment


def chapter(identity: str, title: str, lead: str, *content: Markup) -> Markup:
    """A section that the table of contents leads to."""
    inner = page.section(title, lead, *content).html
    return Markup(inner.replace("<section>", f'<section id="{escape(identity)}">', 1))


def badge(word: str, kind: str) -> Markup:
    return element("span", word, kind=f"state {kind}")


def link(path: str, name: str = "") -> Markup:
    return Markup(f'<a href="{escape(path)}">{escape(name or path)}</a>')


def more(left: int, path: str, what: str = "more") -> list[Markup]:
    """Where the rest is, where there is one."""
    return [element("p", f"{left:,} {what} in ", link(path), ".", kind="muted")] if left > 0 else []


def details(summary: str, *content: Markup) -> Markup:
    inside = "".join(one.html for one in content)
    return Markup(f"<details><summary>{escape(summary)}</summary>{inside}</details>")


def stacked(table: Markup, labels: str) -> Markup:
    """Cells stand one under another where the screen is narrow; the page's CSS has their `labels`."""
    return element("div", table, kind=f"stack {labels}")


def nowrap(text: str) -> Markup:
    return Markup(f'<span class="fixed">{escape(text)}</span>')


def timeline(decisions: Iterable[Decision]) -> Markup:
    items = []
    for one in decisions:
        where = f" · {one.device}" if one.device else ""
        head = element("span", f"{moment(one.time)}{where} · {one.event}", kind="when")
        items.append(
            element("li", head, element("span", one.summary or one.event), element("span", one.who, kind="who"))
        )
    return Markup(f'<ol class="timeline">{"".join(item.html for item in items)}</ol>')
