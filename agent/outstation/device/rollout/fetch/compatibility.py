"""Bundle compatibility: check the signed target metadata against this device, before the download."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from outstation.foundation import decoders
from outstation.protocol.wire.target_metadata import TargetMetadata

# Free disk left after the archive and its unpacked bundle. The store has a reserve of its own.
DISK_RESERVE_BYTES = 32 << 20


class DeviceProfile(msgspec.Struct, frozen=True):
    """Resources of this device: the task's stream with its field types, and free memory and disk in bytes."""

    stream: str
    fields: dict[str, str]
    agent: str
    runtime: str
    free_memory: int
    free_disk: int


def find_incompatibility(custom: dict[str, Any], length: int, missing_bytes: int, profile: DeviceProfile) -> str:
    """Return why a bundle does not fit this device, "" if it does.

    `missing_bytes` of its archive's `length` bytes are still to be downloaded.
    """
    try:
        metadata = decoders.convert(custom, TargetMetadata)
    except msgspec.ValidationError as error:
        return f"its target metadata are incomplete ({error}); publish it again with `outstation fleet publish`"
    for field in metadata.fields:
        kind = profile.fields.get(field)
        if kind is None:
            return f"it needs field {field!r}, which stream {profile.stream!r} of this device does not have"
        if kind == "category":
            return f"it needs numbers in field {field!r}, but stream {profile.stream!r} of this device has a category"
    if _parse_version(metadata.agent) > _parse_version(profile.agent):
        return f"it needs agent {metadata.agent} or newer, this is {profile.agent}; update the agent first"
    # Golden vectors of any version of the runtime will do: they have a tolerance.
    if profile.runtime.partition(" ")[0] not in {name.partition(" ")[0] for name in metadata.runtimes}:
        known, runtime = ", ".join(metadata.runtimes) or "none", profile.runtime
        return f"it has no golden vectors for this runtime ({runtime}), so it cannot be verified; it has: {known}"
    if metadata.memory > profile.free_memory:
        return f"it needs {_format_mib(metadata.memory)} of memory, {_format_mib(profile.free_memory)} are free here"
    required_disk = missing_bytes + max(metadata.unpacked, length) + DISK_RESERVE_BYTES
    if required_disk > profile.free_disk:
        required, free = _format_mib(required_disk), _format_mib(profile.free_disk)
        return f"it needs {required} of disk for the archive, the unpacked bundle and a reserve; {free} are free here"
    return ""


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def _format_mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
