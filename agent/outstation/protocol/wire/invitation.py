"""Invitation: a one-time code with which a new device reaches the broker, and a MAC for what both sides say there.

The operator makes the code and brings it to the device by another way than the broker. It holds the broker's address,
the fleet's certificate authority, the certificate of an account that may only ask and hear the answer, and a secret of
128 bits. The secret is the join token that proves the enrolment request. It also gives the account's TLS key and
authenticates the answer, so that the broker can neither ask in the device's name nor answer in the operator's.
"""

from __future__ import annotations

import hashlib
import hmac
import re

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from outstation.foundation import decoders
from outstation.foundation.names import is_name
from outstation.protocol.wire.keys import SigningKey, b64url_decode, b64url_encode

# Not below the topics of the fleet: no viewer and no other program of the fleet receives these messages.
_ROOT = "outstation-join"
_PREFIX = "oj1-"
_MAX_CODE_CHARS = 8192
_SECRET_BYTES, _CHECK_BYTES, MAC_BYTES = 16, 4, 32
_ACCOUNT = re.compile(r"_join-[0-9a-f]{16}")
# First bytes of what the secret authenticates. A request's proof is over JSON, which begins with a brace.
_TLS_KEY, _ANSWER, _RECEIPT = b"tls key\0", b"answer\0", b"receipt\0"
# First bytes of an answer: the files of the enrolment, or the reason why the operator's side refused.
FILES, REFUSAL = b"files\0", b"refusal\0"
CONTENT_TYPE = "application/octet-stream"


class Invitation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Content of a code. `authority` and `certificate` are DER, the latter of the broker's client `account`."""

    fleet: str
    device: str
    broker: str
    account: str
    token: str
    authority: bytes
    certificate: bytes

    @property
    def code(self) -> str:
        content = msgspec.msgpack.encode(self)
        return _PREFIX + b64url_encode(hashlib.sha256(content).digest()[:_CHECK_BYTES] + content)

    @property
    def request_topic(self) -> str:
        return build_topic(self.fleet, self.account, "request")

    @property
    def answer_topic(self) -> str:
        return build_topic(self.fleet, self.account, "answer")

    @property
    def client_files(self) -> dict[str, bytes]:
        """Return the PEM of the authority, the client certificate and its key, by the names of [broker] keys."""
        authority, certificate = map(x509.load_der_x509_certificate, (self.authority, self.certificate))
        return {
            "ca_file": authority.public_bytes(Encoding.PEM),
            "cert_file": certificate.public_bytes(Encoding.PEM),
            "tls_key_file": derive_tls_key(self.token).pem,
        }


def parse(code: str) -> Invitation:
    """Parse a code, which may have been wrapped. Raises ValueError that says what is wrong with it."""
    text = "".join(code.split())
    if not text.startswith(_PREFIX) or len(text) > _MAX_CODE_CHARS:
        raise ValueError(f"is no invitation: it begins with {_PREFIX} and has at most {_MAX_CODE_CHARS} characters")
    try:
        data = b64url_decode(text.removeprefix(_PREFIX))
        check, content = data[:_CHECK_BYTES], data[_CHECK_BYTES:]
        if check != hashlib.sha256(content).digest()[:_CHECK_BYTES]:
            raise ValueError("characters are missing or wrong")
        invitation = decoders.from_msgpack(content, Invitation)
        _ = invitation.client_files
        secret = b64url_decode(invitation.token)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise ValueError(f"cannot be read: {error}; copy it completely") from None
    names = is_name(invitation.fleet) and is_name(invitation.device)
    if not names or not _ACCOUNT.fullmatch(invitation.account) or len(secret) != _SECRET_BYTES:
        raise ValueError("names no device, or has no secret; ask for another one")
    return invitation


def build_topic(fleet: str, account: str, kind: str) -> str:
    """Return the topic of requests or answers of an account, or of all with `+`."""
    return f"{_ROOT}/{fleet}/{account}/{kind}"


def parse_account(topic: str) -> str:
    """Return the account of a request's topic, "" for another topic."""
    levels = topic.split("/")
    return levels[2] if len(levels) == 4 and levels[0] == _ROOT and levels[3] == "request" else ""


def derive_tls_key(token: str) -> SigningKey:
    """Return the account's TLS key."""
    return SigningKey(Ed25519PrivateKey.from_private_bytes(_compute_mac(token, _TLS_KEY)))


def seal_answer(token: str, request: bytes, content: bytes) -> bytes:
    """Return an answer to `request`: a MAC over both, then the content."""
    return _compute_mac(token, _ANSWER, request, content) + content


def open_answer(token: str, request: bytes, answer: bytes) -> bytes | None:
    """Return the content of an answer to `request`; None if the holder of the token did not make it."""
    mac, content = answer[:MAC_BYTES], answer[MAC_BYTES:]
    return content if hmac.compare_digest(mac, _compute_mac(token, _ANSWER, request, content)) else None


def build_receipt(token: str, answer: bytes) -> bytes:
    """Return what the device sends once it has the answer."""
    return _compute_mac(token, _RECEIPT, answer)


def _compute_mac(token: str, *parts: bytes) -> bytes:
    """Return HMAC-SHA-256 over a label and the digests of the parts behind it."""
    label, *data = parts
    return hmac.digest(b64url_decode(token), label + b"".join(hashlib.sha256(part).digest() for part in data), "sha256")
