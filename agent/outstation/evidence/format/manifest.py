"""Manifest of an evidence folder: every file with its size and SHA-256, the trusted keys, and the moment it describes.

Rules of `decode`, checked before any listed file is opened:
- the document is a version 1 object without unknown or duplicate members
- paths are relative, at most four names deep, unique without regard to case, and none is a folder of another
- each file size and their sum are within the limits
- every key is a valid public key listed once per role under its own thumbprint
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from outstation.evidence.format.contents import READ_LIMITS
from outstation.foundation.errors import MessageRefused
from outstation.protocol.documents.signed_document import DocumentKind
from outstation.protocol.wire.keys import parse_public_key
from outstation.protocol.wire.messages import Natural, Positive, ShortText
from outstation.protocol.wire.times import Rfc3339

MANIFEST_FILE, SIGNATURE_FILE = "manifest.json", "manifest.jws"
RelativePath = Annotated[str, msgspec.Meta(max_length=240)]
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,119}(/[A-Za-z0-9_][A-Za-z0-9._+-]{0,119}){0,3}\Z")

KeyRole = Literal["device", "operator", "collector", "publisher"]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: RelativePath
    size: Natural
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class TrustedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Public key whose signatures count. `owner` is a device name, or the role itself.

    A key that was replaced counts up to `last_valid_seq` of `log`. `made_by`: who made a device's key; an operator who
    did can have kept its private half.
    """

    kid: ShortText
    key: ShortText
    role: KeyRole
    owner: ShortText
    since: ShortText = ""
    revoked: ShortText = ""
    log: ShortText | None = None
    last_valid_seq: Natural | None = None
    made_by: Literal["device", "operator", ""] = ""


class ReceivedSpan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times at which the collector received its first and last message; None without messages."""

    first: Rfc3339 | None
    last: Rfc3339 | None


class EvidenceManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Manifest. `as_of` is the moment that the folder describes; `omitted` counts entries above the limits, by kind."""

    v: Literal[1]
    kind: Literal["evidence"]
    fleet: ShortText
    as_of: Rfc3339
    agent: ShortText
    span: ReceivedSpan
    messages: Natural
    omitted: dict[ShortText, Positive]
    keys: Annotated[list[TrustedKey], msgspec.Meta(max_length=200_000)]
    files: Annotated[list[FileEntry], msgspec.Meta(max_length=READ_LIMITS.files)]


KIND = DocumentKind(EvidenceManifest, "evidence", "manifest")


def encode(manifest: EvidenceManifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode(data: bytes) -> EvidenceManifest:
    """Parse and check a manifest. Raises MessageRefused and no other exception."""
    if len(data) > READ_LIMITS.manifest_bytes:
        raise MessageRefused("too large", f"{len(data)} bytes, the limit is {READ_LIMITS.manifest_bytes}")
    manifest = KIND.parse(data)
    _check_paths([file.path for file in manifest.files])
    _check_sizes(manifest.files)
    _check_keys(manifest.keys)
    return manifest


def is_valid_path(path: str) -> bool:
    return _PATH.match(path) is not None and len(path) <= 240


def _check_paths(paths: list[str]) -> None:
    seen: set[str] = set()
    for path in paths:
        if not is_valid_path(path) or path in (MANIFEST_FILE, SIGNATURE_FILE):
            raise MessageRefused("path", f"{path[:120]!r} is not a valid path in an evidence folder")
        # On a case-insensitive file system, names that differ in case only are one file.
        if path.lower() in seen:
            raise MessageRefused("path", f"{path[:120]!r} is listed twice")
        seen.add(path.lower())
    for path in paths:
        parts = path.lower().split("/")
        if any("/".join(parts[:n]) in seen for n in range(1, len(parts))):
            raise MessageRefused("path", f"{path[:120]!r} lies in a path that is listed as a file")


def _check_sizes(files: list[FileEntry]) -> None:
    for file in files:
        if file.size > READ_LIMITS.file_bytes:
            problem = f"{file.path} has {file.size} bytes, the limit is {READ_LIMITS.file_bytes}"
            raise MessageRefused("too large", problem)
    if sum(file.size for file in files) > READ_LIMITS.total_bytes:
        raise MessageRefused("too large", f"all files together exceed the limit of {READ_LIMITS.total_bytes} bytes")


def _check_keys(keys: list[TrustedKey]) -> None:
    seen: set[tuple[str, str]] = set()
    for key in keys:
        try:
            kid = parse_public_key(key.key).kid
        except ValueError as error:
            raise MessageRefused("key", f"{key.role} {key.owner!r}: {error}") from None
        if kid != key.kid:
            raise MessageRefused("key", f"{key.role} {key.owner!r}: kid {key.kid[:64]!r} is not the key's thumbprint")
        if (key.role, kid) in seen:
            raise MessageRefused("key", f"{key.role} {key.owner!r}: key {kid} is listed twice")
        seen.add((key.role, kid))
