"""Label key of the device on disk: it authenticates who gives a label at the intake socket.

Whoever may write rows may send labels. Only a label whose author has a token, which this key makes, feeds a decision:
the comparison of two bundles, and alerts about accuracy where the site has such labels.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from agent import durable_files, input_files
from agent.errors import UsageError
from agent.names import is_name

FILE = "labels.key"
KEY_BYTES = 32


def load(data_dir: Path) -> bytes:
    """Load the key. Raises UsageError."""
    path = data_dir / FILE
    try:
        key = input_files.read_bytes(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file, so no label is authenticated; `outstation run` makes one") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; only the daemon's user may authenticate labels") from error
    if len(key) != KEY_BYTES:
        raise UsageError(f"{path}: has {len(key)} bytes instead of {KEY_BYTES}; delete it, and make the tokens anew")
    return key


def load_or_create(data_dir: Path) -> bytes:
    """Load the key, or make one. Raises UsageError."""
    path = data_dir / FILE
    if not path.exists():
        # Written aside first: a power cut must not leave half a key.
        try:
            durable_files.write(path, secrets.token_bytes(KEY_BYTES), 0o600)
        except OSError as error:
            raise UsageError(f"{path}: cannot write the label key: {error.strerror}") from error
    return load(data_dir)


def make_token(key: bytes, name: str) -> str:
    """Return the token with which `name` gives labels. Raises UsageError for a name that is none."""
    if not is_name(name):
        raise UsageError(f"{name[:40]!r} is no name of a labeller: 1-64 of a-z, 0-9, - and _")
    return hmac.new(key, b"label " + name.encode(), hashlib.sha256).hexdigest()[:40]


def is_token(key: bytes, name: str, token: str) -> bool:
    return is_name(name) and hmac.compare_digest(make_token(key, name).encode(), token.encode())
