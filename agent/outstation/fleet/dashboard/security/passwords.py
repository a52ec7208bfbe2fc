"""Password hashes of accounts: scrypt (RFC 7914) with 16 MiB, and the roles that accounts have."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

from outstation.foundation.errors import UsageError
from outstation.foundation.names import is_name

ROLES = ("viewer", "operator", "admin")
MIN_LENGTH, MAX_LENGTH = 10, 256
_N, _R, _P = 1 << 14, 8, 5
_MAX_MEMORY = 64 << 20


def check_account(name: str, role: str) -> None:
    """Raise UsageError if no account can have this name or role."""
    if not is_name(name):
        raise UsageError(f"account {name!r}: use 1 to 64 of a-z 0-9 . _ -, first a letter or digit")
    if role not in ROLES:
        raise UsageError(f"role {role!r}: use one of {', '.join(ROLES)}")


def hash_password(password: str) -> str:
    """Return parameters, salt and hash. Raises UsageError for a password that is too short or too long."""
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        raise UsageError(f"the password has {len(password)} characters; use {MIN_LENGTH} to {MAX_LENGTH}")
    salt = secrets.token_bytes(16)
    return f"scrypt${_N}${_R}${_P}${_encode(salt)}${_encode(_derive(password, salt, _N, _R, _P))}"


def verify_password(password: str, stored: str | None) -> bool:
    """Return True if the password fits. An account without a password takes as long, and never fits."""
    head, n, r, p, salt, wanted = (stored or _DUMMY).split("$")
    if head != "scrypt" or len(password) > MAX_LENGTH:
        return False
    derived = _derive(password, base64.b64decode(salt), int(n), int(r), int(p))
    return hmac.compare_digest(derived, base64.b64decode(wanted)) and stored is not None


def _derive(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    secret = password.encode(errors="surrogatepass")
    return hashlib.scrypt(secret, salt=salt, n=n, r=r, p=p, maxmem=_MAX_MEMORY, dklen=32)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


_DUMMY = f"scrypt${_N}${_R}${_P}${_encode(bytes(16))}${_encode(bytes(32))}"
