"""Enrolment request: the public halves of the keys that a device made, signed with both private halves.

The file has two lines: a JSON object, and the detached JWS of that object by the device's signing key. The object
holds a certificate signing request (PKCS 10, RFC 2986), which the TLS key signs. No private key leaves the device.

Rules of `parse`, in order:
- the file has at most 16 KiB and exactly two lines
- the object has exactly the members of `RequestBody`, each once, and names that are valid topic levels
- the JWS is by the key in the object
- the CSR is signed by an Ed25519 key that is not the signing key
"""

from __future__ import annotations

import hashlib
import hmac
from functools import cached_property
from typing import Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from outstation.foundation.errors import MessageRefused
from outstation.foundation.names import is_name
from outstation.protocol.documents.signed_document import DocumentKind, SignedDocument, read_token
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import PublicKey, SigningKey, b64url_decode, b64url_encode, parse_public_key

MAX_BYTES = 16 << 10


class RequestBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`proof`: HMAC-SHA-256 over the other members with the operator's join token; "" without a token."""

    v: Literal[1]
    fleet: str
    device: str
    key: str
    csr: str
    proof: str


_KIND = DocumentKind(RequestBody, "enrolment request", "request")


class EnrolmentRequest(msgspec.Struct, frozen=True, dict=True):
    """A verified request; `body.key` holds `key`, and `body.csr` is signed by its own key."""

    body: RequestBody
    key: PublicKey

    @cached_property
    def tls_key(self) -> Ed25519PublicKey:
        """Return the public TLS key of the CSR."""
        key = x509.load_pem_x509_csr(self.body.csr.encode()).public_key()
        assert isinstance(key, Ed25519PublicKey)
        return key

    def has_token(self, token: str) -> bool:
        """Return True if the device that made the request knows `token`."""
        # As bytes: `compare_digest` takes no text outside ASCII, and a stranger chose this one.
        return hmac.compare_digest(self.body.proof.encode(), _proof(self.body, token).encode())


def build(fleet: str, device: str, key: SigningKey, tls_key: SigningKey, token: str | None) -> bytes:
    """Build the content of a request file."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(tls_key.private, None)
    body = RequestBody(1, fleet, device, key.public.text, csr.public_bytes(Encoding.PEM).decode(), "")
    if token is not None:
        body = msgspec.structs.replace(body, proof=_proof(body, token))
    return _KIND.sign_body(key, body).to_lines()


def parse(data: bytes) -> EnrolmentRequest:
    """Verify the content of a request file. Raises MessageRefused and no other exception."""
    if len(data) > MAX_BYTES:
        raise MessageRefused("too large", f"the limit is {MAX_BYTES} bytes")
    payload, separator, token = data.removesuffix(b"\n").partition(b"\n")
    document = SignedDocument(payload, read_token(token))
    body, signer = _KIND.verify_own(document, lambda body: Signer(body.device, parse_public_key(body.key)))
    if not separator or not is_name(body.device) or not is_name(body.fleet):
        raise _KIND.refuse("needs two lines, and valid names of fleet and device")
    _check_csr(body.csr, signer.key)
    return EnrolmentRequest(body, signer.key)


def _check_csr(pem: str, key: PublicKey) -> None:
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        tls_key, is_signed = csr.public_key(), csr.is_signature_valid
    except Exception as error:
        raise MessageRefused("CSR", str(error)[:200]) from None
    if not is_signed or not isinstance(tls_key, Ed25519PublicKey):
        raise MessageRefused("CSR", "is not signed by an Ed25519 key of its own")
    if tls_key.public_bytes(Encoding.Raw, PublicFormat.Raw) == key.raw:
        raise MessageRefused("CSR", "the TLS key is the signing key; delete device-tls.key on the device")


def _proof(body: RequestBody, token: str) -> str:
    members = msgspec.json.encode(msgspec.structs.replace(body, proof=""))
    return b64url_encode(hmac.new(b64url_decode(token), members, hashlib.sha256).digest())
