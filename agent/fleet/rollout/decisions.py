"""Decisions: a sentence with its numbers, signed by the operator's key, each naming the one before it.

Rules of `check`, for each roll-out:
- its decisions are numbered 1, 2, 3 … and each `prev` is the digest of the payload before
- each payload verifies with a key of an operator, and the columns say what it says
- the roll-out itself is as its decisions left it: plan, step, state
- what is desired on its topic is signed, and is not newer than the last decision that changed it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from agent.errors import MessageRefused
from agent.strict_json import DuplicateKey, check_strict_json
from agent.wire import jws
from agent.wire.desired_state import Name
from agent.wire.jws import Signer
from agent.wire.keys import SigningKey
from agent.wire.messages import Rfc3339, digest

Event = Literal["started", "promoted", "paused", "resumed", "aborted", "finished"]
SignerLookup = Callable[[str], Signer | None]


class DecisionBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="decision"):
    """What is signed."""

    v: Literal[1]
    rollout: Name
    n: int
    prev: str
    time: Rfc3339
    event: Event
    summary: str
    evidence: dict[str, Any]


class SignedDecision(msgspec.Struct, frozen=True):
    """A row of table decisions."""

    body: DecisionBody
    payload: bytes
    jws: str

    def to_row(self) -> tuple[Any, ...]:
        body = self.body
        evidence = msgspec.json.encode(body.evidence).decode()
        return (body.rollout, body.n, body.time, body.event, body.summary, evidence, self.payload, self.jws)


def signing_topic(rollout: str) -> str:
    """Stands where a message's topic stands: no decision can pass for a message, and none for another roll-out's."""
    return f"decision/{rollout}"


def sign(key: SigningKey, body: DecisionBody) -> SignedDecision:
    payload = msgspec.json.encode(body)
    return SignedDecision(body, payload, jws.sign(key, signing_topic(body.rollout), payload))


def verify(rollout: str, payload: bytes, token: str, find_signer: SignerLookup) -> DecisionBody:
    """A decision that verifies. Raises Refused."""
    jws.verify([token], signing_topic(rollout), payload, find_signer)
    try:
        body = msgspec.json.decode(payload, type=DecisionBody)
        check_strict_json(payload)
    except (DuplicateKey, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageRefused("malformed payload", str(error)[:200]) from None
    return body


def verify_chain(
    rollout: str, rows: Sequence[tuple[Any, ...]], find_signer: SignerLookup
) -> tuple[list[DecisionBody], list[tuple[Any, str]]]:
    """The decisions of a roll-out, in order of n, that verify; and (n, what is wrong) of each that does not."""
    good: list[DecisionBody] = []
    wrong: list[tuple[Any, str]] = []
    prev: str | None = ""
    for place, row in enumerate(rows, 1):
        n, payload = row[1], row[6]
        if n != place:
            wrong.append((n, f"is where decision {place} should be: one is missing, or was added"))
            prev = None
        problem, body = _verify_row(rollout, row, prev, find_signer)
        if problem is not None:
            wrong.append((n, problem))
        if body is not None:
            good.append(body)
        prev = digest(payload) if isinstance(payload, bytes) else None
    return good, wrong


def _verify_row(
    rollout: str, row: tuple[Any, ...], prev: str | None, find_signer: SignerLookup
) -> tuple[str | None, DecisionBody | None]:
    payload, token = row[6], row[7]
    if not isinstance(payload, bytes) or not isinstance(token, str):
        return "payload or jws is not stored as bytes and text", None
    try:
        body = verify(rollout, payload, token, find_signer)
    except MessageRefused as refused:
        return f"does not verify: {refused}", None
    said = SignedDecision(body, payload, token).to_row()
    names = ("rollout", "n", "time", "event", "summary")
    for name, stored, signed in zip(names, row, said, strict=False):
        if stored != signed:
            return f"is stored with {name} {stored!r}, but the signed payload says {signed!r}", None
    if not _is_same_json(row[5], body.evidence):
        return "is stored with other evidence than the signed payload has", None
    if prev is not None and body.prev != prev:
        return "does not follow the decision before it: prev is not that one's digest", body
    return None, body


def _is_same_json(text: Any, value: Any) -> bool:
    try:
        return bool(msgspec.json.decode(text) == value)
    except (msgspec.MsgspecError, TypeError, ValueError):
        return False
