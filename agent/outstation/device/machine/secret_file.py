"""Secret files of the device: random bytes in the data folder, made once, which the daemon's user alone may read.

The keys of messages' commitments are derived from `COMMITMENT_SECRET`. It lies outside the store, so that salvaging a
store leaves it as it is; `wipe` erases it. `LABEL_KEY` authenticates who gives a label at the intake socket, where
a program that may write rows may send labels. Only a label whose author has a token, which this key makes, feeds a
decision: the comparison of two bundles, and alerts about accuracy where the site has such labels.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path

import msgspec

from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import UsageError
from outstation.foundation.names import is_name
from outstation.protocol.wire.commitment import SECRET_BYTES


class SecretFile(msgspec.Struct, frozen=True):
    """File `name` with `size` random bytes.

    Clauses of its errors: the effect of a missing file, and how to mend one that is unreadable or damaged.
    """

    name: str
    size: int
    missing: str
    unreadable: str
    damaged: str

    def load(self, data_dir: Path) -> bytes:
        """Load the secret. Raises UsageError if there is none, or if it is damaged."""
        secret = self._read(data_dir / self.name)
        if secret is None:
            raise UsageError(f"{data_dir / self.name}: no such file, so {self.missing}; `outstation run` makes one")
        return secret

    def load_or_create(self, data_dir: Path) -> bytes:
        """Load the secret, or make one. Raises UsageError, StorageError."""
        path = data_dir / self.name
        if (secret := self._read(path)) is not None:
            return secret
        secret = os.urandom(self.size)
        durable_files.write(path, secret, 0o600)
        return secret

    def _read(self, path: Path) -> bytes | None:
        try:
            secret = input_files.read_bytes(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; {self.unreadable}") from error
        if len(secret) != self.size:
            raise UsageError(f"{path}: has {len(secret)} bytes instead of {self.size}; {self.damaged}")
        return secret


log = logging.getLogger("outstation")
COMMITMENT_SECRET = SecretFile(
    "commitment.secret",
    SECRET_BYTES,
    missing="no rows can be proven",
    unreadable="check the file's owner and permissions",
    damaged="restore it from a backup, or delete it: rows sent until now can then never be proven",
)


def load_commitment_secret(data_dir: Path, *, is_new: bool) -> bytes:
    """Load the secret, or make one, with a warning if the device `is_new` no more. Raises UsageError, StorageError."""
    path = data_dir / COMMITMENT_SECRET.name
    if not path.exists() and not is_new:
        log.warning("%s is missing; a new one is made, and rows sent until now can never be proven", path)
    return COMMITMENT_SECRET.load_or_create(data_dir)


LABEL_KEY = SecretFile(
    "labels.key",
    32,
    missing="no label is authenticated",
    unreadable="only the daemon's user may authenticate labels",
    damaged="delete it, and make new tokens after the next start",
)


def make_token(key: bytes, name: str) -> str:
    """Return the token with which `name` gives labels. Raises UsageError for a name that is none."""
    if not is_name(name):
        raise UsageError(f"{name[:40]!r} is no name of a labeller: 1-64 of a-z, 0-9, - and _")
    return hmac.new(key, b"label " + name.encode(), hashlib.sha256).hexdigest()[:40]


def is_token(key: bytes, name: str, token: str) -> bool:
    return is_name(name) and hmac.compare_digest(make_token(key, name).encode(), token.encode())
