"""Keys: RFC vectors, canonical encodings, private files that are never overwritten."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from outstation.foundation.errors import UsageError
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import PublicKey, SigningKey, b64url_decode, b64url_encode

# RFC 8037 appendix A.1 to A.4.
RFC_D = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"
RFC_X = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
RFC_THUMBPRINT = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
RFC_INPUT = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc"
RFC_SIGNATURE = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"


@pytest.fixture
def rfc_key() -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(b64url_decode(RFC_D)))


def test_key_and_thumbprint_match_rfc_8037(rfc_key: SigningKey) -> None:
    assert rfc_key.public.text == RFC_X
    assert rfc_key.public.kid == RFC_THUMBPRINT
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": RFC_X, "kid": RFC_THUMBPRINT, "alg": "EdDSA"}
    assert rfc_key.public.jwk == jwk


def test_the_signature_matches_rfc_8037(rfc_key: SigningKey) -> None:
    assert b64url_encode(rfc_key.sign(RFC_INPUT)) == RFC_SIGNATURE
    keys.parse_public_key(RFC_X).verify(b64url_decode(RFC_SIGNATURE), RFC_INPUT)
    with pytest.raises(InvalidSignature):
        keys.parse_public_key(RFC_X).verify(b64url_decode(RFC_SIGNATURE), RFC_INPUT + b"x")


@given(st.binary(max_size=100))
def test_base64url_comes_back(data: bytes) -> None:
    assert b64url_decode(b64url_encode(data)) == data


@given(st.text(alphabet="ABCQRSwxyz0189-_+/= \n\u00e9", max_size=12))
def test_bytes_have_one_spelling_only(text: str) -> None:
    try:
        data = b64url_decode(text)
    except ValueError:
        return
    assert b64url_encode(data) == text


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param(RFC_X[:-2], id="too short"),
        pytest.param(RFC_X + "AA", id="too long"),
        pytest.param(RFC_X + "=", id="padded"),
        pytest.param(RFC_X[:-1] + "p", id="last bits not zero"),
        pytest.param(RFC_X.replace("_", "/"), id="base64 of another alphabet"),
        pytest.param("\u00e9" * 43, id="not ASCII"),
    ],
)
def test_text_that_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        keys.parse_public_key(text)


def test_a_generated_key_comes_back_from_its_files(tmp_path: Path) -> None:
    made = keys.generate(tmp_path / "device.key")
    assert keys.load_private(tmp_path / "device.key").public.raw == made.public.raw
    assert keys.load_public(str(tmp_path / "device.key.pub")).raw == made.public.raw
    assert keys.load_public(made.public.text).kid == made.public.kid
    assert keys.generate(tmp_path / "other.key").public.raw != made.public.raw


def test_a_key_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keys.generate(tmp_path / "device.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "device.key").stat().st_mode) == 0o600


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    keys.generate(path)
    before = path.read_bytes(), (tmp_path / "device.key.pub").read_bytes()
    with pytest.raises(UsageError, match="a key exists already; move it away"):
        keys.generate(path)
    assert (path.read_bytes(), (tmp_path / "device.key.pub").read_bytes()) == before


def test_a_key_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "device.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="a key exists already"):
        keys.generate(tmp_path / "device.key")
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_in_a_missing_folder_is_one_line_of_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the key: No such file"):
        keys.generate(tmp_path / "nowhere" / "device.key")


def test_a_missing_key_file_is_to_be_restored_since_nobody_trusts_another_one(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no key here; restore it from a backup\. `outstation model keygen` makes another"
    ):
        keys.load_private(tmp_path / "device.key")


def test_a_private_key_of_another_kind_is_named(tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "rsa.key").write_bytes(pem)
    with pytest.raises(UsageError, match=r"holds a RSAPrivateKey, an Ed25519 key is needed"):
        keys.load_private(tmp_path / "rsa.key")


def test_a_private_key_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    locked = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password")
    )
    for content in (b"", b"not a key", locked, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(UsageError, match="no private key in PEM without a password"):
            keys.load_private(tmp_path / "key")
    with pytest.raises(UsageError, match="cannot be read"):
        keys.load_private(tmp_path)


def test_a_private_key_in_place_of_the_public_one_is_recognized_and_the_reverse(tmp_path: Path) -> None:
    keys.generate(tmp_path / "k.key")
    with pytest.raises(UsageError, match=r"is the private key.* give .*k\.key\.pub"):
        keys.load_public(str(tmp_path / "k.key"))
    with pytest.raises(UsageError, match=r"is the public key.* give .*k\.key$"):
        keys.load_private(tmp_path / "k.key.pub")


def test_an_invalid_public_key_argument_names_both_forms(tmp_path: Path) -> None:
    (tmp_path / "empty.pub").write_text("")
    (tmp_path / "binary.pub").write_bytes(b"\xff\xfe")
    for given_key in ("nonsense", str(tmp_path / "empty.pub"), str(tmp_path / "binary.pub"), str(tmp_path), "a\0b"):
        with pytest.raises(UsageError, match=r"neither a base64url Ed25519 key .* nor a file with one"):
            keys.load_public(given_key)


P = 2**255 - 19
# The eight points of small order (RFC 8032 section 5.1 has the curve), and each number that names one of them again.
ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
SMALL = [y + sign for y in (0, 1, P - 1, P, P + 1, ORDER_8, P - ORDER_8) for sign in (0, 2**255)]


@pytest.mark.parametrize("number", SMALL, ids=hex)
def test_a_key_for_which_anybody_can_sign_is_refused(number: int) -> None:
    text = b64url_encode(number.to_bytes(32, "little"))
    with pytest.raises(ValueError, match=r"small order|canonical"):
        keys.parse_public_key(text)
    with pytest.raises(UsageError, match=r"small order|canonical"):
        keys.load_public(text)


def test_the_library_accepts_forgeries_for_small_order_keys() -> None:
    identity = PublicKey((1).to_bytes(32, "little"))
    forged = (1).to_bytes(32, "little") + bytes(32)
    identity.verify(forged, b"any message at all")
    with pytest.raises(ValueError, match="small order"):
        keys.parse_public_key(identity.text)


@pytest.mark.parametrize("number", [*range(P, 2**255), *range(P + 2**255, 2**256)])
def test_a_non_canonical_key_encoding_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="canonical"):
        keys.parse_public_key(b64url_encode(number.to_bytes(32, "little")))


@given(st.integers(0, 2**256 - 1))
def test_half_of_all_numbers_are_points_on_the_curve(number: int) -> None:
    raw = number.to_bytes(32, "little")
    refusal = ""
    try:
        assert keys.parse_public_key(b64url_encode(raw)).raw == raw
    except ValueError as refused:
        refusal = str(refused)
    assert not refusal or re.search(r"not a point on the curve|small order|canonical", refusal)


@given(st.binary(min_size=32, max_size=32))
def test_every_key_that_is_made_is_taken(seed: bytes) -> None:
    made = SigningKey(Ed25519PrivateKey.from_private_bytes(seed)).public
    assert keys.parse_public_key(made.text).kid == made.kid


def test_a_public_key_loads_from_its_file_or_the_private_key(tmp_path: Path) -> None:
    private = tmp_path / "collector.key"
    made = keys.generate(private)
    stored = private.rename(tmp_path / "elsewhere")
    assert keys.load_public_for(private).raw == made.public.raw
    keys.public_key_path(private).unlink()
    with pytest.raises(UsageError, match=r"collector\.key\.pub: no such file, .* copy it from"):
        keys.load_public_for(private)
    stored.rename(private)
    assert keys.load_public_for(private).raw == made.public.raw
    keys.public_key_path(private).write_text("no key\n")
    with pytest.raises(UsageError, match=r"collector\.key\.pub: not a readable public key"):
        keys.load_public_for(private)
