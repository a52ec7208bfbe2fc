"""Learned reference as text: the smallest changes that its drift tests find, and why learning goes on."""

from __future__ import annotations

import math
from typing import Any

from agent.text import printable


def format_smallest_changes(changes: dict[str, Any], most: int | None = None) -> str:
    """Return a line on the smallest change of each field that is found; of more than `most`, the least sensitive."""
    fields = sorted(changes["fields"].items(), key=lambda item: -(item[1]["shift_sd"] or math.inf))[:most]
    sizes = [
        f"{printable(name)} {_format_change(numbers, pairs=len(changes['fields']) > 1)}" for name, numbers in fields
    ]
    left = len(changes["fields"]) - len(sizes)
    more = f"; {left} more fields: outstation reference show" if left else ""
    head = f"found within {changes['windows']} drift windows, {changes['probability']:.0%} of the time"
    return f"{head}: {'; '.join(sizes)}{more}"


def _format_change(numbers: dict[str, Any], *, pairs: bool) -> str:
    shift, spread = numbers["shift"], numbers["spread"]
    by_sd = f" ({numbers['shift_sd']:.2g} sd)" if numbers["shift_sd"] else ""
    mean = f"±{shift:.3g}{by_sd}" if shift else "no shift"
    together = numbers["correlation"]
    at = ", ".join(f"{value:.4g}" for value in numbers["never_stuck_at"])
    parts = [
        mean,
        f"spread × {spread:.2g}" if spread else "no spread",
        *([f"correlation by {together:.2g}" if together else "no correlation"] if pairs else []),
        f"stuck for {numbers['stuck_rows']} rows" + (f", but never at {at}" if at else ""),
    ]
    return ", ".join(parts)


def format_extension(learning: dict[str, Any]) -> str:
    """Return why learning goes on beyond its windows and time; empty if it does not."""
    if learning["windows"] < learning["of"] or learning["seconds"] < learning["for_s"]:
        return ""
    return f"; goes on for up to {learning['times']:g} times as long, as windows are too alike or show too few modes"
