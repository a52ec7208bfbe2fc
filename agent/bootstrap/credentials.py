"""Credentials of a service: secrets that systemd hands over in memory, in place of files of the installation.

Only processes of the service see them (systemd.exec(5), LoadCredential). A command that an administrator runs has none.
"""

from __future__ import annotations

import os
from pathlib import Path


def find_secret(path: Path) -> Path:
    """Return the credential with the name of the file `path`, or `path` if systemd gave this process none."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return credential if folder and (credential := Path(folder) / path.name).exists() else path


def sealed_path(path: Path) -> Path:
    """Return the path of the encrypted credential that stands for a file, as docs/guides/encryption.md names it."""
    return path.with_name(f"{path.name}.cred")
