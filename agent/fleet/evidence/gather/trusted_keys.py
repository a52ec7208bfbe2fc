"""Whose signatures count: devices, operator, collector, publishers, and the roles of their repository."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agent.errors import UsageError
from agent.fleet.evidence.manifest import Key, Role
from agent.fleet.repository import signature_chain
from agent.fleet.repository.signature_chain import Chain
from agent.wire.keys import PublicKey, public_key

_METADATA = re.compile(r"(?:([1-9][0-9]{0,8})\.)?([A-Za-z0-9][A-Za-z0-9._-]{0,100})\.json\Z")
_MOST_BYTES = 4 << 20


def of_devices(rows: Iterable[dict[str, Any]]) -> tuple[list[Key], list[str]]:
    """Every key that a device ever had, and the devices of keys that are none."""
    keys, broken = [], []
    for row in rows:
        try:
            key = public_key(row["key"])
        except ValueError:
            broken.append(row["device"])
            continue
        if key.kid != row["kid"]:
            broken.append(row["device"])
            continue
        bounds = {"revoked": row["revoked"] or "", "log": row["log"], "through": row["through"]}
        keys.append(Key(key.kid, key.text, "device", row["device"], row["added"], **bounds))
    return keys, broken


def of_roles(operators: Sequence[PublicKey], collector: PublicKey, publishers: Sequence[PublicKey]) -> list[Key]:
    named: list[tuple[Role, PublicKey]] = [*(("operator", key) for key in operators), ("collector", collector)]
    named += [("publisher", key) for key in sorted(publishers, key=lambda key: key.kid)]
    once = {(role, key.kid): Key(key.kid, key.text, role, role) for role, key in named}
    return list(once.values())


def repository(fleet: Path) -> tuple[dict[str, bytes], Chain, list[str]]:
    """(path in the folder → metadata as it is published, who signed it, what is wrong); empty without a repository.

    All roots stay, because each is signed by the one before; of other roles what the newest edition is made of. Raises
    UsageError where a file cannot be read.
    """
    home = fleet / "repository" / "metadata"
    paths = sorted(home.iterdir()) if home.is_dir() else []
    found = {path.name: _content(path) for path in paths if _METADATA.match(path.name) and path.is_file()}
    problems: dict[str, str] = {}

    def add(file: str, problem: str) -> None:
        problems.setdefault(file, problem)

    told = signature_chain.follow(found, add)
    kept = {*(one.file for one in told.signatures), *problems} & found.keys()
    wrong = [f"{file} {problem}" for file, problem in problems.items()]
    return {f"repository/{file}": found[file] for file in sorted(kept)}, told, wrong


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, which no metadata of a repository is")
    return data
