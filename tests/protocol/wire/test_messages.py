"""Message verification: vectors, attacks, and every rule of the wire format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st

from outstation.foundation import clock
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire import jws, log_chain, messages, topics, verification
from outstation.protocol.wire.jws import MAX_PAYLOAD, Signer
from outstation.protocol.wire.keys import SigningKey, b64url_decode
from outstation.protocol.wire.messages import AckPayload, DriftPayload, HealthPayload, ResultsPayload
from outstation.protocol.wire.times import Rfc3339
from outstation.protocol.wire.topics import KINDS, Topic
from outstation.protocol.wire.verification import VerifiedMessage, verify_message
from outstation.workbench.testing.messages import QUIET_FIELD, MessageSender, SignedMessage, new_key
from tests.kit.damage import flips

VECTORS = Path(__file__).parents[2] / "kit" / "vectors.json"
DEVICE, COLLECTOR = new_key(1), new_key(2)


def find(kid: str) -> Signer | None:
    known = {
        DEVICE.public.kid: Signer("pi-07", DEVICE.public),
        COLLECTOR.public.kid: Signer("collector", COLLECTOR.public),
    }
    return known.get(kid)


def signed(topic: str, payload: bytes | dict[str, Any], key: SigningKey = DEVICE) -> VerifiedMessage:
    """The message, opened, after it was rightly signed."""
    data = payload if isinstance(payload, bytes) else jws.encode(payload)
    return verify_message(topic, data, [jws.sign(key, topic, data)], find)


def members(sent: SignedMessage) -> dict[str, Any]:
    return dict(json.loads(sent.payload))


LOG = "c1ca3d20-b49b-46bd-b015-d5324e989d47"


def sender() -> MessageSender:
    return MessageSender(key=DEVICE, log=LOG)


RESULTS = members(sender().results())
RESULTS_TOPIC = "outstation/acme/pi-07/results/exercise"
HEALTH = members(sender().health())
HEALTH_TOPIC = "outstation/acme/pi-07/health"
ACK = {"v": 1, "kind": "ack", "device": "pi-07", "log": LOG, "through": 9, "missing": [[2, 3]], "time": HEALTH["time"]}
ACK_TOPIC = "outstation/acme/pi-07/ack"

# --- the vectors that every implementation must agree on ---

WHY = {
    "payload altered": "bad signature",
    "other topic": "other topic",
    "no crit": "malformed signature",
    "unknown crit": "malformed signature",
    "alg none": "malformed signature",
    "alg not the key's": "malformed signature",
    "unknown kid": "unknown key",
    "no top": "malformed signature",
    "b64 true": "malformed signature",
    "attached payload": "malformed signature",
    "signature cut": "malformed signature",
    "payload of another device, rightly signed by this key": "other device",
    "a run of 10^18 rows": "malformed payload",
    "a run past the last row number": "malformed payload",
    "columns of different lengths once expanded": "malformed payload",
    "a run down to row 0": "malformed payload",
}


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    return dict(json.loads(VECTORS.read_text(encoding="utf-8")))


def open_vector(vectors: dict[str, Any], vector: dict[str, str]) -> VerifiedMessage:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(b64url_decode(vectors["jwk"]["d"]))).public
    assert key.kid == vectors["kid"]
    signer = Signer(vectors["device"], key)
    return verify_message(vector["topic"], vector["payload"].encode(), [vector["jws"]], {key.kid: signer}.get)


def test_the_vectors_verify_and_are_chained(vectors: dict[str, Any]) -> None:
    opened = [open_vector(vectors, vector) for vector in vectors["accept"]]
    assert [m.topic.kind for m in opened] == ["results", "drift", "alerts", "state", "ack"]
    log = [m for m in opened if isinstance(m.body, messages.LoggedPayload)]
    assert [m.body.prev for m in log[1:]] == [log_chain.digest(m.payload) for m in log[:-1]]  # type: ignore[union-attr]


def test_our_signatures_equal_those_of_the_vectors(vectors: dict[str, Any]) -> None:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(b64url_decode(vectors["jwk"]["d"])))
    signatures = [jws.sign(key, vector["topic"], vector["payload"].encode()) for vector in vectors["accept"]]
    assert signatures == [vector["jws"] for vector in vectors["accept"]]
    assert len(signatures) == 5


@pytest.mark.parametrize("why", WHY)
def test_an_invalid_vector_is_refused_for_its_reason(vectors: dict[str, Any], why: str) -> None:
    (vector,) = [v for v in vectors["reject"] if v["why"] == why]
    with pytest.raises(MessageRefused) as refused:
        open_vector(vectors, vector)
    assert refused.value.reason == WHY[why]


def test_every_vector_is_tested(vectors: dict[str, Any]) -> None:
    assert {v["why"] for v in vectors["reject"]} == set(WHY)


# --- messages of a device ---


@pytest.mark.parametrize(
    "kind", ["results", "drift", "alert", "quality", "health", "health_with_cursor", "evicted", "state"]
)
def test_every_kind_of_a_device_verifies(kind: str) -> None:
    device = sender()
    sent = device.evicted((1, 2)) if kind == "evicted" else getattr(device, kind)()
    message = verify_message(sent.topic, sent.payload, [sent.jws], find)
    assert (str(message.topic), message.payload, message.signer.owner) == (sent.topic, sent.payload, "pi-07")
    assert message.body.device == "pi-07"


def test_an_acknowledgement_verifies() -> None:
    body = signed(ACK_TOPIC, ACK, COLLECTOR).body
    assert isinstance(body, AckPayload)
    assert (body.through, body.missing) == (9, [(2, 3)])


def test_unknown_members_are_ignored() -> None:
    assert isinstance(signed(HEALTH_TOPIC, HEALTH | {"humidity": {"deep": [1]}}).body, HealthPayload)


def test_a_non_finite_score_arrives_as_null() -> None:
    columns = RESULTS["columns"] | {"score": [float("nan"), 0.5, float("inf")]}
    body = signed(RESULTS_TOPIC, RESULTS | {"columns": columns}).body
    assert isinstance(body, ResultsPayload)
    assert body.columns.score == [None, 0.5, None]


# --- attacks ---


def test_any_flipped_bit_is_refused() -> None:
    sent = sender().health()
    attempts = [
        *((sent.topic, payload, sent.jws) for payload in flips(sent.payload)),
        *((topic.decode("latin-1"), sent.payload, sent.jws) for topic in flips(sent.topic.encode())),
        *((sent.topic, sent.payload, token.decode("latin-1")) for token in flips(sent.jws.encode())),
    ]
    for topic, payload, token in attempts:
        with pytest.raises(MessageRefused):
            verify_message(topic, payload, [token], find)


def refusal(topic: str, payload: bytes | dict[str, Any], key: SigningKey = DEVICE) -> str:
    with pytest.raises(MessageRefused) as refused:
        signed(topic, payload, key)
    return refused.value.reason


@pytest.mark.parametrize(
    ("topic", "payload", "why"),
    [
        pytest.param("outstation/acme/pi-08/health", HEALTH | {"device": "pi-08"}, "other device", id="as a neighbour"),
        pytest.param("outstation/acme/pi-08/health", HEALTH, "other device", id="on a neighbour's topic"),
        pytest.param(HEALTH_TOPIC, HEALTH | {"device": "pi-08"}, "other device", id="about a neighbour"),
        pytest.param(ACK_TOPIC, ACK | {"device": "pi-08"}, "other device", id="an acknowledgement for a neighbour"),
        pytest.param("outstation/acme/pi-07/audit", HEALTH, "other kind", id="of another kind"),
        pytest.param("outstation/acme/pi-07/results/other", RESULTS, "other task", id="of another task"),
        pytest.param("outstation/acme/pi-07/nothing", HEALTH, "topic", id="on a topic that is not there"),
        pytest.param(HEALTH_TOPIC, b" " * (MAX_PAYLOAD + 1), "too large", id="too large"),
        pytest.param(HEALTH_TOPIC, b"", "malformed payload", id="empty"),
        pytest.param(HEALTH_TOPIC, b"[]", "malformed payload", id="no object"),
        pytest.param(HEALTH_TOPIC, b"\xff", "malformed payload", id="not UTF-8"),
        pytest.param(HEALTH_TOPIC, b'{"kind":"health",' * 2, "malformed payload", id="cut short"),
        pytest.param(HEALTH_TOPIC, b'{"a":' * 50_000, "malformed payload", id="nested without end"),
        pytest.param(HEALTH_TOPIC, b" " * (10 << 20), "too large", id="ten megabytes"),
        pytest.param(HEALTH_TOPIC, b"\xef\xbb\xbf" + jws.encode(HEALTH), "malformed payload", id="byte order mark"),
        pytest.param(HEALTH_TOPIC, json.dumps(HEALTH).encode("utf-16"), "malformed payload", id="UTF-16"),
        pytest.param(HEALTH_TOPIC, jws.encode(HEALTH) + b"\0", "malformed payload", id="NUL after the end"),
        pytest.param(HEALTH_TOPIC, jws.encode(HEALTH) + b"{}", "malformed payload", id="two objects"),
    ],
)
def test_a_signed_message_on_a_wrong_topic_is_refused(topic: str, payload: bytes | dict[str, Any], why: str) -> None:
    assert refusal(topic, payload) == why


@pytest.mark.parametrize(
    "more",
    [
        b'"x":NaN',
        b'"x":-Infinity',
        b'"x":01',
        b'"x":"\\ud800"',
        b'"x":"\xff"',
        b'"\xff":1',
        b'"x":"\xed\xa0\x80"',
        b'"x":"\xc0\xaf"',
        b'"x":"\0"',
        b'"x":"a\nb"',
        b'"outbox":' + b"[" * 5_000 + b"]" * 5_000,
        b'"streams":{"watch":{"rows":1e999}}',
        b'"streams":{"watch":{"rows":' + b"9" * 5_000 + b"}}",
    ],
    ids=lambda more: more[:24].decode("latin-1"),
)
def test_ambiguous_json_is_refused_in_any_member(more: bytes) -> None:
    whole = jws.encode({k: v for k, v in HEALTH.items() if k not in ("streams", "outbox")})
    assert refusal(HEALTH_TOPIC, whole[:-1] + b"," + more + b"}") == "malformed payload"


def twice(payload: str) -> Iterator[str]:
    """The payload with each member of each of its objects there twice, one at a time."""
    for match in re.finditer(r'(?<=[{,])"[^"]*":', payload):
        _, end = json.JSONDecoder().raw_decode(payload, match.end())
        yield payload[: match.start()] + payload[match.start() : end] + "," + payload[match.start() :]


@pytest.mark.parametrize(
    "kind", ["results", "drift", "alert", "quality", "health", "health_with_cursor", "evicted", "state"]
)
def test_a_duplicate_key_is_refused_at_any_depth(kind: str) -> None:
    device = sender()
    sent = device.evicted((1, 2)) if kind == "evicted" else getattr(device, kind)()
    attempts = list(twice(sent.payload.decode()))
    assert len(attempts) > 5
    assert {json.dumps(json.loads(text)) for text in attempts} == {json.dumps(json.loads(sent.payload))}
    assert {refusal(sent.topic, text.encode()) for text in attempts} == {"duplicate key"}


def test_a_duplicate_key_in_an_acknowledgement_is_refused() -> None:
    payload = jws.encode(ACK)
    assert refusal(ACK_TOPIC, payload.replace(b'"through":9', b'"through":3,"through":9'), COLLECTOR) == "duplicate key"


def test_a_duplicate_key_next_to_large_columns_is_refused() -> None:
    n = 3000
    many = {"row": list(range(1, n + 1)), "t": [10**15] * n, "label": ["PEN"] * n}
    payload = jws.encode(RESULTS | {"rows": [1, n], "n": n, "columns": many})
    assert isinstance(signed(RESULTS_TOPIC, payload).body, ResultsPayload)
    assert refusal(RESULTS_TOPIC, payload.replace(b'"label":', b'"row":[1],"label":')) == "malformed payload"
    assert refusal(RESULTS_TOPIC, payload.replace(b'"label":', b'"t":[1],"label":')) == "malformed payload"
    assert refusal(RESULTS_TOPIC, payload.replace(b'"t":', b'"t":[1],"t":')) == "duplicate key"


QUIET_TIME = 1_795_000_000_000_000


def quiet_run(window: dict[str, Any] | None = None, field: dict[str, Any] = QUIET_FIELD, **columns: Any) -> Any:
    """A message of three quiet windows of 2000 rows."""
    return members(sender().quiet_run(window, field, **columns))


DRIFT_TOPIC = "outstation/acme/pi-07/drift/exercise"


def test_a_run_of_quiet_windows_is_read() -> None:
    body = signed(DRIFT_TOPIC, quiet_run()).body
    assert isinstance(body, DriftPayload)
    assert body.windows is not None
    assert body.windows.expand_rows() == [(1, 2000), (2001, 4000), (4001, 6000)]
    assert body.windows.expand_times()[2] == (QUIET_TIME + 80_000_000, QUIET_TIME + 119_999_999)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (quiet_run(first=[[1, 2000, 2]]), "column first has 2 entries, nearest has 3"),
        (quiet_run(to=[1, 2]), "column to has 2 entries, nearest has 3"),
        (quiet_run(n=[[2000, 0, 9]]), "column n has 9 entries, nearest has 3"),
        (quiet_run(nearest=[0.5]), "length >= 2"),
        (quiet_run(nearest=[0.1, 0.2, 1.5]), "<= 1"),
        (quiet_run(nearest=[0.1] * 600, first=[[1, 1, 600]]), "length <= 512"),
        (quiet_run(first=[1, 1999, 4001]), "rows [1999,4000] of a window do not come after row 2000"),
        (quiet_run(first=[[4001, -2000, 3]], last=[[6000, -2000, 3]]), "rows [2001,4000] of a window do not come"),
        (quiet_run(last=[2000, 1, 6000]), "rows [2001,1] of a window"),
        (quiet_run(first=[[1, 2**53 - 2, 3]]), "beyond 1 to"),
        (quiet_run(n=[2001, 1999, 2000]), "2001 rows in rows [1,2000]"),
        (quiet_run(n=[1900, 2000, 2000]), "n is 6000, but its windows have 5900 rows"),
        (quiet_run({"rows": [1, 9000]}), "rows [1, 9000], but its windows have rows [1,6000]"),
        (quiet_run({"to": "2026-11-24T22:18:01Z"}), "time 2026-11-24T22:18:01Z, but its windows have"),
        (quiet_run({"from": "2026-13-41T22:18:01Z"}), "at `$.window.from`"),
        (quiet_run({"n": 5900}), "n is 5900, but its windows have 6000 rows"),
        (quiet_run(field=QUIET_FIELD | {"missing": 11}), "counts of field ax add up to 6001 rows, n is 6000"),
        (quiet_run(field=QUIET_FIELD | {"counts": "many"}), "field ax of a run has no counts"),
        (quiet_run(field={"state": "ok"}), "field ax of a run has no counts"),
        (quiet_run() | {"state": "drift"}, "3 windows in state 'drift'; only quiet ones share a message"),
        (quiet_run() | {"windows": []}, "Expected `object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_of_windows_that_contradicts_itself_is_refused(message: dict[str, Any], why: str) -> None:
    with pytest.raises(MessageRefused) as refused:
        signed(DRIFT_TOPIC, message)
    assert refused.value.reason == "malformed payload"
    assert why in str(refused.value)


def test_the_collector_key_cannot_sign_for_a_device() -> None:
    assert refusal(HEALTH_TOPIC, HEALTH, COLLECTOR) == "other device"


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"v": "1"},
        {"kind": "gossip"},
        {"device": None},
        {"device": "x" * 257},
        {"log": "not a uuid"},
        {"log": LOG.upper() + "\n"},
        {"log": LOG + "\n"},
        {"seq": 0},
        {"seq": -1},
        {"seq": 1.5},
        {"seq": True},
        {"seq": 2**53},
        {"prev": None},
        {"prev": "x" * 65},
        {"boot": -1},
        {"time": "yesterday"},
        {"time": "2026-11-24T22:18:01"},
        {"time": "2026-11-24T22:18:01Z\n"},
        {"clock": "fine"},
        {"streams": {"watch": 3}},
    ],
    ids=str,
)
def test_a_member_of_a_wrong_type_is_refused(change: dict[str, Any]) -> None:
    assert refusal(HEALTH_TOPIC, HEALTH | change) == "malformed payload"


@pytest.mark.parametrize("member", ["v", "kind", "device", "log", "seq", "prev", "boot", "time", "clock"])
def test_a_missing_common_member_is_refused(member: str) -> None:
    assert refusal(HEALTH_TOPIC, {k: v for k, v in HEALTH.items() if k != member}) == "malformed payload"


def columns(**change: Any) -> dict[str, Any]:
    return {"columns": RESULTS["columns"] | change}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"rows": [9, 3]}, id="rows backwards"),
        pytest.param({"rows": [0, 300]}, id="row 0"),
        pytest.param({"rows": [1, 2, 3]}, id="three row numbers"),
        pytest.param({"rows": [1, 2**60]}, id="row numbers no float holds"),
        pytest.param({"n": 2}, id="more results than n"),
        pytest.param({"n": -1}, id="n below 0"),
        pytest.param(columns(t=[1, 2]), id="a column too short"),
        pytest.param(columns(label=["PEN"] * 4), id="a column too long"),
        pytest.param(columns(score=[0.1]), id="scores missing"),
        pytest.param(columns(value=[]), id="values missing"),
        pytest.param(columns(row=[-1, 2, 3]), id="a row before the first"),
        pytest.param(columns(row=[1, 2, "3"]), id="a row in text"),
        pytest.param(columns(label=["PEN", 1, "ABD"]), id="a label that is a number"),
        pytest.param(columns(t=[1, 2, 2**70]), id="a time no database holds"),
        pytest.param({"columns": None}, id="no columns"),
        pytest.param({"model": {"name": "exercise"}}, id="a model without its digest"),
    ],
)
def test_inconsistent_results_are_refused(change: dict[str, Any]) -> None:
    assert refusal(RESULTS_TOPIC, RESULTS | change) == "malformed payload"


@pytest.mark.parametrize(
    "missing", [[[3, 2]], [[5, 6], [1, 2]], [[9, 10]], [[0, 1]], [[1]], [[1, 2, 3]], [[4, 4], [3, 5]]]
)
def test_invalid_missing_ranges_are_refused(missing: list[list[int]]) -> None:
    assert refusal(ACK_TOPIC, ACK | {"missing": missing}, COLLECTOR) == "malformed payload"


@given(
    st.text(max_size=60) | st.sampled_from([HEALTH_TOPIC, RESULTS_TOPIC]), st.binary(max_size=200), st.lists(st.text())
)
def test_any_input_raises_message_refused_only(topic: str, payload: bytes, tokens: list[str]) -> None:
    with pytest.raises(MessageRefused):
        verify_message(topic, payload, tokens, find)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from([(HEALTH_TOPIC, HEALTH), (RESULTS_TOPIC, RESULTS), (ACK_TOPIC, ACK)]), st.data())
def test_a_signed_payload_with_changed_members_is_decoded_or_refused(
    message: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    topic, whole = message
    change = data.draw(st.dictionaries(st.sampled_from([*whole, "extra"]), JSON, min_size=1, max_size=3))
    try:
        outcome = signed(topic, whole | change).body.device
    except MessageRefused as refused:
        outcome = refused.reason
    assert outcome in ("pi-07", "malformed payload", "other kind", "other device", "other task")


@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"kind":"health"}\x00')
def test_signed_random_bytes_are_refused(payload: bytes) -> None:
    assert refusal(HEALTH_TOPIC, payload) == "malformed payload"


# --- what goes out ---


def test_a_payload_is_flat_readable_json_in_the_order_given() -> None:
    assert jws.encode({"v": 1, "text": "Grüße", "nan": float("nan")}) == '{"v":1,"text":"Grüße","nan":null}'.encode()


def test_the_digest_is_the_base64url_sha256_of_the_payload() -> None:
    assert jws.digest(b"") == "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"


def test_cloudevents_attributes() -> None:
    topic = Topic("acme", "pi-07", "results", "exercise")
    assert dict(topics.cloudevent_properties(topic, "pi-07/log/1", "2026-11-24T22:18:01Z")) == {
        "specversion": "1.0",
        "id": "pi-07/log/1",
        "source": "outstation/acme/pi-07",
        "type": "outstation.results.v1",
        "time": "2026-11-24T22:18:01Z",
    }


# --- the table of kinds ---


def test_every_kind_has_one_matching_payload() -> None:
    payloads = {body.__struct_config__.tag: body for body in get_args(messages.Body)}
    assert payloads.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        assert issubclass(payloads[name], messages.LoggedPayload) == kind.logged
        assert ("task" in payloads[name].__struct_fields__) == kind.per_task
        assert not (kind.to_device and kind.logged)


def test_no_union_has_both_limits_and_tuples() -> None:
    """msgspec 0.22 reads past the end of its type information there, and decoding crashes."""

    def unions(schema: Any) -> Iterator[list[dict[str, Any]]]:
        for value in schema if isinstance(schema, list) else schema.values() if isinstance(schema, dict) else ():
            yield from unions(value)
        if isinstance(schema, dict) and "anyOf" in schema:
            yield schema["anyOf"]

    alternatives = list(unions(msgspec.json.schema(messages.Body)))
    assert len(alternatives) > 10
    assert not [union for union in alternatives if any("prefixItems" in member for member in union)]


TIMES = st.builds(
    "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}{}Z".format,
    *(st.integers(0, 10_000), st.integers(0, 13), st.integers(0, 32), st.integers(0, 25), st.integers(0, 61)),
    *(st.integers(0, 61), st.sampled_from(["", ".5", ".123456789", ".", ".1234567890"])),
)


@given(text=TIMES)
@example("2024-02-29T00:00:00Z")
@example("1900-02-29T00:00:00Z")
@example("2000-02-29T00:00:00Z")
@example("2026-02-30T25:61:61Z")
@example("0000-01-01T00:00:00Z")
@example("9999-12-31T23:59:59.999999999Z")
@example("2016-12-31T23:59:60Z")
def test_exactly_the_times_of_the_calendar_are_accepted(text: str) -> None:
    """A valid device signs any time: what the decoder lets through, every reader can parse."""
    whole, _, fraction = text[:-1].partition(".")
    try:
        datetime.strptime(whole, "%Y-%m-%dT%H:%M:%S")
        is_time = text.count(".") == (1 if fraction else 0) and len(fraction) <= 9
    except ValueError:
        is_time = False
    try:
        msgspec.convert(text, Rfc3339)
    except msgspec.ValidationError:
        assert not is_time
    else:
        assert is_time
        clock.parse_rfc3339(text)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**40, 10**300])
def test_a_number_beyond_64_bits_is_refused_in_members_of_any_type(number: int) -> None:
    body = {"v": 1, "kind": "audit", "device": "pi-07", "log": "5f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c11", "seq": 1}
    rest = {"prev": "", "boot": 1, "time": "2026-11-24T22:18:01Z", "clock": "synced", "event": "x"}
    for evidence in ({"n": number}, {"n": [[{"m": number}]]}):
        with pytest.raises(MessageRefused, match="64 bits"):
            verification.decode(json.dumps({**body, **rest, "evidence": evidence}).encode())
    largest = {"n": 2**63 - 1, "text": "9" * 40, "fraction": 0.12345678901234567}
    verification.decode(json.dumps({**body, **rest, "evidence": largest}).encode())
