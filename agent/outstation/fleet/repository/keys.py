"""Keyring of the repository: the private keys available here, found by key id and not by file name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from outstation.foundation import durable_files
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import PublicKey, SigningKey


@dataclass(slots=True)
class RepositoryKeyring:
    """Signers from the `.key` files in `folder` and from extra files, by TUF key id.

    Names come from the `.pub` files, which stay when a private key is moved away.
    """

    folder: Path
    extra_files: Sequence[Path] = ()
    _signers: dict[str, Signer] = field(init=False, default_factory=dict)
    _names: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for path in [*sorted(self.folder.glob("*.key")), *self.extra_files]:
            self._add_signer(path, keys.load_private(path))
        for path in sorted(self.folder.glob("*.key.pub")):
            self._names[to_tuf_key(keys.load_public(str(path))).keyid] = path.name.removesuffix(".key.pub")

    def __contains__(self, keyid: str) -> bool:
        return keyid in self._signers

    def name(self, key: Key) -> str:
        """Return the name of the key's file, or the key's text if there is no file."""
        return self._names.get(key.keyid, format_public_key(key))

    def signers(self, keyids: Iterable[str]) -> list[Signer]:
        return [self._signers[keyid] for keyid in keyids if keyid in self._signers]

    def generate_next(self, role: str) -> Key:
        """Generate a key for `role` in the next numbered file."""
        taken = [path.name for path in self.folder.glob(f"{role}-*")]
        numbers = [int(match[1]) for name in taken if (match := re.fullmatch(rf"{re.escape(role)}-(\d+)\.key.*", name))]
        return self._generate(f"{role}-{max(numbers, default=0) + 1}", self.folder)

    def find_or_generate(self, name: str, folder: Path | None = None) -> Key:
        """Return the key `<name>.key` in `folder`, default the keyring's; its public half is in the keyring's.

        A key left by an interrupted run is reused: nobody trusts it yet.
        """
        path = (folder or self.folder) / f"{name}.key"
        if not path.exists():
            return self._generate(name, folder or self.folder)
        key = keys.load_private(path)
        self._add_signer(path, key)
        self._write_public(name, key)
        return to_tuf_key(key.public)

    def _generate(self, name: str, folder: Path) -> Key:
        durable_files.make_folder(self.folder)
        self.folder.chmod(0o700)
        path = folder / f"{name}.key"
        # Renamed once complete: a partial key would stop every command that reads the folder.
        new = path.with_name(path.name + ".new")
        new.unlink(missing_ok=True)
        key = keys.generate(new, write_public=False)
        self._write_public(name, key)
        durable_files.rename(new, path)
        self._add_signer(path, key)
        return to_tuf_key(key.public)

    def _write_public(self, name: str, key: SigningKey) -> None:
        durable_files.make_folder(self.folder)
        durable_files.write(self.folder / f"{name}.key.pub", f"{key.public.text}\n".encode())

    def _add_signer(self, path: Path, key: SigningKey) -> None:
        signer = CryptoSigner(key.private)
        self._signers[signer.public_key.keyid] = signer
        self._names[signer.public_key.keyid] = path.name.removesuffix(".key")


def load_signer(file: Path) -> Signer:
    """Return a signer for a private key file. Raises UsageError."""
    return CryptoSigner(keys.load_private(file).private)


def to_tuf_key(key: PublicKey) -> Key:
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(key.raw))


def format_public_key(key: Key) -> str:
    """Return the key as base64url text, or its id if it is not an Ed25519 key."""
    try:
        return keys.b64url_encode(bytes.fromhex(key.keyval["public"]))
    except (KeyError, TypeError, ValueError):
        return key.keyid


def select_key(candidates: dict[str, str], requested: str | None, error_context: str) -> str:
    """Return the id of the key named `requested`, or of the only candidate. `candidates`: key id → name."""
    if requested is None and len(candidates) == 1:
        return next(iter(candidates))
    matches = [keyid for keyid, name in candidates.items() if requested in (name, keyid)]
    if len(matches) != 1:
        known = ", ".join(sorted(candidates.values()))
        raise UsageError(
            f"{error_context}{'' if requested is None else f', none is {requested!r}'}; name one with --old: {known}"
        )
    return matches[0]
