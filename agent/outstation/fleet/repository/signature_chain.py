"""Signature chain of TUF metadata: from the first root over each role to each bundle's target. No I/O.

Rules:
- a threshold of its own keys and of the previous root's keys signed each root, without a gap in versions
- timestamp, snapshot and targets are signed as the newest root requires, a bundle's role as targets requires
- each has the version that the metadata before it names, and its digest if one is named
- a target counts in the first role that it is delegated to, and names its bundle
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
    VerificationResult,
)
from tuf.api.serialization import DeserializationError

from outstation.foundation.errors import BadBundle
from outstation.protocol.wire import target_metadata

S = TypeVar("S", bound=Signed)
# Exceptions of python-tuf for metadata that are signed but malformed.
_MALFORMED_ERRORS = (
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    RecursionError,
    RepositoryError,
    DeserializationError,
)


class RoleSignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Signatures of a role's metadata. `delegator` lists `keys`, of which `threshold` must sign."""

    file: str
    role: str
    version: int
    expires: str
    delegator: str
    threshold: int
    keys: list[str]
    signed_keys: list[str]


class PublishedTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Archive of a bundle, and the role that lists it."""

    name: str
    version: str
    digest: str
    path: str
    length: int
    sha256: str
    role: str


class SignatureChain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Verified signatures and targets; empty without a repository."""

    signatures: list[RoleSignature] = []
    targets: list[PublishedTarget] = []


def verify(files: Mapping[str, bytes], add_problem: Callable[[str, str], None]) -> SignatureChain:
    """Verify metadata, given by file name (`1.root.json`). `add_problem` receives (file, problem)."""
    signatures: list[RoleSignature] = []
    root = _verify_roots(files, signatures, add_problem)
    if root is None:
        return SignatureChain()
    try:
        timestamp = _verify_role(files, "timestamp.json", root, Timestamp, signatures)
        name = f"{timestamp.snapshot_meta.version}.snapshot.json"
        snapshot = _verify_role(files, name, root, Snapshot, signatures, timestamp.snapshot_meta)
        named = snapshot.meta["targets.json"]
        targets = _verify_role(files, f"{named.version}.targets.json", root, Targets, signatures, named)
    except _ChainError as broken:
        add_problem(broken.file, broken.reason)
        return SignatureChain(signatures)
    except _MALFORMED_ERRORS as error:
        add_problem("snapshot.json", _describe_error(error))
        return SignatureChain(signatures)
    published = _list_targets(targets.targets, "targets")
    delegated = targets.delegations.roles if targets.delegations is not None else None
    for role in sorted(delegated or {}):
        file = f"{role}.json"
        try:
            meta = snapshot.meta[file]
            file = f"{meta.version}.{role}.json"
            files_of_role = _verify_role(files, file, targets, Targets, signatures, meta, role).targets
            assert targets.delegations is not None
            for path, target in files_of_role.items():
                # A target counts in the first role that it is delegated to.
                first, _ = next(targets.delegations.get_roles_for_target(path), ("", False))
                if first == role:
                    published += _list_targets({path: target}, role)
        except _ChainError as broken:
            add_problem(broken.file, broken.reason)
        except (*_MALFORMED_ERRORS, BadBundle) as error:
            add_problem(file, _describe_error(error))
    return SignatureChain(signatures, sorted(published, key=lambda target: (target.name, target.version, target.path)))


class _ChainError(Exception):
    def __init__(self, file: str, reason: str) -> None:
        super().__init__(reason)
        self.file, self.reason = file, reason


def _verify_roots(
    files: Mapping[str, bytes], signatures: list[RoleSignature], add_problem: Callable[[str, str], None]
) -> Root | None:
    """Return the newest root that the chain leads to."""
    numbers = sorted(int(name.split(".")[0]) for name in files if name.endswith(".root.json"))
    previous: Root | None = None
    for number in numbers:
        file = f"{number}.root.json"
        if previous is not None and number != previous.version + 1:
            add_problem(f"{previous.version + 1}.root.json", "is missing, so the chain of roots is broken")
        try:
            previous = _verify_role(files, file, previous, Root, signatures)
            if previous.version != number:
                raise _ChainError(file, f"has version {previous.version}")
        except _ChainError as broken:
            add_problem(broken.file, broken.reason)
            return None
    return previous


def _verify_role(
    files: Mapping[str, bytes],
    file: str,
    delegator: Root | Targets | None,
    kind: type[S],
    signatures: list[RoleSignature],
    meta_file: MetaFile | None = None,
    role: str = "",
) -> S:
    """Return signed metadata, verified against its delegator; a root also against itself. Raises _ChainError."""
    data = files.get(file)
    if data is None:
        raise _ChainError(file, "is missing, but other metadata refer to it")
    role = role or kind.type
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(data)
        if not isinstance(metadata.signed, kind):
            raise _ChainError(file, f"is metadata of type {metadata.signed.type}, expected {kind.type}")
        itself = metadata.signed if isinstance(metadata.signed, Root) else None
        delegators = [candidate for candidate in (delegator, itself) if candidate is not None]
        for signing in delegators:
            result = signing.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
            if not result.verified:
                count = f"{len(result.signed)} of {result.threshold} required signatures"
                raise _ChainError(file, f"does not verify: {count} by keys that {signing.type} {signing.version} lists")
        if meta_file is not None:
            if metadata.signed.version != meta_file.version:
                actual, expected = metadata.signed.version, meta_file.version
                raise _ChainError(file, f"is version {actual}, but version {expected} is signed")
            meta_file.verify_length_and_hashes(data)
        signatures.append(_build_signature(file, role, delegators[-1], metadata, result))
        return metadata.signed
    except _MALFORMED_ERRORS as error:
        raise _ChainError(file, _describe_error(error)) from None


def _build_signature(
    file: str, role: str, delegator: Root | Targets, metadata: Metadata[Any], result: VerificationResult
) -> RoleSignature:
    keys = {**result.signed, **result.unsigned}
    return RoleSignature(
        file=file,
        role=role,
        version=metadata.signed.version,
        expires=metadata.signed.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        delegator=f"{delegator.version}.{delegator.type}.json",
        threshold=result.threshold,
        keys=sorted(str(key.keyval.get("public", keyid)) for keyid, key in keys.items()),
        signed_keys=sorted(str(key.keyval.get("public", keyid)) for keyid, key in result.signed.items()),
    )


def _list_targets(target_files: Mapping[str, TargetFile], role: str) -> list[PublishedTarget]:
    targets = []
    for path, file in target_files.items():
        bundle, sha256 = target_metadata.decode(file.custom), str(file.hashes.get("sha256", ""))
        targets.append(PublishedTarget(bundle.name, bundle.version, bundle.digest, path, file.length, sha256, role))
    return targets


def _describe_error(error: Exception) -> str:
    return f"does not verify: {type(error).__name__}: {str(error)[:200]}"
