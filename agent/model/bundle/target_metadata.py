"""What a repository says of a bundle before it is downloaded: the member `outstation` of a TUF target's `custom`."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from agent.errors import BadBundle
from agent.model.bundle import golden_vectors
from agent.model.bundle.bundle import Bundle

MEMBER = "outstation"
# Format of a bundle → the first agent that reads it.
_MIN_AGENT_VERSION = {1: "0.1.0", 2: "0.1.0"}
# It is a folder's name and part of a URL.
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


class TargetMetadata(msgspec.Struct, frozen=True):
    """`digest` is of manifest.json; `window` are rows of an inference; `agent` is the oldest one that reads it.

    `runtimes` are those on which its golden vectors were made; `memory` are the bytes that a process which proves the
    bundle takes in all, `unpacked` those of its files. Members that are not known here are passed over.
    """

    name: str
    version: str
    digest: str
    kind: str
    fields: list[str]
    window: int
    agent: str
    runtimes: list[str]
    memory: int
    unpacked: int


def from_bundle(bundle: Bundle, memory: int) -> TargetMetadata:
    """Raises BadBundle where its golden vectors cannot be read."""
    content = bundle.manifest
    vectors = golden_vectors.decode(bundle.files["golden.npz"]) if "golden.npz" in bundle.files else None
    return TargetMetadata(
        name=content.name,
        version=content.version,
        digest=bundle.digest,
        kind=content.kind,
        fields=content.input.fields,
        window=content.input.rows,
        agent=_MIN_AGENT_VERSION[content.format],
        runtimes=[vectors.runtime.split()[0]] if vectors is not None else [],
        memory=memory,
        unpacked=sum(map(len, bundle.files.values())),
    )


def target_path(name: str, version: str, digest: str) -> str:
    """Where a repository has a bundle, `digest` as `sha256:…`. Raises BadBundle for a version that names no folder."""
    if not _VERSION.fullmatch(version):
        raise BadBundle(
            f"version {version!r} cannot be in a repository: use letters, digits and . _ + -, as in 1.4.0; "
            "pack the bundle again under such a version"
        )
    return f"{name}/{version}/{digest.removeprefix('sha256:')[:16]}.zip"


def decode(custom: object) -> TargetMetadata:
    """The offer in a target's `custom`. Raises BadBundle."""
    try:
        member: Any = custom[MEMBER] if isinstance(custom, dict) else None
        return msgspec.convert(member, TargetMetadata)
    except (msgspec.ValidationError, KeyError) as error:
        raise BadBundle(f"the repository does not say what this target is ({error}); publish it again") from None


def encode(metadata: TargetMetadata) -> dict[str, Any]:
    return {MEMBER: msgspec.to_builtins(metadata)}
