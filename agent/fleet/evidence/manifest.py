"""`manifest.json`: every file of the folder with its size and digest, when and of what it was made, which keys count.

Rules of `decode`, before any file is touched:
- an object of version 1 without unknown members, none of them twice
- paths are relative, plain, at most four names deep, none twice, none that another one would lie in
- sizes are within the bounds, for each file and together
- keys are keys that somebody holds, each under its own thumbprint
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from agent.errors import Refused
from agent.fleet.evidence.limits import BOUNDS
from agent.strict_json import check_keys
from agent.wire import jws
from agent.wire.keys import SigningKey, public_key
from agent.wire.messages import Natural, Positive, Rfc3339, Text

MANIFEST, TOKEN = "manifest.json", "manifest.jws"
# Stands where a message's topic stands: no signature of a message or a bundle can pass for one of a folder.
DOMAIN = "evidence"
Path = Annotated[str, msgspec.Meta(max_length=240)]
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,119}(/[A-Za-z0-9_][A-Za-z0-9._+-]{0,119}){0,3}\Z")

Role = Literal["device", "operator", "collector", "publisher"]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: Path
    size: Natural
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`owner`: a device, else the role. With `through`, another key followed it: it counts up to that seq of `log`."""

    kid: Text
    key: Text
    role: Role
    owner: Text
    since: Text = ""
    revoked: Text = ""
    log: Text | None = None
    through: Natural | None = None


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When messages came to the collector, first and last; None without any."""

    first: Rfc3339 | None
    last: Rfc3339 | None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`left_out`: how many of what were too many for the folder. `at`: the moment it tells of."""

    v: Literal[1]
    kind: Literal["evidence"]
    fleet: Text
    at: Rfc3339
    agent: Text
    span: Span
    messages: Natural
    left_out: dict[Text, Positive]
    keys: Annotated[list[Key], msgspec.Meta(max_length=200_000)]
    files: Annotated[list[File], msgspec.Meta(max_length=BOUNDS.files)]


_DECODER = msgspec.json.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode(data: bytes) -> Manifest:
    """Raises Refused, never another exception."""
    if len(data) > BOUNDS.manifest:
        raise Refused("too large", f"{len(data)} bytes, the limit is {BOUNDS.manifest}")
    try:
        found = _DECODER.decode(data)
        check_keys(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refused("malformed manifest", str(error)[:200]) from None
    _check_paths([one.path for one in found.files])
    _check_sizes(found.files)
    _check_keys(found.keys)
    return found


def sign(data: bytes, key: SigningKey) -> bytes:
    """The content of `manifest.jws`."""
    return jws.sign(key, DOMAIN, data).encode() + b"\n"


def is_path(path: str) -> bool:
    return _PATH.match(path) is not None and len(path) <= 240


def _check_paths(paths: list[str]) -> None:
    seen: set[str] = set()
    for path in paths:
        if not is_path(path) or path in (MANIFEST, TOKEN):
            raise Refused("path", f"{path[:120]!r} is no path that a file of an evidence folder may have")
        # Where case does not count, two names would be one file.
        if path.lower() in seen:
            raise Refused("path", f"{path[:120]!r} is listed twice")
        seen.add(path.lower())
    for path in paths:
        parts = path.lower().split("/")
        if any("/".join(parts[:n]) in seen for n in range(1, len(parts))):
            raise Refused("path", f"{path[:120]!r} lies in what is listed as a file")


def _check_sizes(files: list[File]) -> None:
    for one in files:
        if one.size > BOUNDS.file:
            raise Refused("too large", f"{one.path} has {one.size} bytes, the limit is {BOUNDS.file}")
    if sum(one.size for one in files) > BOUNDS.together:
        raise Refused("too large", f"all files together are above the limit of {BOUNDS.together} bytes")


def _check_keys(keys: list[Key]) -> None:
    seen: set[tuple[str, str]] = set()
    for one in keys:
        try:
            kid = public_key(one.key).kid
        except ValueError as error:
            raise Refused("key", f"{one.role} {one.owner!r}: {error}") from None
        if kid != one.kid:
            raise Refused("key", f"{one.role} {one.owner!r}: kid {one.kid[:64]!r} is not the key's thumbprint")
        if (one.role, kid) in seen:
            raise Refused("key", f"{one.role} {one.owner!r}: key {kid} is listed twice")
        seen.add((one.role, kid))
