"""Who signed what in a repository's metadata: from the roots over each role to each bundle's target. Pure.

Rules:
- each root is signed by a threshold of its own keys and of those of the root before it, without a gap
- timestamp, snapshot and targets are signed as the newest root asks, a bundle's role as targets ask
- each of them is the version that the one before names, and has its digest where that is said
- a target counts in the first role that it is delegated to, and says which bundle it is
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

from agent.errors import BadBundle
from agent.model.bundle import target_metadata

S = TypeVar("S", bound=Signed)
# What python-tuf lets through of metadata that are signed and malformed.
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
    """A role's metadata in `file`: signed by these of the keys that `by` lists, of which `threshold` must."""

    file: str
    role: str
    version: int
    expires: str
    delegator: str
    threshold: int
    keys: list[str]
    signed_keys: list[str]


class PublishedTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A target: the archive of a bundle, and the role that says so."""

    name: str
    version: str
    digest: str
    path: str
    length: int
    sha256: str
    role: str


class SignatureChain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Empty without a repository."""

    signatures: list[RoleSignature] = []
    targets: list[PublishedTarget] = []


def verify(files: Mapping[str, bytes], add_problem: Callable[[str, str], None]) -> SignatureChain:
    """`files`: metadata by name, as `1.root.json`; `add` hears of each problem, with the file that has it."""
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
    found = _list_targets(targets.targets, "targets")
    delegated = targets.delegations.roles if targets.delegations is not None else None
    for role in sorted(delegated or {}):
        file = f"{role}.json"
        try:
            meta = snapshot.meta[file]
            file = f"{meta.version}.{role}.json"
            mine = _verify_role(files, file, targets, Targets, signatures, meta, role)
            allowed = {path: one for path, one in mine.targets.items() if _delegated_role(targets, path) == role}
            found += _list_targets(allowed, role)
        except _ChainError as broken:
            add_problem(broken.file, broken.reason)
        except (*_MALFORMED_ERRORS, BadBundle) as error:
            add_problem(file, _describe_error(error))
    return SignatureChain(signatures, sorted(found, key=lambda one: (one.name, one.version, one.path)))


class _ChainError(Exception):
    def __init__(self, file: str, reason: str) -> None:
        super().__init__(reason)
        self.file, self.reason = file, reason


def _verify_roots(
    files: Mapping[str, bytes], signatures: list[RoleSignature], add_problem: Callable[[str, str], None]
) -> Root | None:
    """The newest one that the chain leads to."""
    numbers = sorted(int(name.split(".")[0]) for name in files if name.endswith(".root.json"))
    before: Root | None = None
    for number in numbers:
        file = f"{number}.root.json"
        if before is not None and number != before.version + 1:
            add_problem(
                f"{before.version + 1}.root.json", "is missing: nothing leads from the root before it to the next"
            )
        try:
            before = _verify_role(files, file, before, Root, signatures)
            if before.version != number:
                raise _ChainError(file, f"says that it is version {before.version}")
        except _ChainError as broken:
            add_problem(broken.file, broken.reason)
            return None
    return before


def _verify_role(
    files: Mapping[str, bytes],
    file: str,
    delegator: Root | Targets | None,
    kind: type[S],
    signatures: list[RoleSignature],
    meta_file: MetaFile | None = None,
    role: str = "",
) -> S:
    """What a file says, signed as `by` asks; a root by itself, too. Raises _Broken."""
    data = files.get(file)
    if data is None:
        raise _ChainError(file, "is missing: what names it leads nowhere")
    role = role or kind.type
    try:
        # What was changed beside what is signed is still what nobody published.
        found: Metadata[Any] = Metadata.from_bytes(data)
        if not isinstance(found.signed, kind):
            raise _ChainError(file, f"is metadata of {found.signed.type}, where {kind.type} is due")
        asking = [
            one for one in (delegator, found.signed if isinstance(found.signed, Root) else None) if one is not None
        ]
        results = [_verify_signatures(file, role, one, found) for one in asking]
        if meta_file is not None:
            if found.signed.version != meta_file.version:
                raise _ChainError(file, f"is version {found.signed.version}, where {meta_file.version} was signed")
            meta_file.verify_length_and_hashes(data)
        signatures.append(_build_signature(file, role, asking[-1], found, results[-1]))
        return found.signed
    except _MALFORMED_ERRORS as error:
        raise _ChainError(file, _describe_error(error)) from None


def _verify_signatures(file: str, role: str, delegator: Root | Targets, metadata: Metadata[Any]) -> VerificationResult:
    """Raises _Broken."""
    result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    if not result.verified:
        raise _ChainError(
            file,
            f"does not verify: {len(result.signed)} of the {result.threshold} signatures that {delegator.type} "
            f"{delegator.version} asks for fit",
        )
    return result


def _build_signature(
    file: str, role: str, delegator: Root | Targets, metadata: Metadata[Any], result: VerificationResult
) -> RoleSignature:
    every = {**result.signed, **result.unsigned}
    return RoleSignature(
        file=file,
        role=role,
        version=metadata.signed.version,
        expires=metadata.signed.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        delegator=f"{delegator.version}.{delegator.type}.json",
        threshold=result.threshold,
        keys=sorted(str(key.keyval.get("public", keyid)) for keyid, key in every.items()),
        signed_keys=sorted(str(key.keyval.get("public", keyid)) for keyid, key in result.signed.items()),
    )


def _delegated_role(targets: Targets, path: str) -> str:
    delegations = targets.delegations
    return next((role for role, _ in delegations.get_roles_for_target(path)), "") if delegations is not None else ""


def _list_targets(target_files: Mapping[str, TargetFile], role: str) -> list[PublishedTarget]:
    told = [(path, one, target_metadata.decode(one.custom)) for path, one in target_files.items()]
    return [
        PublishedTarget(said.name, said.version, said.digest, path, one.length, str(one.hashes.get("sha256", "")), role)
        for path, one, said in told
    ]


def _describe_error(error: Exception) -> str:
    return f"does not verify: {type(error).__name__}: {str(error)[:200]}"
