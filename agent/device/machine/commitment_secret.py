"""Commitment secret of the device on disk: 32 random bytes, from which the keys of messages' commitments are derived.

It lies in the data folder, outside the store, so that salvaging a store leaves it as it is; `wipe` erases it.
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from agent import durable_files, input_files
from agent.errors import UsageError
from agent.wire.commitment import SECRET_BYTES

log = logging.getLogger("outstation")

FILE = "commitment.secret"


def load(data_dir: Path) -> bytes:
    """Load the secret. Raises UsageError if there is none, or if it is damaged."""
    path = data_dir / FILE
    try:
        secret = input_files.read_bytes(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file, so no rows can be proven; `outstation run` makes one") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; check the file's owner and permissions") from error
    if len(secret) != SECRET_BYTES:
        raise UsageError(
            f"{path}: has {len(secret)} bytes instead of {SECRET_BYTES}; restore it from a backup, or delete it: rows "
            "sent until now can then never be proven"
        )
    return secret


def load_or_create(data_dir: Path, *, is_new: bool) -> bytes:
    """Load the secret, or make one, with a warning if the device `is_new` no more. Raises UsageError."""
    path = data_dir / FILE
    if not path.exists():
        # Written aside first: a power cut must not leave half a secret.
        try:
            durable_files.write(path, secrets.token_bytes(SECRET_BYTES), 0o600)
        except OSError as error:
            raise UsageError(f"{path}: cannot write the commitment secret: {error.strerror}") from error
        if not is_new:
            log.warning("%s is missing; a new one is made, and rows sent until now can never be proven", path)
    return load(data_dir)
