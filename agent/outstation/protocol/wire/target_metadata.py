"""Target metadata: the description of a bundle in a TUF repository, readable before the bundle is downloaded.

It is the member `outstation` of a TUF target's `custom`. The repository writes it, devices check compatibility with it,
and the fleet resolves versions with it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from outstation.foundation import decoders
from outstation.foundation.errors import BadBundle

MEMBER = "outstation"
# The version is a folder name and part of a URL.
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


class TargetMetadata(msgspec.Struct, frozen=True, omit_defaults=True):
    """Identity and requirements of a bundle. Unknown members are ignored.

    `digest` is that of manifest.json, `window` the rows of one inference, `agent` the oldest version that reads the
    bundle. `features`: name, version and digest of the feature set. `runtimes` have golden vectors. `memory` is the
    peak of the process that probed the bundle, `unpacked` the size of its files, both in bytes.
    """

    name: str
    version: str
    digest: str
    kind: str
    fields: list[str]
    window: int
    agent: str
    runtimes: list[str]
    memory: Annotated[int, msgspec.Meta(ge=0)]
    unpacked: Annotated[int, msgspec.Meta(ge=0)]
    features: tuple[str, str, str] | None = None


def target_path(name: str, version: str, digest: str) -> str:
    """Return the path of a bundle in a repository. `digest` has the form `sha256:…`.

    Raises BadBundle for a version that cannot be a folder name.
    """
    if not _VERSION.fullmatch(version):
        raise BadBundle(
            f"version {version!r} cannot be in a repository: use letters, digits and . _ + -, as in 1.4.0; "
            "pack the bundle again under such a version"
        )
    return f"{name}/{version}/{digest.removeprefix('sha256:')[:16]}.zip"


def decode(custom: object) -> TargetMetadata:
    """Return the metadata in a target's `custom`. Raises BadBundle."""
    try:
        member: Any = custom[MEMBER] if isinstance(custom, dict) else None
        return decoders.convert(member, TargetMetadata)
    except (msgspec.ValidationError, KeyError) as error:
        raise BadBundle(f"the repository does not describe this target ({error}); publish the bundle again") from None


def encode(metadata: TargetMetadata) -> dict[str, Any]:
    """Return the `custom` of a target."""
    return {MEMBER: msgspec.to_builtins(metadata)}
