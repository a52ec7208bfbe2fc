"""Label key of the device on disk: it authenticates who gives a label at the intake socket.

Whoever may write rows may send labels. Only a label whose author has a token, which this key makes, feeds a decision:
the comparison of two bundles, and alerts about accuracy where the site has such labels.
"""

from __future__ import annotations

import hashlib
import hmac

from agent.device.machine.secret_file import SecretFile
from agent.errors import UsageError
from agent.names import is_name

FILE = SecretFile(
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
