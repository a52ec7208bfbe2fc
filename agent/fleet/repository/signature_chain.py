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
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, RecursionError, RepositoryError, DeserializationError)


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A role's metadata in `file`: signed by these of the keys that `by` lists, of which `threshold` must."""

    file: str
    role: str
    version: int
    expires: str
    by: str
    threshold: int
    keys: list[str]
    signed: list[str]


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A target: the archive of a bundle, and the role that says so."""

    name: str
    version: str
    digest: str
    path: str
    length: int
    sha256: str
    role: str


class Chain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Empty without a repository."""

    signatures: list[Signature] = []
    targets: list[Published] = []


def follow(files: Mapping[str, bytes], add: Callable[[str, str], None]) -> Chain:
    """`files`: metadata by name, as `1.root.json`; `add` hears of each problem, with the file that has it."""
    signatures: list[Signature] = []
    root = _roots(files, signatures, add)
    if root is None:
        return Chain()
    try:
        timestamp = _role(files, "timestamp.json", root, Timestamp, signatures)
        name = f"{timestamp.snapshot_meta.version}.snapshot.json"
        snapshot = _role(files, name, root, Snapshot, signatures, timestamp.snapshot_meta)
        named = snapshot.meta["targets.json"]
        targets = _role(files, f"{named.version}.targets.json", root, Targets, signatures, named)
    except _Broken as broken:
        add(broken.file, broken.why)
        return Chain(signatures)
    except _MALFORMED as error:
        add("snapshot.json", _words(error))
        return Chain(signatures)
    found = _targets(targets.targets, "targets")
    delegated = targets.delegations.roles if targets.delegations is not None else None
    for role in sorted(delegated or {}):
        file = f"{role}.json"
        try:
            meta = snapshot.meta[file]
            file = f"{meta.version}.{role}.json"
            mine = _role(files, file, targets, Targets, signatures, meta, role)
            allowed = {path: one for path, one in mine.targets.items() if _first(targets, path) == role}
            found += _targets(allowed, role)
        except _Broken as broken:
            add(broken.file, broken.why)
        except (*_MALFORMED, BadBundle) as error:
            add(file, _words(error))
    return Chain(signatures, sorted(found, key=lambda one: (one.name, one.version, one.path)))


class _Broken(Exception):
    def __init__(self, file: str, why: str) -> None:
        super().__init__(why)
        self.file, self.why = file, why


def _roots(files: Mapping[str, bytes], signatures: list[Signature], add: Callable[[str, str], None]) -> Root | None:
    """The newest one that the chain leads to."""
    numbers = sorted(int(name.split(".")[0]) for name in files if name.endswith(".root.json"))
    before: Root | None = None
    for number in numbers:
        file = f"{number}.root.json"
        if before is not None and number != before.version + 1:
            add(f"{before.version + 1}.root.json", "is missing: nothing leads from the root before it to the next")
        try:
            before = _role(files, file, before, Root, signatures)
            if before.version != number:
                raise _Broken(file, f"says that it is version {before.version}")
        except _Broken as broken:
            add(broken.file, broken.why)
            return None
    return before


def _role(
    files: Mapping[str, bytes],
    file: str,
    by: Root | Targets | None,
    kind: type[S],
    signatures: list[Signature],
    named: MetaFile | None = None,
    role: str = "",
) -> S:
    """What a file says, signed as `by` asks; a root by itself, too. Raises _Broken."""
    data = files.get(file)
    if data is None:
        raise _Broken(file, "is missing: what names it leads nowhere")
    role = role or kind.type
    try:
        # What was changed beside what is signed is still what nobody published.
        found: Metadata[Any] = Metadata.from_bytes(data)
        if not isinstance(found.signed, kind):
            raise _Broken(file, f"is metadata of {found.signed.type}, where {kind.type} is due")
        asking = [one for one in (by, found.signed if isinstance(found.signed, Root) else None) if one is not None]
        results = [_verify(file, role, one, found) for one in asking]
        if named is not None:
            if found.signed.version != named.version:
                raise _Broken(file, f"is version {found.signed.version}, where {named.version} was signed")
            named.verify_length_and_hashes(data)
        signatures.append(_told(file, role, asking[-1], found, results[-1]))
        return found.signed
    except _MALFORMED as error:
        raise _Broken(file, _words(error)) from None


def _verify(file: str, role: str, by: Root | Targets, found: Metadata[Any]) -> VerificationResult:
    """Raises _Broken."""
    result = by.get_verification_result(role, found.signed_bytes, found.signatures)
    if not result.verified:
        raise _Broken(
            file,
            f"does not verify: {len(result.signed)} of the {result.threshold} signatures that {by.type} "
            f"{by.version} asks for fit",
        )
    return result


def _told(file: str, role: str, by: Root | Targets, found: Metadata[Any], result: VerificationResult) -> Signature:
    every = {**result.signed, **result.unsigned}
    return Signature(
        file=file,
        role=role,
        version=found.signed.version,
        expires=found.signed.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        by=f"{by.version}.{by.type}.json",
        threshold=result.threshold,
        keys=sorted(str(key.keyval.get("public", keyid)) for keyid, key in every.items()),
        signed=sorted(str(key.keyval.get("public", keyid)) for keyid, key in result.signed.items()),
    )


def _first(targets: Targets, path: str) -> str:
    delegations = targets.delegations
    return next((role for role, _ in delegations.get_roles_for_target(path)), "") if delegations is not None else ""


def _targets(found: Mapping[str, TargetFile], role: str) -> list[Published]:
    told = [(path, one, target_metadata.decode(one.custom)) for path, one in found.items()]
    return [
        Published(said.name, said.version, said.digest, path, one.length, str(one.hashes.get("sha256", "")), role)
        for path, one, said in told
    ]


def _words(error: Exception) -> str:
    return f"does not verify: {type(error).__name__}: {str(error)[:200]}"
