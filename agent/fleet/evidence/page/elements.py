"""Parts that chapters of the page have in common."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from agent import clock
from agent.fleet.evidence.format.contents import DecisionRecord
from agent.render import html
from agent.render.html import Markup, element

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def chapter(identity: str, title: str, lead: str, *content: Markup) -> Markup:
    """A section that the table of contents leads to."""
    inner = html.section(title, lead, *content).html
    return Markup(inner.replace("<section>", f'<section id="{escape(identity)}">', 1))


def badge(word: str, kind: str) -> Markup:
    return element("span", word, css_class=f"state {kind}")


def link(path: str, name: str = "") -> Markup:
    return Markup(f'<a href="{escape(path)}">{escape(name or path)}</a>')


def overflow_link(remaining: int, path: str, noun: str = "more") -> list[Markup]:
    """Where the rest is, where there is one."""
    return [element("p", f"{remaining:,} {noun} in ", link(path), ".", css_class="muted")] if remaining > 0 else []


def details(summary: str, *content: Markup) -> Markup:
    inside = "".join(one.html for one in content)
    return Markup(f"<details><summary>{escape(summary)}</summary>{inside}</details>")


def stacked_table(table: Markup, labels: str) -> Markup:
    """Cells stand one under another where the screen is narrow; the page's CSS has their `labels`."""
    return element("div", table, css_class=f"stack {labels}")


def nowrap(text: str) -> Markup:
    return Markup(f'<span class="fixed">{escape(text)}</span>')


def timeline(decisions: Sequence[DecisionRecord], limit: int) -> tuple[Markup, int]:
    """At most so many entries, and how many decisions are in them. What many devices did alike is one entry."""
    groups = [list(alike) for _, alike in groupby(decisions, key=lambda one: (one.event, one.who, one.summary))]
    items = [_timeline_item(alike) for alike in groups[:limit]]
    shown = sum(len(alike) for alike in groups[:limit])
    return Markup(f'<ol class="timeline">{"".join(item.html for item in items)}</ol>'), shown


def _timeline_item(decisions: Sequence[DecisionRecord]) -> Markup:
    one, first, last = decisions[0], min(each.time for each in decisions), max(each.time for each in decisions)
    devices = list(dict.fromkeys(each.device for each in decisions if each.device))
    where = f" · {format_names(devices)}" if devices else ""
    when = (
        format_time(first)
        if format_time(first) == format_time(last)
        else f"{format_time(first)} to {format_time(last)}"
    )
    head = element("span", f"{when}{where} · {one.event}", css_class="when")
    return element("li", head, element("span", one.summary or one.event), element("span", one.who, css_class="who"))


def format_time(text: str | None) -> str:
    """`24 Nov 2026, 22:18` of an RFC 3339 time in UTC."""
    if not text:
        return "not known"
    return f"{format_date(text)}, {text[11:16]}"


def format_date(text: str) -> str:
    try:
        return f"{int(text[8:10])} {_MONTHS[int(text[5:7]) - 1]} {text[:4]}"
    except (ValueError, IndexError):
        return text[:40]


def format_duration(seconds: float | None) -> str:
    """The two largest units of it; a dash where it is not known."""
    if seconds is None:
        return "–"
    left = round(seconds)
    parts: list[str] = []
    for size, name in _UNITS:
        if left >= size and len(parts) < 2:
            parts.append(f"{left // size} {name}")
            left %= size
        elif parts:
            break
    return " ".join(parts) or "under 1 s"


def format_count(n: int, singular: str, plural: str = "") -> str:
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def format_names(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def parse_epoch_us(text: str | None) -> int | None:
    """Epoch µs; None where it is no time."""
    try:
        return clock.parse_rfc3339(text) if text else None
    except ValueError:
        return None
