"""Page of one signed message: header, key, payload, neighbours in the chain, and the verification done anew."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from outstation.fleet.dashboard.pages.visit import Visit
from outstation.fleet.dashboard.state.fleet_state import decode_object
from outstation.fleet.database.dashboard import messages as statements
from outstation.fleet.database.interface import Connection
from outstation.foundation.errors import MessageRefused
from outstation.foundation.text import printable_json
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import b64url_decode, parse_public_key
from outstation.protocol.wire.log_chain import digest
from outstation.protocol.wire.verification import verify_message

_MAX_SHOWN = 100_000
_NEIGHBOURS = 3
_MAX_SEQ = 2**53


class Check(msgspec.Struct, frozen=True):
    """One check of the verification. `passed` is None where nothing is there to compare with."""

    name: str
    passed: bool | None
    detail: str


async def show(visit: Visit) -> Response:
    parts = visit.request.path_params
    device, log, seq = parts["device"], parts["log"], _parse_seq(parts["seq"])
    loaded = await visit.dashboard.reader.read(lambda db: _load(db, device, log, seq))
    if loaded is None:
        missing = f"message {seq} of log {log} of {device} is not stored; it is missing, evicted or still to come"
        raise HTTPException(404, missing)
    return visit.render("message.html", title=f"Message {seq}", **loaded)


async def download(visit: Visit) -> Response:
    """Return the message with its signature and key as JSON, for verification by another program."""
    parts = visit.request.path_params
    device, log, seq = parts["device"], parts["log"], _parse_seq(parts["seq"])

    def load(db: Connection) -> dict[str, Any] | None:
        message = statements.load_message(db, device, log, seq)
        key = statements.load_key(db, _claimed_kid(message["jws"])) if message else None
        if message is None:
            return None
        return {
            "topic": message["topic"],
            "payload": message["payload"].decode(errors="replace"),
            "jws": message["jws"],
            "key": key and key["key"],
            "received": message["received"],
        }

    document = await visit.dashboard.reader.read(load)
    if document is None:
        raise HTTPException(404, "this message is not stored")
    name = f"{seq}.json"
    headers = {"content-disposition": f'attachment; filename="message-{name}"'}
    return Response(json.dumps(document, indent=1), 200, headers, "application/json")


def _parse_seq(text: str) -> int:
    if not text.isdecimal() or len(text) > 16 or not 0 < int(text) < _MAX_SEQ:
        raise HTTPException(404, f"{text!r} is not the number of a message")
    return int(text)


def _load(db: Connection, device: str, log: str, seq: int) -> dict[str, Any] | None:
    message = statements.load_message(db, device, log, seq)
    if message is None:
        return None
    payload = message["payload"]
    key = statements.load_key(db, _claimed_kid(message["jws"]))
    near = statements.load_neighbours(db, device, log, seq - _NEIGHBOURS, seq + _NEIGHBOURS)
    by_seq = {n: stored for n, _, stored, _ in near}
    chain = []
    for n, kind, stored, received in near:
        before, body = by_seq.get(n - 1), decode_object(stored)
        fits = None if before is None else body.get("prev") == digest(before)
        chain.append({"seq": n, "kind": kind, "received": received, "digest": digest(stored), "fits": fits})
    checks = [*_verify(message, payload, key), *_check_chain(by_seq, seq)]
    return {
        "message": message,
        "header": _header_of(message["jws"]),
        "key": key,
        "checks": checks,
        "passed": all(check.passed is not False for check in checks),
        "chain": chain,
        "digest": digest(payload),
        "bytes": len(payload),
        "payload": _pretty(payload),
        "missing": [n for n in range(max(1, seq - _NEIGHBOURS), seq) if n not in by_seq],
    }


def _verify(message: dict[str, Any], payload: bytes, key: dict[str, Any] | None) -> list[Check]:
    """Verify signature and payload as the collector did, with the key that is enrolled now."""
    if key is None:
        return [Check("signature", False, "its key is not enrolled here")]
    try:
        signer = Signer(key["device"], parse_public_key(key["key"]))
        verify_message(message["topic"], payload, [message["jws"]], lambda kid: signer if kid == key["kid"] else None)
    except (MessageRefused, ValueError) as error:
        return [Check("signature and content", False, str(error))]
    checks = [Check("signature and content", True, f"Ed25519, signed by {key['device']} with key {key['kid']}")]
    if key["revoked"]:
        before = key["revoked"] > message["received"]
        when = f"revoked at {key['revoked']}, received at {message['received']}"
        checks.append(Check("key", before, f"{when}: " + ("valid then" if before else "received after it")))
    if key["last_seq"] is not None and key["log"] in (None, message["log"]):
        within = message["seq"] <= key["last_seq"]
        checks.append(Check("key", within, f"replaced by another one after message {key['last_seq']}"))
    return checks


def _check_chain(by_seq: dict[int, bytes], seq: int) -> list[Check]:
    """Compare `prev` of this message and of the next one with the digests of the messages that are stored."""
    checks = []
    for n, name in ((seq, "chain before"), (seq + 1, "chain after")):
        earlier, later = by_seq.get(n - 1), by_seq.get(n)
        if n == 1:
            checks.append(Check(name, True, "the first message of its log"))
        elif earlier is None or later is None:
            where = "the newest message that is stored" if n > seq else f"message {n - 1} is not stored"
            checks.append(Check(name, None, where))
        else:
            fits = decode_object(later).get("prev") == digest(earlier)
            words = "is the digest of" if fits else "is not the digest of"
            checks.append(Check(name, fits, f"prev of message {n} {words} message {n - 1}"))
    return checks


def _claimed_kid(token: str) -> str:
    try:
        return jws.claimed_kid(token)
    except MessageRefused:
        return ""


def _header_of(token: str) -> str:
    try:
        return b64url_decode(token.partition(".")[0]).decode(errors="replace")
    except ValueError:
        return ""


def _pretty(payload: bytes) -> str:
    """Return the payload as indented JSON; as it is where it is none, such as a sealed message."""
    try:
        text = msgspec.json.format(payload, indent=2).decode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = payload.decode(errors="replace")
    shown = printable_json(text[:_MAX_SHOWN])
    return shown + ("\n… shortened; the download has all of it" if len(text) > _MAX_SHOWN else "")
