"""Ed25519 keys: files, base64url public keys, RFC 7638 thumbprints."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from agent import durable_files
from agent.errors import UsageError
from agent.wire import curve


def b64url_encode(data: bytes) -> str:
    """Base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def b64url_decode(text: str) -> bytes:
    """Inverse of `b64url`; only the one canonical spelling is taken. Raises ValueError."""
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if b64url_encode(data) != text:
        raise ValueError("not canonical base64url")
    return data


@dataclass(frozen=True, eq=False)
class PublicKey:
    """A verifying key; `raw` is its 32 bytes."""

    raw: bytes
    _key: Ed25519PublicKey = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_key", Ed25519PublicKey.from_public_bytes(self.raw))

    def verify(self, signature: bytes, data: bytes) -> None:
        """Raises cryptography's InvalidSignature."""
        self._key.verify(signature, data)

    @cached_property
    def text(self) -> str:
        """Base64url of the raw key: how keys are written in config files."""
        return b64url_encode(self.raw)

    @cached_property
    def kid(self) -> str:
        """RFC 7638 thumbprint of the key's JWK (RFC 8037)."""
        return b64url_encode(hashlib.sha256(f'{{"crv":"Ed25519","kty":"OKP","x":"{self.text}"}}'.encode()).digest())

    @property
    def jwk(self) -> dict[str, str]:
        """RFC 8037 JWK with the thumbprint as `kid`."""
        return {"kty": "OKP", "crv": "Ed25519", "x": self.text, "kid": self.kid, "alg": "EdDSA"}


@dataclass(frozen=True, eq=False)
class SigningKey:
    """A private key with its public half."""

    private: Ed25519PrivateKey = field(repr=False)
    public: PublicKey = field(init=False)

    def __post_init__(self) -> None:
        raw = self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        object.__setattr__(self, "public", PublicKey(raw))

    def sign(self, data: bytes) -> bytes:
        return self.private.sign(data)


def parse_public_key(text: str) -> PublicKey:
    """The key in a base64url text. Raises ValueError, also for keys that anybody can sign for."""
    raw = b64url_decode(text.strip())
    if len(raw) != 32:
        raise ValueError(f"an Ed25519 public key has 32 bytes, this one {len(raw)}")
    curve.check_point(raw)
    return PublicKey(raw)


def generate(path: Path, *, write_public: bool = True) -> SigningKey:
    """A new key, written to `path` as PKCS 8 PEM, mode 0600, with its public text beside it in `<path>.pub`.

    Raises UsageError where a file is there already: a key is never overwritten.
    """
    key = SigningKey(Ed25519PrivateKey.generate())
    pem = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        durable_files.write_new(path, pem, 0o600)
    except FileExistsError:
        raise UsageError(f"{path}: a key is there already; move it away first if it is to be replaced") from None
    except OSError as error:
        raise UsageError(f"{path}: a key cannot be written there: {error.strerror}") from None
    if write_public:
        public_key_path(path).write_text(key.public.text + "\n", encoding="ascii")
    return key


def public_key_path(path: Path) -> Path:
    """Where the public half of the private key at `path` is."""
    return path.with_name(path.name + ".pub")


def load_private(path: Path) -> SigningKey:
    """The key in a PEM file. Raises UsageError that says what is wrong with the file."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise UsageError(f"{path}: no key here; make one with `outstation init` or `outstation model keygen`") from None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: not a readable private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path}: holds a {type(key).__name__}, an Ed25519 key is needed")
    return SigningKey(key)


def load_public_for(private_path: Path) -> PublicKey:
    """The public half of the key at `private`: from the file beside it, so that the private one may lie elsewhere.

    Where only the private one is there, from that. Raises UsageError.
    """
    file = public_key_path(private_path)
    try:
        return parse_public_key(file.read_text(encoding="ascii"))
    except FileNotFoundError:
        if private_path.exists():
            return load_private(private_path).public
        raise UsageError(
            f"{file}: no such file, so what this key signs cannot be verified; copy it from where {private_path.name} was "
            "made"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file}: holds no readable public key ({error}); copy it again from where {private_path.name} was made, or "
            "delete it where that is beside it"
        ) from None


def load_public(text_or_path: str) -> PublicKey:
    """A public key given as base64url text or as a file that holds it. Raises UsageError."""
    try:
        return parse_public_key(text_or_path)
    except ValueError as not_a_key:
        try:
            return parse_public_key(Path(text_or_path).read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{text_or_path}: neither a base64url Ed25519 key ({not_a_key}) nor a file with one ({error})"
            ) from None
