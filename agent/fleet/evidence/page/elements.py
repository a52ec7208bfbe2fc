"""Page elements shared by the chapters: sections, badges, timelines, and text for times, durations and counts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from agent import clock
from agent.fleet.evidence.format.contents import DecisionRecord
from agent.render import html
from agent.render.html import Markup, element
from agent.render.svg import html_text

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def chapter(identity: str, title: str, lead: str, *content: Markup) -> Markup:
    """Return a section that the table of contents links to."""
    inner = html.section(title, lead, *content).html
    return Markup(inner.replace("<section>", f'<section id="{html_text(identity)}">', 1))


def badge(word: str, kind: str) -> Markup:
    return element("span", word, css_class=f"state {kind}")


def link(path: str, name: str = "") -> Markup:
    return Markup(f'<a href="{html_text(path)}">{html_text(name or path)}</a>')


def overflow_link(remaining: int, path: str, noun: str = "more") -> list[Markup]:
    """Return a link to the file with the remaining entries, or nothing if there are none."""
    return [element("p", f"{remaining:,} {noun} in ", link(path), ".", css_class="muted")] if remaining > 0 else []


def details(summary: str, *content: Markup) -> Markup:
    inside = "".join(part.html for part in content)
    return Markup(f"<details><summary>{html_text(summary)}</summary>{inside}</details>")


def stacked_table(table: Markup, labels: str) -> Markup:
    """Return a table whose cells stack on a narrow screen. The page's CSS names the cells by the class `labels`."""
    return element("div", table, css_class=f"stack {labels}")


def nowrap(text: str) -> Markup:
    return Markup(f'<span class="fixed">{html_text(text)}</span>')


def timeline(decisions: Sequence[DecisionRecord], limit: int) -> tuple[Markup, int]:
    """Return at most `limit` entries, and the number of decisions in them. Equal decisions in a row share an entry."""
    groups = [
        list(group)
        for _, group in groupby(decisions, key=lambda record: (record.event, record.decided_by, record.summary))
    ]
    items = []
    for group in groups[:limit]:
        record, times = group[0], [decision.time for decision in group]
        devices = list(dict.fromkeys(decision.device for decision in group if decision.device))
        where = f" · {format_names(devices)}" if devices else ""
        head = element("span", f"{format_time_range(min(times), max(times))}{where} · {record.event}", css_class="when")
        summary = element("span", record.summary or record.event)
        items.append(element("li", head, summary, element("span", f"by {record.decided_by}", css_class="who")))
    shown = sum(len(group) for group in groups[:limit])
    return Markup(f'<ol class="timeline">{"".join(item.html for item in items)}</ol>'), shown


def format_time(text: str | None) -> str:
    """Return `24 Nov 2026, 22:18` for an RFC 3339 time in UTC."""
    return f"{format_date(text)}, {text[11:16]}" if text else "unknown"


def format_time_range(first: str, last: str) -> str:
    """Return both times, or one if they are equal to the minute."""
    begin, end = format_time(first), format_time(last)
    return begin if begin == end else f"{begin} to {end}"


def format_date(text: str) -> str:
    try:
        return f"{int(text[8:10])} {_MONTHS[int(text[5:7]) - 1]} {text[:4]}"
    except (ValueError, IndexError):
        return text[:40]


def format_duration(seconds: float | None) -> str:
    """Return the two largest units of a duration, or a dash if it is unknown."""
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


def format_names(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


def parse_epoch_us(text: str | None) -> int | None:
    """Return epoch µs, None if the text is not an RFC 3339 time."""
    try:
        return clock.parse_rfc3339(text) if text else None
    except ValueError:
        return None
