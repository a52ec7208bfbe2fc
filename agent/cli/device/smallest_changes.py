"""Smallest changes that a site's drift tests find, as text."""

from __future__ import annotations

import math
from typing import Any

from agent.text import printable


def format_smallest_changes(changes: dict[str, Any], most: int | None = None) -> str:
    """Return a line on the smallest change of each field that is found; of more than `most`, the least sensitive."""
    fields = sorted(changes["fields"].items(), key=lambda item: -(item[1]["shift_sd"] or math.inf))[:most]
    sizes = [f"{printable(name)} {_format_change(numbers)}" for name, numbers in fields]
    left = len(changes["fields"]) - len(sizes)
    more = f"; {left} more fields: outstation reference show" if left else ""
    head = f"found within {changes['windows']} drift windows, {changes['probability']:.0%} of the time"
    return f"{head}: {'; '.join(sizes)}{more}"


def _format_change(numbers: dict[str, Any]) -> str:
    shift, spread = numbers["shift"], numbers["spread"]
    by_sd = f" ({numbers['shift_sd']:.2g} sd)" if numbers["shift_sd"] else ""
    mean = f"±{shift:.3g}{by_sd}" if shift else "no shift"
    return f"{mean}, spread × {spread:.2g}" if spread else f"{mean}, no spread"
