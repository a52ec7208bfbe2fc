"""Whether a bundle fits this device, by what its publisher signed beside it: asked before it is downloaded."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

# Beside what an archive and its bundle take; the store has a reserve of its own.
RESERVE = 32 << 20


class Needs(msgspec.Struct, frozen=True):
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


class Here(msgspec.Struct, frozen=True):
    """What there is on this device: the stream's fields with their types, bytes of memory and disk that are free."""

    stream: str
    fields: dict[str, str]
    agent: str
    runtime: str
    memory: int
    disk: int


def why_not(custom: dict[str, Any], length: int, missing: int, here: Here) -> str:
    """Why a bundle does not fit, in a sentence, else "". Of its archive's `length` bytes some are `missing`."""
    try:
        needs = msgspec.convert(custom, Needs)
    except msgspec.ValidationError as error:
        return f"its publisher did not say what it needs ({error}); publish it again with `outstation fleet publish`"
    return (
        _fields(needs, here)
        or _agent(needs, here)
        or _runtime(needs, here)
        or _memory(needs, here)
        or _disk(missing + max(needs.unpacked, length) + RESERVE, here)
    )


def _fields(needs: Needs, here: Here) -> str:
    for field in needs.fields:
        kind = here.fields.get(field)
        if kind is None:
            return f"it needs field {field!r}, which stream {here.stream!r} of this device does not have"
        if kind == "category":
            return f"it needs numbers in field {field!r}, which is a category in stream {here.stream!r} of this device"
    return ""


def _agent(needs: Needs, here: Here) -> str:
    if _numbers(needs.agent) <= _numbers(here.agent):
        return ""
    return f"it needs agent {needs.agent} or newer, this is {here.agent}; update the agent first"


def _runtime(needs: Needs, here: Here) -> str:
    """Golden vectors of another version of the same runtime count: they have a tolerance."""
    package = here.runtime.partition(" ")[0]
    if package in {name.partition(" ")[0] for name in needs.runtimes}:
        return ""
    known = ", ".join(needs.runtimes) or "none"
    return f"it has no golden vectors for the runtime here ({here.runtime}), so it cannot be proved; it has: {known}"


def _memory(needs: Needs, here: Here) -> str:
    if needs.memory <= here.memory:
        return ""
    return f"it needs {_mib(needs.memory)} of memory, {_mib(here.memory)} are free here"


def _disk(wanted: int, here: Here) -> str:
    if wanted <= here.disk:
        return ""
    return f"it needs {_mib(wanted)} of disk to arrive and unpack and leave a reserve; {_mib(here.disk)} are free here"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
