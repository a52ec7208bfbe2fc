"""Enrolment request: only the device that holds both private keys can make it, and no bytes break the parser."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from outstation.fleet.enrolment.enrol import read_request
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.protocol.documents.enrolment_request import RequestBody, build, parse
from outstation.protocol.wire import jws
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.testing.messages import new_key

pytestmark = pytest.mark.attack("enrolment")

KEY, TLS_KEY, THIEF = new_key(1), new_key(2), new_key(3)
GOOD = build("acme", "pi-07", KEY, TLS_KEY, None)
TOKEN = "AAECAwQFBgcICQoLDA0ODw"


def altered(signer: SigningKey = KEY, domain: str = "enrolment request", **changes: object) -> bytes:
    """Return the request with changed members, signed by `signer`."""
    body = msgspec.structs.replace(msgspec.json.decode(GOOD.split(b"\n")[0], type=RequestBody), **changes)
    payload = msgspec.json.encode(body)
    return payload + b"\n" + jws.sign(signer, domain, payload).encode() + b"\n"


def csr_of(signer: SigningKey) -> str:
    return parse(build("acme", "pi-07", new_key(9), signer, None)).body.csr


def test_a_request_holds_public_keys_and_proves_both() -> None:
    request = parse(GOOD)
    assert (request.body.fleet, request.body.device, request.key.kid) == ("acme", "pi-07", KEY.public.kid)
    assert request.tls_key == TLS_KEY.private.public_key()
    assert b"PRIVATE" not in GOOD
    assert not any(base64.b64encode(key.private.private_bytes_raw()) in GOOD for key in (KEY, TLS_KEY))


def test_a_request_proves_the_token_only_with_all_of_its_members() -> None:
    request = parse(build("acme", "pi-07", KEY, TLS_KEY, TOKEN))
    assert request.has_token(TOKEN)
    assert not request.has_token("AAECAwQFBgcICQoLDA0ODg")
    assert not parse(GOOD).has_token(TOKEN)
    stolen = altered(THIEF, key=THIEF.public.text, csr=csr_of(new_key(4)), proof=request.body.proof)
    assert not parse(stolen).has_token(TOKEN)
    for proof in ("é", "\U0001f511" * 43):
        assert not parse(altered(proof=proof)).has_token(TOKEN)
    assert TOKEN.encode() not in build("acme", "pi-07", KEY, TLS_KEY, TOKEN)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (altered(THIEF), "unknown key"),
        (altered(domain="outstation/acme/pi-07/audit"), "other topic"),
        (GOOD.replace(b"pi-07", b"pi-08", 1), "bad signature"),
        (altered(csr=csr_of(KEY)), "the TLS key is the signing key"),
        (altered(device="../x"), "valid names"),
        (altered(csr="-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----"), "CSR"),
        (GOOD.split(b"\n")[0], "malformed"),
        (GOOD + b"x" * 20_000, "too large"),
        (b'{"v":1,' + GOOD[1:], "malformed"),
    ],
)
def test_an_altered_request_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(MessageRefused, match=problem):
        parse(data)


@pytest.mark.attack("enrolment", control=True)
def test_a_parser_that_verifies_no_signature_takes_anothers_key_for_a_thiefs_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jws, "verify", lambda *_: None)
    renamed = parse(GOOD.replace(b"pi-07", b"pi-08", 1))
    assert (renamed.body.device, renamed.key.kid) == ("pi-08", KEY.public.kid)


def test_a_certificate_request_of_another_kind_of_key_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    with pytest.raises(MessageRefused, match="Ed25519"):
        parse(altered(csr=made.public_bytes(Encoding.PEM).decode()))


@given(st.binary(max_size=200), st.integers(0, len(GOOD)))
def test_no_bytes_break_the_parser(junk: bytes, place: int) -> None:
    for data in (junk, GOOD[:place] + junk, GOOD[:place] + junk + GOOD[place + len(junk) :]):
        if data.rstrip(b"\n") != GOOD.rstrip(b"\n"):
            with pytest.raises(MessageRefused):
                parse(data)


def test_a_file_that_is_no_request_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(UsageError, match=rf"{tmp_path / 'x'}: not a valid enrolment request .*outstation request"):
        read_request(tmp_path / "x")
