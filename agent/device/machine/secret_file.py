"""Secret files of the device: random bytes in the data folder, made once, which the daemon's user alone may read."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from agent import durable_files, input_files
from agent.errors import UsageError


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
