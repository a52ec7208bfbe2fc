"""Detached signatures: any JOSE library accepts ours; invalid tokens are refused by the right rule."""

from __future__ import annotations

import hmac
import json
from typing import Any

import jwt
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import SigningKey, b64url_decode, b64url_encode
from outstation.workbench.testing.messages import new_key
from tests.kit.damage import flips

pytestmark = pytest.mark.attack("broker")

KEY, OTHER = new_key(1), new_key(2)
TOPIC = "outstation/acme/pi-07/health"
PAYLOAD = '{"v":1,"kind":"health","text":"Grüße"}'.encode()
TOKEN = jws.sign(KEY, TOPIC, PAYLOAD)
HEADER = {"alg": "EdDSA", "b64": False, "crit": ["b64"], "kid": KEY.public.kid, "top": TOPIC}


def find(kid: str) -> Signer | None:
    return Signer("pi-07", KEY.public) if kid == KEY.public.kid else None


def token(header: Any, payload: bytes = PAYLOAD, key: SigningKey = KEY) -> str:
    """Rightly signed under any header."""
    protected = b64url_encode(header if isinstance(header, bytes) else json.dumps(header).encode())
    return f"{protected}..{b64url_encode(key.sign(protected.encode() + b'.' + payload))}"


def with_s_plus_order(text: str) -> str:
    """The signature with the group's order added to its second half: the same number to a careless verifier."""
    protected, signature = text.split("..")
    raw = b64url_decode(signature)
    s = int.from_bytes(raw[32:], "little") + 2**252 + 27742317777372353535851937790883648493
    return f"{protected}..{b64url_encode(raw[:32] + s.to_bytes(32, 'little'))}"


def reason(tokens: list[str], topic: str = TOPIC, payload: bytes = PAYLOAD) -> str:
    with pytest.raises(MessageRefused) as refused:
        jws.verify(tokens, topic, payload, find)
    return refused.value.reason


@given(st.binary(max_size=300), st.text(max_size=60))
def test_what_was_signed_verifies(payload: bytes, topic: str) -> None:
    assert jws.verify([jws.sign(KEY, topic, payload)], topic, payload, find).owner == "pi-07"


def test_the_header_has_exactly_the_documented_members() -> None:
    protected, middle, signature = TOKEN.split(".")
    assert json.loads(b64url_decode(protected)) == HEADER
    assert middle == ""
    assert len(b64url_decode(signature)) == 64


def test_signing_the_same_twice_gives_the_same_token() -> None:
    assert jws.sign(KEY, TOPIC, PAYLOAD) == TOKEN


def test_pyjwt_verifies_our_signature() -> None:
    parsed = jwt.PyJWS().decode_complete(TOKEN, jwt.PyJWK(KEY.public.jwk).key, ["EdDSA"], detached_payload=PAYLOAD)
    assert parsed["header"] == HEADER
    assert parsed["payload"] == PAYLOAD


def test_pyjwt_refuses_our_signature_over_another_payload() -> None:
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.PyJWS().decode(TOKEN, jwt.PyJWK(KEY.public.jwk).key, ["EdDSA"], detached_payload=PAYLOAD + b" ")


def test_any_single_bit_changed_in_the_payload_is_refused() -> None:
    assert {reason([TOKEN], payload=changed) for changed in flips(PAYLOAD)} == {"bad signature"}


def test_any_single_bit_changed_in_the_topic_is_refused() -> None:
    assert {reason([TOKEN], changed.decode("latin-1")) for changed in flips(TOPIC.encode())} == {"other topic"}


