"""Time-stamp requests and tokens of RFC 3161: the only importer of `rfc3161_client`.

A token is checked for its status, its nonce, the digest in it, its policy, and for a signature whose certificate is for
time stamping and leads to a trusted one. Certificates have to be valid at the token's own time. Nobody reads revocation
lists.
"""

from __future__ import annotations

import hmac
import warnings
from collections.abc import Callable
from hashlib import sha256, sha384, sha512
from pathlib import Path
from typing import Any

import msgspec
import rfc3161_client
from cryptography import x509
from cryptography.utils import CryptographyDeprecationWarning
from rfc3161_client import HashAlgorithm, PKIStatus, TimeStampResponse, VerificationError

from outstation.evidence.timestamps.stamp import MAX_TOKEN_BYTES, Stamp
from outstation.foundation import clock, input_files
from outstation.foundation.errors import MessageRefused, UsageError

# DER tags (X.690) of an integer and of the member [0] of a structure.
_INTEGER, _CONTEXT_0 = 0x02, 0xA0
_HASHES: dict[str, Callable[[bytes], Any]] = {
    "2.16.840.1.101.3.4.2.1": sha256,
    "2.16.840.1.101.3.4.2.2": sha384,
    "2.16.840.1.101.3.4.2.3": sha512,
}


class TimestampTrust(msgspec.Struct, frozen=True):
    """Certificates that an auditor trusts, and the only policy accepted; "" accepts every policy."""

    certificates: list[x509.Certificate]
    policy: str = ""


class Timestamp(msgspec.Struct, frozen=True):
    """Content of a token: its time, epoch µs, the time's accuracy, and the authority's policy."""

    time_us: int
    accuracy_us: int
    policy: str


def load_trust(path: Path, policy: str = "") -> TimestampTrust:
    """Load a PEM file with an authority's root, and intermediates if tokens do not have them. Raises UsageError."""
    try:
        certificates = x509.load_pem_x509_certificates(input_files.read_input(path))
    except ValueError:
        raise UsageError(f"{path}: has no certificate in PEM; get the root certificate of the authority") from None
    try:
        return TimestampTrust(certificates, x509.ObjectIdentifier(policy).dotted_string if policy else "")
    except ValueError:
        raise UsageError(
            f"--timestamp-policy {policy}: not an object identifier such as 1.3.6.1.4.1.601.10.3"
        ) from None


def create_request(data: bytes) -> bytes:
    """Return the request (.tsq) for a stamp of `data`, with a random nonce; the token is to bring its certificates."""
    builder = rfc3161_client.TimestampRequestBuilder().data(data).hash_algorithm(HashAlgorithm.SHA256)
    return builder.build().as_bytes()


def check(stamp: Stamp) -> Timestamp:
    """Check that the response answers the request with a time stamp of the heads; no signature is verified.

    Raises MessageRefused that says what is wrong.
    """
    parsed = _parse(stamp.response)
    if parsed.status != PKIStatus.GRANTED:
        reason = "; ".join(parsed.status_string) or PKIStatus(parsed.status).name.lower().replace("_", " ")
        raise MessageRefused("no time stamp", f"the authority refused: {reason[:200]}")
    info = parsed.tst_info
    if info.nonce != _read_nonce(stamp.request):
        raise MessageRefused("another nonce", "the time stamp answers another request, so it may be an old one")
    hash_function = _HASHES.get(info.message_imprint.hash_algorithm.dotted_string)
    if hash_function is None:
        raise MessageRefused("hash function", f"{info.message_imprint.hash_algorithm.dotted_string} is not accepted")
    if not hmac.compare_digest(info.message_imprint.message, hash_function(stamp.heads).digest()):
        raise MessageRefused("another document", "the time stamp is of other bytes than the heads beside it")
    return _describe(parsed)


def verify(stamp: Stamp, trust: TimestampTrust) -> Timestamp:
    """Verify a response as `check` does, with its signature. Raises MessageRefused."""
    content = check(stamp)
    builder = rfc3161_client.VerifierBuilder(roots=list(trust.certificates))
    try:
        with warnings.catch_warnings():
            # Certificates that a later version of the library refuses.
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            builder.build().verify_message(_parse(stamp.response), stamp.heads)
    except (VerificationError, ValueError) as error:
        problem = f"the time stamp's signature does not lead to a trusted certificate: {str(error)[:200]}"
        raise MessageRefused("untrusted", problem) from None
    if trust.policy not in ("", content.policy):
        raise MessageRefused("policy", f"the time stamp is under {content.policy}, not {trust.policy}")
    return content


def _parse(response: bytes) -> TimeStampResponse:
    """Parse a response. Raises MessageRefused and no other exception."""
    if len(response) > MAX_TOKEN_BYTES:
        raise MessageRefused("too large", f"{len(response)} bytes, the limit for a time stamp is {MAX_TOKEN_BYTES}")
    try:
        parsed = rfc3161_client.decode_timestamp_response(_sort_certificates(response))
        PKIStatus(parsed.status)
        if parsed.status == PKIStatus.GRANTED:
            _describe(parsed)
    except (ValueError, OverflowError) as error:
        raise MessageRefused("malformed time stamp", str(error)[:200]) from None
    return parsed


def _describe(parsed: TimeStampResponse) -> Timestamp:
    info = parsed.tst_info
    accuracy = info.accuracy
    parts = (accuracy.seconds or 0, accuracy.millis or 0, accuracy.micros or 0) if accuracy is not None else (0, 0, 0)
    time_us = round(info.gen_time.timestamp() * 1e6)
    # A time that no RFC 3339 text has raises ValueError.
    clock.parse_rfc3339(clock.to_rfc3339(time_us))
    return Timestamp(time_us, parts[0] * 1_000_000 + parts[1] * 1000 + parts[2], info.policy.dotted_string)


def _read_nonce(request: bytes) -> int:
    """Return the nonce of a request, which has a version, an imprint, perhaps a policy, and then the nonce.

    Raises MessageRefused.
    """
    try:
        [whole] = _split(request)
        [nonce] = [element for element in _split(whole.content)[1:] if element.tag == _INTEGER]
    except ValueError:
        raise MessageRefused("malformed request", "the request beside the time stamp has no nonce") from None
    return int.from_bytes(nonce.content, "big", signed=True)


def _sort_certificates(response: bytes) -> bytes:
    """Return the response with its certificates in the order that DER demands of a set (X.690, 11.6).

    OpenSSL's authority writes them as it is given them, which the parser refuses. They are no part of what is signed.
    Raises ValueError.
    """
    [whole] = _split(response)
    parts = _split(whole.content)
    if len(parts) < 2:
        return response
    [_, explicit] = _split(parts[1].content)
    [signed] = _split(explicit.content)
    for element in _split(signed.content)[3:]:
        if element.tag == _CONTEXT_0:
            certificates = sorted(part.encoded for part in _split(element.content))
            return response.replace(element.content, b"".join(certificates), 1)
    return response


class _Element(msgspec.Struct, frozen=True):
    tag: int
    content: bytes
    encoded: bytes


def _split(data: bytes) -> list[_Element]:
    """Return the DER elements of a content. Raises ValueError."""
    elements, at = [], 0
    while at < len(data):
        if at + 2 > len(data):
            raise ValueError("DER: an element without a length")
        start, size = at + 2, data[at + 1]
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(data[at + 2 : start], "big")
        end = start + size
        if end > len(data):
            raise ValueError("DER: an element is longer than its content")
        elements.append(_Element(data[at], data[start:end], data[at:end]))
        at = end
    return elements
