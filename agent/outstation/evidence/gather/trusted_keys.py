"""Trusted keys: device keys, operators, collector, publishers, and the roles of the fleet's TUF repository."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from outstation.evidence.format.manifest import KeyRole, TrustedKey
from outstation.fleet.repository import signature_chain
from outstation.fleet.repository.signature_chain import SignatureChain
from outstation.foundation import input_files
from outstation.protocol.wire.keys import PublicKey, parse_public_key

_METADATA_NAME = re.compile(r"(?:([1-9][0-9]{0,8})\.)?([A-Za-z0-9][A-Za-z0-9._-]{0,100})\.json\Z")
_MAX_METADATA_BYTES = 4 << 20


def build_device_keys(rows: Iterable[dict[str, Any]]) -> tuple[list[TrustedKey], list[str]]:
    """Return every key that a device ever had, and the devices whose stored key is invalid."""
    keys, broken = [], []
    for row in rows:
        try:
            key = parse_public_key(row["key"])
        except ValueError:
            broken.append(row["device"])
            continue
        if key.kid != row["kid"]:
            broken.append(row["device"])
            continue
        bounds = {"revoked": row["revoked"] or "", "log": row["log"], "last_valid_seq": row["last_seq"]}
        keys.append(
            TrustedKey(key.kid, key.text, "device", row["device"], row["added"], made_by=row["made_by"], **bounds)
        )
    return keys, broken


def build_role_keys(
    operators: Sequence[PublicKey], collector: PublicKey, publishers: Sequence[PublicKey]
) -> list[TrustedKey]:
    """Return the keys of operators, collector and publishers, each once per role."""
    named: list[tuple[KeyRole, PublicKey]] = [*(("operator", key) for key in operators), ("collector", collector)]
    named += [("publisher", key) for key in sorted(publishers, key=lambda key: key.kid)]
    unique = {(role, key.kid): TrustedKey(key.kid, key.text, role, role) for role, key in named}
    return list(unique.values())


def read_repository(fleet_dir: Path) -> tuple[dict[str, bytes], SignatureChain, list[str]]:
    """Return (path in the folder → published metadata, its signatures, a sentence per problem).

    Every root is included, because each is signed by the root before it; of other roles, the current version. All parts
    are empty without a repository. Raises UsageError if a file cannot be read.
    """
    home = fleet_dir / "repository" / "metadata"
    paths = sorted(home.iterdir()) if home.is_dir() else []
    files = {
        path.name: input_files.read_input(path, _MAX_METADATA_BYTES, hint="restore the repository")
        for path in paths
        if _METADATA_NAME.match(path.name) and path.is_file()
    }
    problems: dict[str, str] = {}

    def add_problem(file: str, problem: str) -> None:
        problems.setdefault(file, problem)

    chain = signature_chain.verify(files, add_problem)
    relevant = {*(signature.file for signature in chain.signatures), *problems} & files.keys()
    sentences = [f"{file} {problem}" for file, problem in problems.items()]
    return {f"repository/{file}": files[file] for file in sorted(relevant)}, chain, sentences