def test_any_single_bit_changed_in_the_token_is_refused() -> None:
    reasons = {reason([changed.decode("latin-1")]) for changed in flips(TOKEN.encode())}
    assert reasons == {"malformed signature", "unknown key", "other topic", "bad signature"}


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        pytest.param([], "unsigned", id="none"),
        pytest.param([TOKEN, TOKEN], "several signatures", id="the same one twice"),
        pytest.param([""], "malformed signature", id="empty"),
        pytest.param([".."], "malformed signature", id="three empty parts"),
        pytest.param(
            [TOKEN.replace("..", f".{b64url_encode(PAYLOAD)}.")], "malformed signature", id="payload attached"
        ),
        pytest.param([TOKEN + "."], "malformed signature", id="a fourth part"),
        pytest.param([TOKEN + "="], "malformed signature", id="padding"),
        pytest.param([TOKEN + "\n"], "malformed signature", id="a line end"),
        pytest.param([TOKEN[:-2]], "bad signature", id="signature cut"),
        pytest.param([TOKEN.split("..")[0] + ".."], "bad signature", id="no signature"),
        pytest.param(["A" * 2049], "malformed signature", id="too long"),
        pytest.param([token({**HEADER, "top": "x" * 2000})], "malformed signature", id="too long, but well signed"),
        pytest.param([token(HEADER, key=OTHER)], "bad signature", id="another key under this kid"),
        pytest.param([with_s_plus_order(TOKEN)], "bad signature", id="the same signature in its other spelling"),
    ],
)
def test_malformed_tokens_are_refused(tokens: list[str], why: str) -> None:
    assert reason(tokens) == why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"alg": "none"}, "malformed signature"),
        ({"alg": "HS256"}, "malformed signature"),
        ({"alg": "Ed25519"}, "malformed signature"),
        ({"alg": "eddsa"}, "malformed signature"),
        ({"b64": True}, "malformed signature"),
        ({"b64": 0}, "malformed signature"),
        ({"crit": []}, "malformed signature"),
        ({"crit": ["b64", "b64"]}, "malformed signature"),
        ({"crit": ["b64", "exp"], "exp": 1}, "malformed signature"),
        ({"crit": "b64"}, "malformed signature"),
        ({"kid": OTHER.public.kid}, "unknown key"),
        ({"kid": ""}, "unknown key"),
        ({"kid": None}, "malformed signature"),
        ({"top": TOPIC + "/"}, "other topic"),
        ({"top": TOPIC.upper()}, "other topic"),
        ({"jwk": OTHER.public.jwk}, "malformed signature"),
        ({"jku": "https://example.org/keys"}, "malformed signature"),
        ({"x5c": []}, "malformed signature"),
    ],
)
def test_signed_headers_with_other_members_are_refused(change: dict[str, Any], why: str) -> None:
    assert reason([token(HEADER | change)]) == why


@pytest.mark.parametrize("member", HEADER)
def test_a_header_without_one_of_its_members_is_refused(member: str) -> None:
    assert reason([token({k: v for k, v in HEADER.items() if k != member})]) == "malformed signature"


@pytest.mark.parametrize("member", HEADER)
def test_a_header_with_a_duplicate_member_is_refused(member: str) -> None:
    good = json.dumps(HEADER)
    wrong = json.dumps({member: "none" if member == "alg" else HEADER[member]})
    for text in (wrong[:-1] + "," + good[1:], good[:-1] + "," + wrong[1:]):
        assert reason([token(text.encode())]) == "malformed signature"


def test_a_public_key_taken_for_a_shared_secret_signs_nothing() -> None:
    protected = b64url_encode(json.dumps(HEADER | {"alg": "HS256"}).encode())
    mac = hmac.digest(KEY.public.raw, protected.encode() + b"." + PAYLOAD, "sha256")
    assert reason([f"{protected}..{b64url_encode(mac)}"]) == "malformed signature"
    protected = TOKEN.split("..")[0]
    mac = hmac.digest(KEY.public.raw, protected.encode() + b"." + PAYLOAD, "sha512")
    assert reason([f"{protected}..{b64url_encode(mac)}"]) == "bad signature"


def test_a_key_that_comes_with_the_message_is_not_used() -> None:
    assert reason([token(HEADER | {"kid": OTHER.public.kid, "jwk": OTHER.public.jwk}, key=OTHER)]) == (
        "malformed signature"
    )


def test_a_revoked_key_is_refused_before_the_signature_is_looked_at() -> None:
    with pytest.raises(MessageRefused, match="revoked key"):
        jws.verify([TOKEN], TOPIC, b"", lambda kid: Signer("pi-07", KEY.public, revoked=True))


@given(st.lists(st.text(max_size=40) | st.sampled_from([TOKEN, "..", ".", "e30", "e30.."]), max_size=3))
@example(["\ud800.."])
@example(["é..é"])
def test_any_tokens_raise_message_refused_only(tokens: list[str]) -> None:
    assert tokens == [TOKEN] or reason(tokens)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*HEADER, "x"]), inner, max_size=4),
    max_leaves=8,
)


@given(JSON | st.dictionaries(st.sampled_from(list(HEADER)), JSON).map(lambda change: HEADER | change))
def test_any_header_is_refused_unless_it_says_the_same(header: Any) -> None:
    assume(header != HEADER)
    assert reason([token(header)])


@given(st.binary(max_size=60))
@example(b"[" * 100_000)
@example(b"\xff\xfe")
def test_header_bytes_that_are_no_json_are_refused(data: bytes) -> None:
    assert reason([token(data)]) in ("malformed signature", "unknown key")


def test_the_kid_of_an_unverified_token_is_readable() -> None:
    assert jws.claimed_kid(token(HEADER, key=OTHER)) == KEY.public.kid
    with pytest.raises(MessageRefused, match="malformed signature"):
        jws.claimed_kid("nothing of the kind")
