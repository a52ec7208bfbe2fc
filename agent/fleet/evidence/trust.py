"""Whose signatures count: devices, operator, collector, publishers, and the roles of their repository."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.errors import UsageError
from agent.fleet.evidence.manifest import Key, Role
from agent.wire.keys import PublicKey, public_key

_METADATA = re.compile(r"(?:([1-9][0-9]{0,8})\.)?([A-Za-z0-9][A-Za-z0-9._-]{0,100})\.json\Z")
_MOST_BYTES = 4 << 20
_MOST_ROOTS = 100


class Trusted(msgspec.Struct, frozen=True, omit_defaults=True):
    """A role of the newest root: so many of these keys must sign, until it expires. Keys are as TUF writes them."""

    role: str
    threshold: int
    keys: list[str]
    root: int
    expires: str = ""


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


def repository(fleet: Path) -> tuple[dict[str, bytes], list[Trusted]]:
    """(path in the folder → metadata as it is published, the roles of the newest root); empty without a repository.

    All roots stay, because each is signed by the one before; of other roles the newest. Raises UsageError.
    """
    newest: dict[str, tuple[int, Path]] = {}
    roots: dict[int, Path] = {}
    home = fleet / "repository" / "metadata"
    for path in sorted(home.iterdir()) if home.is_dir() else ():
        if (match := _METADATA.match(path.name)) is None or not path.is_file():
            continue
        version, role = int(match[1] or 0), match[2]
        if role == "root":
            roots[version] = path
        elif role not in newest or newest[role][0] < version:
            newest[role] = (version, path)
    kept = [roots[version] for version in sorted(roots)[-_MOST_ROOTS:]] + [path for _, path in newest.values()]
    files = {f"repository/{path.name}": _content(path) for path in kept}
    return files, _roles(roots[max(roots)], max(roots)) if roots else []


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, which no metadata of a repository is")
    return data


class _Role(msgspec.Struct):
    keyids: list[str]
    threshold: int


class _TufKey(msgspec.Struct):
    keyval: dict[str, str]


class _Signed(msgspec.Struct):
    expires: str
    keys: dict[str, _TufKey]
    roles: dict[str, _Role]


class _Root(msgspec.Struct):
    signed: _Signed


def _roles(path: Path, version: int) -> list[Trusted]:
    try:
        root = msgspec.json.decode(_content(path), type=_Root).signed
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path}: not the root of a TUF repository: {error}") from None
    return [
        Trusted(
            role=name,
            threshold=role.threshold,
            keys=[root.keys[keyid].keyval.get("public", keyid) for keyid in role.keyids if keyid in root.keys],
            root=version,
            expires=root.expires,
        )
        for name, role in sorted(root.roles.items())
    ]
