"""Encryption keys of a fleet's collectors, in `encryption/` of its folder: one X25519 key in force, and former ones.

A file is named after the moment it was made, so the last name is the key in force. A former key opens messages until
the operator deletes its file. Devices learn a new key by a trust document.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import UsageError
from outstation.protocol.transport import sealing
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.transport.sealing import Opener
from outstation.protocol.wire.keys import EncryptionKey, encryption_key_of, parse_encryption_key, public_key_path

logger = logging.getLogger(__name__)

FOLDER = "encryption"
_NAME = "%Y%m%dT%H%M%S.%fZ.key"
_RELOAD_S = 10.0


def create(home: Path) -> Path:
    """Make a key that is in force from now on. Raises UsageError, StorageError."""
    path = home / FOLDER / datetime.now(UTC).strftime(_NAME)
    durable_files.make_folder(path.parent)
    path.parent.chmod(0o700)
    key = X25519PrivateKey.generate()
    # The private half first: a public half without it would seal messages that nobody opens.
    durable_files.write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    durable_files.write(public_key_path(path), f"{encryption_key_of(key).text}\n".encode())
    return path


def load_public(home: Path) -> EncryptionKey | None:
    """Return the public half of the key in force, None if the fleet has no key. Raises UsageError."""
    files = _list(home, ".key.pub")
    if not files:
        return None
    try:
        return parse_encryption_key(input_files.read_text(files[-1], "ascii"))
    except (OSError, ValueError) as error:
        problem = f"not a readable public key: {error}; copy it from a collector's folder"
        raise UsageError(f"{files[-1]}: {problem}") from None


class EncryptionKeys:
    """The keys that open messages now; new files are noticed within seconds."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._opener = Opener([])
        self._reload_at = float("-inf")
        self._unreadable: set[Path] = set()

    @property
    def opener(self) -> Opener:
        if time.monotonic() >= self._reload_at:
            self._reload_at = time.monotonic() + _RELOAD_S
            loaded = [self._load(path) for path in _list(self._home, ".key")]
            self._opener = Opener(key for key in loaded if key is not None)
        return self._opener

    def _load(self, path: Path) -> X25519PrivateKey | None:
        """Return the key in a file; None, and one line in the journal, if it cannot be read."""
        try:
            key = load_pem_private_key(input_files.read_bytes(path), password=None)
            if isinstance(key, X25519PrivateKey):
                return key
            raise ValueError(f"a {type(key).__name__}, where X25519 is needed")
        except (OSError, ValueError, TypeError) as error:
            if path not in self._unreadable:
                logger.error("%s: not a readable private key: %s; messages sealed to it are refused", path, error)
            self._unreadable.add(path)
            return None


def unseal(delivery: IncomingMessage, keys: EncryptionKeys | None) -> IncomingMessage:
    """Return the message as the device signed it, or as it came if it is not sealed. Raises MessageRefused."""
    if not delivery.sealed:
        return delivery
    return sealing.open_message(delivery, Opener([]) if keys is None else keys.opener)


def _list(home: Path, suffix: str) -> list[Path]:
    """Return the files of the keys with this suffix, oldest first."""
    return sorted((home / FOLDER).glob(f"[0-9]*{suffix}"))
