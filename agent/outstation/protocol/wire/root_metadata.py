"""Root metadata of TUF: signatures of a root by a threshold of its own keys and of the root before. No I/O.

The daemon verifies roots with it: importing python-tuf would cost 7 MB of memory. Rules (TUF specification 5.3):
- a root follows the trusted one without a gap in versions
- a threshold of the trusted root's keys and a threshold of its own keys sign it
- a public key counts once, under whatever key ids it is listed
Expiry does not count here: keys that are revoked stay revoked, and an expired root locks nobody out.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
from cryptography.exceptions import InvalidSignature

from outstation.foundation import decoders
from outstation.foundation.errors import MessageRefused
from outstation.foundation.strict_json import check_strict_json
from outstation.protocol.wire.keys import PublicKey, b64url_encode, parse_public_key

MAX_ROOT_BYTES = 65_536
_MAX_KEYS = 64


class _KeyValue(msgspec.Struct, frozen=True):
    public: Annotated[str, msgspec.Meta(max_length=4096)]


class _Key(msgspec.Struct, frozen=True):
    keytype: str
    keyval: _KeyValue


class _Role(msgspec.Struct, frozen=True):
    keyids: Annotated[list[str], msgspec.Meta(max_length=_MAX_KEYS)]
    threshold: Annotated[int, msgspec.Meta(ge=1)]


class _Roles(msgspec.Struct, frozen=True):
    root: _Role


class _Signed(msgspec.Struct, frozen=True):
    type: Annotated[Literal["root"], msgspec.Meta(description="kind of metadata")] = msgspec.field(name="_type")
    version: Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)]
    keys: Annotated[dict[str, _Key], msgspec.Meta(max_length=_MAX_KEYS)]
    roles: _Roles
    outstation: msgspec.Raw = msgspec.Raw(b"null")


class _Signature(msgspec.Struct, frozen=True):
    keyid: str
    sig: Annotated[str, msgspec.Meta(max_length=4096)]


class _File(msgspec.Struct, frozen=True):
    signed: msgspec.Raw
    signatures: Annotated[list[_Signature], msgspec.Meta(max_length=_MAX_KEYS)]


class RootMetadata(msgspec.Struct, frozen=True):
    """A parsed root. `member` is its JSON member `outstation`; `signed_bytes` are the bytes that its keys sign."""

    data: bytes
    version: int
    keys: dict[str, PublicKey]
    threshold: int
    member: bytes
    signed_bytes: bytes
    signatures: list[tuple[str, bytes]]

    def count_signers(self, signed: RootMetadata) -> int:
        """Return the number of this root's distinct public keys that sign `signed`."""
        signers = set()
        for keyid, signature in signed.signatures:
            key = self.keys.get(keyid)
            if key is None or key.raw in signers:
                continue
            try:
                key.verify(signature, signed.signed_bytes)
            except InvalidSignature:
                continue
            signers.add(key.raw)
        return len(signers)

    def require_signed_by(self, delegator: RootMetadata) -> None:
        """Raise MessageRefused unless a threshold of `delegator`'s keys sign this root."""
        count = delegator.count_signers(self)
        if count < delegator.threshold:
            text = f"root {self.version} has {count} of {delegator.threshold} signatures of root {delegator.version}"
            raise MessageRefused("too few signatures", text)


def hash_anchor(first_root: bytes) -> str:
    """Return the SHA-256 of the first root of a repository, which identifies it on a device."""
    return hashlib.sha256(first_root).hexdigest()


def repository_folder(anchor: str) -> str:
    """Return the name of the folder in which a device stores the metadata of one repository."""
    return anchor[:16]


def root_history_file(anchor: str, version: int) -> str:
    """Return the path in the metadata folder at which python-tuf stores a verified root."""
    return f"{repository_folder(anchor)}/root_history/{version}.root.json"


def parse(data: bytes) -> RootMetadata:
    """Parse a root whose own keys sign it. Raises MessageRefused."""
    if len(data) > MAX_ROOT_BYTES:
        raise MessageRefused("too large", f"a root of {len(data)} bytes, the limit is {MAX_ROOT_BYTES}")
    try:
        file = decoders.from_json(data, _File)
        check_strict_json(data)
        signed = decoders.from_json(file.signed, _Signed)
        root = RootMetadata(
            data=data,
            version=signed.version,
            keys={keyid: _parse_key(signed.keys[keyid]) for keyid in signed.roles.root.keyids},
            threshold=signed.roles.root.threshold,
            member=bytes(signed.outstation),
            signed_bytes=_canonical(msgspec.json.decode(file.signed)).encode(),
            signatures=[(signature.keyid, bytes.fromhex(signature.sig)) for signature in file.signatures],
        )
    except (msgspec.MsgspecError, KeyError, ValueError, RecursionError) as error:
        raise MessageRefused("malformed root", f"{type(error).__name__}: {str(error)[:200]}") from None
    root.require_signed_by(root)
    return root


def read_version(data: bytes) -> int:
    """Return the version that a root claims, before its signatures are verified. Raises MessageRefused."""
    try:
        return decoders.from_json(decoders.from_json(data, _File).signed, _Signed).version
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageRefused("malformed root", str(error)[:200]) from None


def parse_successor(trusted: RootMetadata, data: bytes) -> RootMetadata:
    """Parse the root that follows `trusted`. Raises MessageRefused."""
    root = parse(data)
    if root.version != trusted.version + 1:
        text = f"root {root.version} does not follow root {trusted.version}, which this device trusts"
        raise MessageRefused("missing root", text)
    root.require_signed_by(trusted)
    return root


def _parse_key(key: _Key) -> PublicKey:
    if key.keytype != "ed25519":
        raise ValueError(f"a root key of type {key.keytype[:40]!r}; Ed25519 keys sign roots here")
    return parse_public_key(b64url_encode(bytes.fromhex(key.keyval.public)))


def _canonical(value: Any) -> str:
    """Return canonical JSON (OLPC), the form that TUF keys sign. Raises ValueError for a float, which has none."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_canonical(key)}:{_canonical(value[key])}" for key in sorted(value)) + "}"
    raise ValueError(f"canonical JSON has no {type(value).__name__}")
