"""Ed25519 keys, which sign, and X25519 keys, to which messages are sealed: files, base64url, RFC 7638 thumbprints."""

from __future__ import annotations

import base64
import hashlib
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import UsageError, explain

# PKCS 8 of an Ed25519 key up to its 32 bytes (RFC 8410 section 7), and the PEM around it.
_PKCS8_HEAD = bytes.fromhex("302e020100300506032b657004220420")
_PEM_BEGIN, _PEM_END = b"-----BEGIN PRIVATE KEY-----\n", b"\n-----END PRIVATE KEY-----\n"
# The curve -x² + y² = 1 + dx²y² over the field of P elements.
_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
_SIGN_BIT = 1 << 255
# y of the eight points whose order divides 8: 1, -1, 0 or one of these two.
_ORDER_8_Y = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER_Y = frozenset({0, 1, _P - 1, _ORDER_8_Y, _P - _ORDER_8_Y})


def b64url_encode(data: bytes) -> str:
    """Base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def b64url_decode(text: str) -> bytes:
    """Decode base64url in its one canonical spelling. Raises ValueError."""
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if b64url_encode(data) != text:
        raise ValueError("not canonical base64url")
    return data


class PublicKey:
    """A verifying key; `raw` is its 32 bytes."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self._key = raw, Ed25519PublicKey.from_public_bytes(raw)

    def __reduce__(self) -> tuple[type[PublicKey], tuple[bytes]]:
        """Pickle the raw key, as the library's cannot be: worker processes are given keys."""
        return PublicKey, (self.raw,)

    def verify(self, signature: bytes, data: bytes) -> None:
        """Verify a signature. Raises cryptography's InvalidSignature."""
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


class EncryptionKey:
    """A public X25519 key, to which payloads are sealed; `raw` is its 32 bytes."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.public = raw, X25519PublicKey.from_public_bytes(raw)

    @cached_property
    def text(self) -> str:
        """Base64url of the raw key, as in config files."""
        return b64url_encode(self.raw)

    @cached_property
    def kid(self) -> str:
        """RFC 7638 thumbprint of the key's JWK (RFC 8037)."""
        return b64url_encode(self.thumbprint)

    @cached_property
    def thumbprint(self) -> bytes:
        return hashlib.sha256(f'{{"crv":"X25519","kty":"OKP","x":"{self.text}"}}'.encode()).digest()


