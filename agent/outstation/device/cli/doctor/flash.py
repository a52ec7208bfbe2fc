"""Flash wear: the medium of the data folder, the bytes a day that the daemon writes, and the years that are left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

# A card moves data around itself. Small writes, each with its own commit, cost it about as much again.
WRITE_AMPLIFICATION = 2.0
# Without a rating: what cheap cards endure, as a multiple of their size.
ASSUMED_CYCLES = 100
_SECTOR_BYTES = 512
_LIFE_USED = {f"0x{step:02x}": f"{step * 10 - 10} to {step * 10} %" for step in range(1, 11)}
_LIFE_USED["0x0b"] = "more than 100 %"


class Medium(msgspec.Struct, frozen=True):
    """Block device below a folder. `life_used`: wear that an eMMC reports, "" if it reports none."""

    name: str
    size_bytes: int
    life_used: str


def find_medium(folder: Path, root: Path = Path("/sys"), device: int | None = None) -> Medium | None:
    """Return the medium of a folder; None if it is on none of this machine, such as memory or a network."""
    number = folder.stat().st_dev if device is None else device
    link = root / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
    try:
        block = link.resolve(strict=True)
        if (block / "partition").exists():
            block = block.parent
        size = int((block / "size").read_text(encoding="ascii")) * _SECTOR_BYTES
    except (OSError, ValueError):
        return None
    try:
        life = (block / "device" / "life_time").read_text(encoding="ascii").split()
    except OSError:
        life = []
    return Medium(block.name, size, ", ".join(_LIFE_USED[step] for step in life if step in _LIFE_USED))


def describe_wear(written_per_day: int | None, medium: Medium | None, rating_bytes: int | None) -> dict[str, Any]:
    """Return bytes a day and years left; `assumed` if the medium's rating is not known."""
    rating = rating_bytes
    if rating is None and medium is not None:
        rating = medium.size_bytes * ASSUMED_CYCLES
    years = None
    if written_per_day and rating is not None:
        years = round(rating / (written_per_day * WRITE_AMPLIFICATION * 365.25), 1)
    return {
        "medium": None if medium is None else msgspec.to_builtins(medium),
        "written_per_day": written_per_day,
        "rating_bytes": rating,
        "assumed": rating_bytes is None,
        "years": years,
    }
