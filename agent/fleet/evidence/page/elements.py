"""Parts that chapters of the page have in common."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from agent.fleet.evidence.contents import Decision
from agent.fleet.evidence.page.words import few, moment
from agent.render import html
from agent.render.html import Markup, element


def chapter(identity: str, title: str, lead: str, *content: Markup) -> Markup:
    """A section that the table of contents leads to."""
    inner = html.section(title, lead, *content).html
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


def timeline(decisions: Sequence[Decision], most: int) -> tuple[Markup, int]:
    """At most so many entries, and how many decisions are in them. What many devices did alike is one entry."""
    groups = [list(alike) for _, alike in groupby(decisions, key=lambda one: (one.event, one.who, one.summary))]
    items = [_entry(alike) for alike in groups[:most]]
    shown = sum(len(alike) for alike in groups[:most])
    return Markup(f'<ol class="timeline">{"".join(item.html for item in items)}</ol>'), shown


def _entry(alike: Sequence[Decision]) -> Markup:
    one, first, last = alike[0], min(each.time for each in alike), max(each.time for each in alike)
    devices = list(dict.fromkeys(each.device for each in alike if each.device))
    where = f" · {few(devices)}" if devices else ""
    when = moment(first) if moment(first) == moment(last) else f"{moment(first)} to {moment(last)}"
    head = element("span", f"{when}{where} · {one.event}", kind="when")
    return element("li", head, element("span", one.summary or one.event), element("span", one.who, kind="who"))
