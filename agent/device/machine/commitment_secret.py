"""Commitment secret of the device on disk: 32 random bytes, from which the keys of messages' commitments are derived.

It lies in the data folder, outside the store, so that salvaging a store leaves it as it is; `wipe` erases it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from agent.device.machine.secret_file import SecretFile
from agent.wire.commitment import SECRET_BYTES

log = logging.getLogger("outstation")

FILE = SecretFile(
    "commitment.secret",
    SECRET_BYTES,
    missing="no rows can be proven",
    unreadable="check the file's owner and permissions",
    damaged="restore it from a backup, or delete it: rows sent until now can then never be proven",
)


def load_or_create(data_dir: Path, *, is_new: bool) -> bytes:
    """Load the secret, or make one, with a warning if the device `is_new` no more. Raises UsageError, StorageError."""
    path = data_dir / FILE.name
    if not path.exists() and not is_new:
        log.warning("%s is missing; a new one is made, and rows sent until now can never be proven", path)
    return FILE.load_or_create(data_dir)
