"""Credentials of a service: secrets that systemd hands over in memory, in place of files of the installation.

Only processes of the service see them (systemd.exec(5), LoadCredential). A command that an administrator runs has none.
"""

from __future__ import annotations

import os
from pathlib import Path

from outstation.foundation.errors import UsageError
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import SigningKey


def find_secret(path: Path) -> Path:
    """Return the credential with the name of the file `path`, or `path` if systemd gave this process none."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return credential if folder and (credential := Path(folder) / path.name).exists() else path


def sealed_path(path: Path) -> Path:
    """Return the path of the encrypted credential that stands for a file, as docs/guides/encryption.md names it."""
    return path.with_name(f"{path.name}.cred")


def load_or_generate(path: Path, *, write_public: bool = True) -> SigningKey:
    """Load the private key at `path`, or make one. Raises UsageError if its encrypted credential is there instead."""
    if path.exists():
        return keys.load_private(path)
    if (sealed := sealed_path(path)).exists():
        fix = f"systemd-creds decrypt --name={path.name} {sealed} {path}"
        raise UsageError(f"{path}: is sealed in {sealed}, and another key would shut the device out; first run: {fix}")
    return keys.generate(path, write_public=write_public)
