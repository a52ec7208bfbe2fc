"""Filters of the templates; times are relative with the exact one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from markupsafe import Markup, escape

from outstation.foundation import clock
from outstation.foundation.render import templates
from outstation.foundation.text import format_interval, format_value, printable, printable_lines

_FOLDER = Path(__file__).parents[1]
STATIC, _TEMPLATES = _FOLDER / "static", _FOLDER / "templates"
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_MAX_TEXT = 2000


def create_environment() -> templates.Environment:
    environment = templates.create_environment(_TEMPLATES, _MAX_TEXT)
    environment.filters.update(
        when=format_time, count=format_count, size=format_size, value=format_value, short=shorten, path=quote_path,
        interval=lambda metric: format_interval(metric["low"], metric["high"]), label=state_label, share=format_share,
        whole=lambda text: Markup("{}").format(printable_lines(text)), prose=format_prose,
        moment=lambda us: format_time(clock.to_rfc3339(us)),
    )  # fmt: skip
    environment.globals["static"] = static_url
    environment.globals["verified"] = verified_link
    return environment


def static_url(name: str) -> str:
    """Return the path of a file with its digest, so that a browser may keep it for good."""
    if name not in _DIGESTS:
        _DIGESTS[name] = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?v={_DIGESTS[name]}"


_DIGESTS: dict[str, str] = {}


def format_time(text: object) -> Markup:
    """Return a `<time>` element for an RFC 3339 time: the distance from now, with the exact time as its title."""
    if not isinstance(text, str) or not text:
        return Markup("<span class='muted'>never</span>")
    try:
        t_us = clock.parse_rfc3339(text)
    except ValueError:
        return escape(printable(text))
    distance = (clock.read().wall_us - t_us) // 1_000_000
    exact = f"{clock.to_rfc3339(t_us)[:19].replace('T', ' ')} UTC"
    size, unit = next(((s, u) for s, u in _UNITS if abs(distance) >= s), (1, "s"))
    words = f"{abs(distance) // size} {unit}"
    relative = f"{words} ago" if distance >= 0 else f"in {words}"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(text, exact, relative)


def format_prose(text: str) -> Markup:
    """Return a sentence of this program in which backticks become code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def format_count(value: object) -> Markup:
    # The narrow space between groups of digits is no printable character.
    return Markup(f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else "–")


def format_share(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "–"


def format_size(value: object) -> str:
    if not isinstance(value, int | float):
        return "–"
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def shorten(text: object, length: int = 12) -> str:
    shown = str(text or "").removeprefix("sha256:")
    return shown if len(shown) <= length else shown[:length] + "…"


def quote_path(text: object) -> str:
    """Return text as one segment of a path."""
    return quote(str(text), safe="")


def state_label(state: str) -> str:
    return {"insufficient": "learning", "": "no window yet", "ok": "as usual", "fault": "sensor fault"}.get(
        state, state
    )


def message_path(device: str, log: str, seq: int) -> str:
    return f"/messages/{quote_path(device)}/{quote_path(log)}/{seq}"


def verified_link(device: str, log: str, seq: int, *, words: bool = False) -> Markup:
    """Return the link to the signed message that a number came from."""
    if not log or not seq:
        return Markup("")
    text = Markup('<span class="words">verified</span>') if words else Markup("")
    title = f"signed message {seq} of {printable(device)}"
    link = '<a class="verified" href="{}" title="{}" aria-label="verified: {}"><svg class="mark" aria-hidden="true"'
    link += ' viewBox="0 0 16 16"><path d="M3 8.5 6.5 12 13 4.5"/></svg>{}</a>'
    return Markup(link).format(message_path(device, log, seq), title, title, text)


def query_path(path: str, parameters: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """Return a path with the parameters that differ from their defaults."""
    changed = {name: value for name, value in parameters.items() if value != defaults.get(name)}
    return f"{path}?{urlencode(changed)}" if changed else path


def parse_limit(query: Mapping[str, str], least: int, most: int) -> int:
    """Return the number of listed rows in parameter `n`, within bounds."""
    text = query.get("n", "")
    return min(max(int(text), least), most) if text.isdecimal() and len(text) < 6 else least


def choose(text: str | None, choices: Sequence[str], default: str) -> str:
    return text if text is not None and text in choices else default