class SigningKey:
    """A private key with its public half."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self.private, self.public = private, PublicKey(private.public_key().public_bytes_raw())

    @property
    def pem(self) -> bytes:
        """The private key as unencrypted PKCS 8 PEM."""
        return _PEM_BEGIN + base64.b64encode(_PKCS8_HEAD + self.private.private_bytes_raw()) + _PEM_END

    def sign(self, data: bytes) -> bytes:
        return self.private.sign(data)


def parse_public_key(text: str) -> PublicKey:
    """Parse a base64url public key. Raises ValueError, also for keys for which every signature verifies."""
    raw = b64url_decode(text.strip())
    if len(raw) != 32:
        raise ValueError(f"an Ed25519 public key has 32 bytes, this one {len(raw)}")
    _check_point(raw)
    return PublicKey(raw)


def parse_encryption_key(text: str) -> EncryptionKey:
    """Parse a base64url public key. Raises ValueError, also for keys whose shared secret is public."""
    raw = b64url_decode(text.strip())
    if len(raw) != 32:
        raise ValueError(f"an X25519 public key has 32 bytes, this one {len(raw)}")
    key = EncryptionKey(raw)
    try:
        # A point of small order gives zero with every private key.
        X25519PrivateKey.generate().exchange(key.public)
    except ValueError:
        raise ValueError("an X25519 public key of small order: anybody can open what is sealed to it") from None
    return key


def encryption_key_of(key: X25519PrivateKey) -> EncryptionKey:
    """Return the public half of a key."""
    return EncryptionKey(key.public_key().public_bytes_raw())


def create() -> SigningKey:
    """Create a key in memory."""
    return SigningKey(Ed25519PrivateKey.generate())


def generate(path: Path, *, write_public: bool = True) -> SigningKey:
    """Generate a key and write it to `path` as PKCS 8 PEM, mode 0600, with the public half in `<path>.pub`.

    Raises UsageError if the file exists: a key is never overwritten.
    """
    key = create()
    try:
        durable_files.write_new(path, key.pem, 0o600)
    except FileExistsError:
        raise UsageError(f"{path}: a key exists already; move it away first to replace it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot write the key: {explain(error)}") from None
    if write_public:
        public_key_path(path).write_text(key.public.text + "\n", encoding="ascii")
    return key


def public_key_path(path: Path) -> Path:
    """Return the path of the public half of the private key at `path`."""
    return path.with_name(path.name + ".pub")


def load_private(path: Path) -> SigningKey:
    """Load a private key from a PEM file. Raises UsageError that says what is wrong with the file."""
    try:
        data = input_files.read_bytes(path)
    except FileNotFoundError:
        raise UsageError(
            f"{path}: no key here; restore it from a backup. `outstation model keygen` makes another one, which counts "
            "only where its public key is added"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {explain(error)}") from error
    return parse_private(data, path)


def parse_private(pem: bytes, path: Path | str) -> SigningKey:
    """Return a private key from the content of a PEM file. Raises UsageError with the name of the file."""
    # As `pem` writes it, without the 7 ms that the library's modules for all other formats take to import.
    content = pem.removeprefix(_PEM_BEGIN).removesuffix(_PEM_END)
    if len(pem) == len(_PEM_BEGIN) + len(content) + len(_PEM_END):
        try:
            raw = base64.b64decode(content, validate=True)
        except ValueError:
            raw = b""
        if raw.startswith(_PKCS8_HEAD) and len(raw) == len(_PKCS8_HEAD) + 32:
            return SigningKey(Ed25519PrivateKey.from_private_bytes(raw[-32:]))
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise UsageError(_explain_wrong_key(pem, path)) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path}: holds a {type(key).__name__}, an Ed25519 key is needed")
    return SigningKey(key)


def _explain_wrong_key(content: bytes, path: Path | str) -> str:
    """Return what is wrong with a file that holds no private key."""
    try:
        parse_public_key(content.decode("ascii"))
    except ValueError:
        hint = "make one with `outstation init` or `outstation model keygen`"
        return f"{path}: holds no private key in PEM without a password; {hint}"
    return f"{path}: is the public key, and the private one is needed: give {str(path).removesuffix('.pub')}"


def load_public_for(private_path: Path) -> PublicKey:
    """Load the public half of the key at `private_path`. The private key itself may be on another machine.

    Without the `.pub` file the public half is computed from the private key. Raises UsageError.
    """
    file = public_key_path(private_path)
    try:
        return parse_public_key(input_files.read_text(file, "ascii"))
    except FileNotFoundError:
        if private_path.exists():
            return load_private(private_path).public
        raise UsageError(
            f"{file}: no such file, so signatures of this key cannot be verified; copy it from the machine that made "
            f"{private_path.name}"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file}: not a readable public key ({error}); copy it again from where {private_path.name} was made, "
            f"or delete it if {private_path.name} is in the same folder"
        ) from None


def load_public(text_or_path: str) -> PublicKey:
    """Load a public key given as base64url text or as a file that holds it. Raises UsageError."""
    text = ""
    try:
        return parse_public_key(text_or_path)
    except ValueError as not_a_key:
        try:
            text = input_files.read_text(Path(text_or_path), "ascii")
            return parse_public_key(text)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "PRIVATE KEY" in text:
                hint = f"the private key, and the public one is needed: give {text_or_path}.pub"
                raise UsageError(f"{text_or_path}: is {hint}") from None
            cause = explain(error) if isinstance(error, OSError) else str(error)
            raise UsageError(
                f"{text_or_path}: neither a base64url Ed25519 key ({not_a_key}) nor a file with one ({cause}); "
                "give a file that ends in .pub, or the 43 characters in it"
            ) from None


def _check_point(raw: bytes) -> None:
    """Check that `raw` (32 bytes) is the canonical encoding of a point of large order (RFC 8032 section 5.1).

    Libraries load any 32 bytes as a key. For a key of small order an attacker can forge a signature that fits all
    messages or one in eight. A point with two spellings has two thumbprints, so that revoking one leaves the other
    valid. Raises ValueError.
    """
    y = int.from_bytes(raw, "little") & (_SIGN_BIT - 1)
    if y >= _P:
        raise ValueError("not a canonical Ed25519 public key: its coordinate exceeds the field; ask for the key again")
    if y in _SMALL_ORDER_Y:
        raise ValueError("an Ed25519 public key of small order: anybody can forge signatures; ask for the key again")
    # x² = (y² - 1) / (dy² + 1); a product is a square exactly where the quotient is.
    square = (y * y - 1) * (_D * y * y + 1) % _P
    if pow(square, (_P - 1) // 2, _P) != 1:
        raise ValueError("not an Ed25519 public key: not a point on the curve; check that it was copied completely")
