"""Learned reference as text: the smallest changes that its drift tests find, and the progress of learning."""

from __future__ import annotations

import math
from typing import Any

from agent.text import format_span, printable


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
        *([f"correlation ±{together:.2g}" if together else "no correlation"] if pairs else []),
        f"stuck for {numbers['stuck_rows']} rows" + (f", but never at {at}" if at else ""),
    ]
    return ", ".join(parts)


def format_learning(learning: dict[str, Any]) -> str:
    """Return how many drift windows are learned of how many, and the time that is left at the rate so far."""
    windows, seconds, times = learning["windows"], learning["seconds"], learning["times"]
    least, least_s = learning["of"], learning["for_s"]
    most = f", at most {math.ceil(times * least)}" if times > 1 else ""
    text = f"{windows} of at least {least}{most} drift windows"
    text += f" and {format_span(least_s)} of readings" if least_s else ""
    is_extended = windows >= least and seconds >= least_s
    if is_extended:
        least, least_s = times * least, times * least_s
    if windows and seconds > 0:
        left_s = max(seconds / windows * (least - windows), least_s - seconds, 0.0)
        minutes = max(1, math.ceil(left_s / 60))
        left = f"{minutes} min" if minutes < 60 else format_span(60 * minutes)
        text += f", {'at most' if is_extended else 'about'} {left} left"
    return text + ("; goes on, as windows are too alike or show too few modes" if is_extended else "")
