"""Print `docs/reference/alerts.md` from the table in `agent/alerts/kinds.py`: `python -m scripts.alerts_reference`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from agent.alerts.alert import AlertKind
from agent.alerts.kinds import KINDS
from scripts.kit.usage import answer_help

_HEAD = """\
# Alerts

Generated from `agent/alerts/kinds.py` by `python -m scripts.alerts_reference > docs/reference/alerts.md`; do not edit.

An alert is raised and, for most kinds, cleared later by another message with the same `id`. An open alert about drift
or a sensor fault that doubles or turns round is raised again with the same `id` and the next `revision`, at most ten
times, after at least 5, 10, 20 … drift windows. Its evidence has `before` and `now`. Devices send alerts as
signed messages of kind `alerts`; the collector adds some of its own. `outstation status` lists a device's open alerts,
`outstation fleet alerts` those of all devices. Cleared alerts have the severity `info`.

Find an alert by its `alert` and `subject`. A word in angle brackets stands for a name or a number. The id of a task's
alert begins with the task's name and a slash.

| alert | subject | severity | raised by | meaning |
|---|---|---|---|---|
"""


def to_markdown() -> str:
    """Return the document."""
    rows = [
        f"| `{kind.alert}` | `{_pattern(kind.subject)}` | {kind.severity} | "
        f"{'the collector' if kind.source == 'collector' else 'the device'} | "
        f"[{kind.title}](#{kind.title.lower().replace(' ', '-').replace(chr(39), '')}) |"
        for kind in KINDS
    ]
    return _HEAD + "\n".join(rows) + "\n" + "".join("\n".join(_section(kind)) for kind in KINDS)


def _section(kind: AlertKind) -> Iterator[str]:
    task = "<task>/" if kind.source == "task" else ""
    yield f"\n## {kind.title}\n"
    yield f"`{kind.alert}`, subject `{_pattern(kind.subject)}`, id `{task}{_pattern(kind.id)}`, {kind.severity}.\n"
    yield f"- **Meaning.** {kind.meaning}"
    yield f"- **Likely causes.** {kind.causes}"
    if kind.variants:
        yield "- **Names in the evidence.**"
        yield from (f"  - `{name}`: {text}" for name, text in kind.variants.items())
    yield f"- **What to do.** {kind.action}"
    yield f"- **Clears.** {kind.clears}\n"


def _pattern(text: str) -> str:
    return re.sub(r"\{(\w+)\}", r"<\1>", text)


if __name__ == "__main__":
    answer_help(__doc__)
    print(to_markdown(), end="")
