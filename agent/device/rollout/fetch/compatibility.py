"""Whether a bundle fits this device, by what its publisher signed beside it: asked before it is downloaded."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

# Beside what an archive and its bundle take; the store has a reserve of its own.
DISK_RESERVE_BYTES = 32 << 20


class TargetMetadata(msgspec.Struct, frozen=True):
    """Member `outstation` of a target's `custom`: `digest` of the manifest, `memory` and `unpacked` in bytes.

    `runtimes` are those with golden vectors, as in `agent.model.inference.runtime.NAME`; `agent` is the least version.
    """

    name: str
    version: str
    digest: str
    kind: str
    fields: list[str]
    agent: str
    runtimes: list[str]
    memory: Annotated[int, msgspec.Meta(ge=0)]
    unpacked: Annotated[int, msgspec.Meta(ge=0)]
    window: int = 1


class DeviceProfile(msgspec.Struct, frozen=True):
    """What there is on this device: the stream's fields with their types, bytes of memory and disk that are free."""

    stream: str
    fields: dict[str, str]
    agent: str
    runtime: str
    free_memory: int
    free_disk: int


def find_incompatibility(custom: dict[str, Any], length: int, missing_bytes: int, profile: DeviceProfile) -> str:
    """Why a bundle does not fit, in a sentence, else "". Of its archive's `length` bytes some are `missing`."""
    try:
        needs = msgspec.convert(custom, TargetMetadata)
    except msgspec.ValidationError as error:
        return f"its publisher did not say what it needs ({error}); publish it again with `outstation fleet publish`"
    return (
        _check_fields(needs, profile)
        or _check_agent_version(needs, profile)
        or _check_runtime(needs, profile)
        or _check_memory(needs, profile)
        or _check_disk(missing_bytes + max(needs.unpacked, length) + DISK_RESERVE_BYTES, profile)
    )


def _check_fields(metadata: TargetMetadata, profile: DeviceProfile) -> str:
    for field in metadata.fields:
        kind = profile.fields.get(field)
        if kind is None:
            return f"it needs field {field!r}, which stream {profile.stream!r} of this device does not have"
        if kind == "category":
            return (
                f"it needs numbers in field {field!r}, which is a category in stream {profile.stream!r} of this device"
            )
    return ""


def _check_agent_version(metadata: TargetMetadata, profile: DeviceProfile) -> str:
    if _parse_version(metadata.agent) <= _parse_version(profile.agent):
        return ""
    return f"it needs agent {metadata.agent} or newer, this is {profile.agent}; update the agent first"


def _check_runtime(metadata: TargetMetadata, profile: DeviceProfile) -> str:
    """Golden vectors of another version of the same runtime count: they have a tolerance."""
    package = profile.runtime.partition(" ")[0]
    if package in {name.partition(" ")[0] for name in metadata.runtimes}:
        return ""
    known = ", ".join(metadata.runtimes) or "none"
    return f"it has no golden vectors for the runtime here ({profile.runtime}), so it cannot be proved; it has: {known}"


def _check_memory(metadata: TargetMetadata, profile: DeviceProfile) -> str:
    if metadata.memory <= profile.free_memory:
        return ""
    return f"it needs {_format_mib(metadata.memory)} of memory, {_format_mib(profile.free_memory)} are free here"


def _check_disk(required_bytes: int, profile: DeviceProfile) -> str:
    if required_bytes <= profile.free_disk:
        return ""
    return f"it needs {_format_mib(required_bytes)} of disk to arrive and unpack and leave a reserve; {_format_mib(profile.free_disk)} are free here"


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def _format_mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
