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

from agent.errors import MessageRefused
from agent.fleet.evidence.format.contents import READ_LIMITS
from agent.strict_json import check_strict_json
from agent.wire import jws
from agent.wire.keys import SigningKey, parse_public_key
from agent.wire.messages import Natural, Positive, Rfc3339, ShortText

MANIFEST_FILE, SIGNATURE_FILE = "manifest.json", "manifest.jws"
# Stands where a message's topic stands: no signature of a message or a bundle can pass for one of a folder.
SIGNATURE_DOMAIN = "evidence"
RelativePath = Annotated[str, msgspec.Meta(max_length=240)]
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,119}(/[A-Za-z0-9_][A-Za-z0-9._+-]{0,119}){0,3}\Z")

KeyRole = Literal["device", "operator", "collector", "publisher"]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: RelativePath
    size: Natural
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class TrustedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`owner`: a device, else the role. With `through`, another key followed it: it counts up to that seq of `log`."""

    kid: ShortText
    key: ShortText
    role: KeyRole
    owner: ShortText
    since: ShortText = ""
    revoked: ShortText = ""
    log: ShortText | None = None
    through: Natural | None = None


class ReceivedSpan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When messages came to the collector, first and last; None without any."""

    first: Rfc3339 | None
    last: Rfc3339 | None


class EvidenceManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`left_out`: how many of what were too many for the folder. `at`: the moment it tells of."""

    v: Literal[1]
    kind: Literal["evidence"]
    fleet: ShortText
    at: Rfc3339
    agent: ShortText
    span: ReceivedSpan
    messages: Natural
    left_out: dict[ShortText, Positive]
    keys: Annotated[list[TrustedKey], msgspec.Meta(max_length=200_000)]
    files: Annotated[list[FileEntry], msgspec.Meta(max_length=READ_LIMITS.files)]


_DECODER = msgspec.json.Decoder(EvidenceManifest)


def encode(manifest: EvidenceManifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode(data: bytes) -> EvidenceManifest:
    """Raises Refused, never another exception."""
    if len(data) > READ_LIMITS.manifest_bytes:
        raise MessageRefused("too large", f"{len(data)} bytes, the limit is {READ_LIMITS.manifest_bytes}")
    try:
        found = _DECODER.decode(data)
        check_strict_json(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageRefused("malformed manifest", str(error)[:200]) from None
    _check_paths([one.path for one in found.files])
    _check_sizes(found.files)
    _check_keys(found.keys)
    return found


def sign(data: bytes, key: SigningKey) -> bytes:
    """The content of `manifest.jws`."""
    return jws.sign(key, SIGNATURE_DOMAIN, data).encode() + b"\n"


def is_valid_path(path: str) -> bool:
    return _PATH.match(path) is not None and len(path) <= 240


def _check_paths(paths: list[str]) -> None:
    seen: set[str] = set()
    for path in paths:
        if not is_valid_path(path) or path in (MANIFEST_FILE, SIGNATURE_FILE):
            raise MessageRefused("path", f"{path[:120]!r} is no path that a file of an evidence folder may have")
        # Where case does not count, two names would be one file.
        if path.lower() in seen:
            raise MessageRefused("path", f"{path[:120]!r} is listed twice")
        seen.add(path.lower())
    for path in paths:
        parts = path.lower().split("/")
        if any("/".join(parts[:n]) in seen for n in range(1, len(parts))):
            raise MessageRefused("path", f"{path[:120]!r} lies in what is listed as a file")


def _check_sizes(files: list[FileEntry]) -> None:
    for one in files:
        if one.size > READ_LIMITS.file_bytes:
            raise MessageRefused("too large", f"{one.path} has {one.size} bytes, the limit is {READ_LIMITS.file_bytes}")
    if sum(one.size for one in files) > READ_LIMITS.total_bytes:
        raise MessageRefused("too large", f"all files together are above the limit of {READ_LIMITS.total_bytes} bytes")


def _check_keys(keys: list[TrustedKey]) -> None:
    seen: set[tuple[str, str]] = set()
    for one in keys:
        try:
            kid = parse_public_key(one.key).kid
        except ValueError as error:
            raise MessageRefused("key", f"{one.role} {one.owner!r}: {error}") from None
        if kid != one.kid:
            raise MessageRefused("key", f"{one.role} {one.owner!r}: kid {one.kid[:64]!r} is not the key's thumbprint")
        if (one.role, kid) in seen:
            raise MessageRefused("key", f"{one.role} {one.owner!r}: key {kid} is listed twice")
        seen.add((one.role, kid))
