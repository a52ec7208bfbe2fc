"""Identifiers of Home Assistant, which allows `[a-zA-Z0-9_-]` only, for names of ours, which also have dots.

Our names have no capital letter, so that capitals can stand for what has no place: the mapping is reversible.
"""

from __future__ import annotations

from agent.names import is_name

_DOT, _AT = "DOT", "_AT_"
_OWNER = "outstation_"


def encode_name(name: str) -> str:
    """Return the identifier of one name."""
    return name.replace(".", _DOT)


def decode_name(identifier: str) -> str:
    """Return the name of an identifier. Raises ValueError if it stands for none."""
    name = identifier.replace(_DOT, ".")
    if "." in identifier or not is_name(name):
        raise ValueError(f"{identifier[:80]!r} stands for no name")
    return name


def device_id(fleet: str, device: str) -> str:
    """Return the identifier of a device among those of all fleets and all other makers."""
    return f"{_OWNER}{encode_name(device)}{_AT}{encode_name(fleet)}"


def parse_device_id(identifier: str) -> tuple[str, str]:
    """Return (fleet, device). Raises ValueError for an identifier of somebody else."""
    device, at, fleet = identifier.removeprefix(_OWNER).partition(_AT)
    if not identifier.startswith(_OWNER) or not at:
        raise ValueError(f"{identifier[:80]!r} is no device of ours")
    return decode_name(fleet), decode_name(device)
