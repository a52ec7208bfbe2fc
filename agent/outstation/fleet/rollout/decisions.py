"""Signed decisions: a sentence with its evidence, signed with the operator's key and chained to the previous decision.

Rules of `verify_chain`, for each roll-out:
- decisions are numbered 1, 2, 3 …, and `prev` is the digest of the previous payload
- each payload verifies with an operator's key, and the columns agree with it

`fleet audit` also checks that the roll-out and the desired state are as the last decision left them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from outstation.foundation.errors import MessageRefused
from outstation.protocol.documents.signed_document import DocumentKind, SignedDocument, SignerLookup
from outstation.protocol.wire.desired_state import Name
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.times import Rfc3339

Event = Literal["started", "promoted", "paused", "resumed", "aborted", "finished"]


class DecisionBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="decision"):
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
    document: SignedDocument

    def to_row(self) -> tuple[Any, ...]:
        body = self.body
        evidence = msgspec.json.encode(body.evidence).decode()
        return (
            body.rollout,
            body.n,
            body.time,
            body.event,
            body.summary,
            evidence,
            self.document.payload,
            self.document.jws,
        )


KIND = DocumentKind(DecisionBody, "decision/{}")


def sign(key: SigningKey, body: DecisionBody) -> SignedDecision:
    return SignedDecision(body, KIND.sign_body(key, body, body.rollout))


def verify(rollout: str, payload: bytes, token: str, find_signer: SignerLookup) -> DecisionBody:
    """Return the verified decision. Raises MessageRefused."""
    return KIND.verify(SignedDocument(payload, token), find_signer, rollout)


def verify_chain(
    rollout: str, rows: Sequence[tuple[Any, ...]], find_signer: SignerLookup
) -> tuple[list[DecisionBody], list[tuple[Any, str]]]:
    """Return the verified decisions of a roll-out, ordered by n, and (n, problem) of each invalid one."""
    valid: list[DecisionBody] = []
    problems: list[tuple[Any, str]] = []
    prev: str | None = ""
    for position, row in enumerate(rows, 1):
        _, n, *_, payload, _ = row
        if n != position:
            problems.append((n, f"is at position {position}: a decision is missing, or was added"))
            prev = None
        problem, body = _verify_row(rollout, row, prev, find_signer)
        if problem is not None:
            problems.append((n, problem))
        if body is not None:
            valid.append(body)
        prev = KIND.digest(payload) if isinstance(payload, bytes) else None
    return valid, problems


def _verify_row(
    rollout: str, row: tuple[Any, ...], prev: str | None, find_signer: SignerLookup
) -> tuple[str | None, DecisionBody | None]:
    *_, evidence, payload, token = row
    if not isinstance(payload, bytes) or not isinstance(token, str):
        return "payload or jws is not stored as bytes and text", None
    try:
        body = verify(rollout, payload, token, find_signer)
    except MessageRefused as refused:
        return f"does not verify: {refused}", None
    signed_row = SignedDecision(body, SignedDocument(payload, token)).to_row()
    names = ("rollout", "n", "time", "event", "summary")
    for name, stored, signed in zip(names, row, signed_row, strict=False):
        if stored != signed:
            return f"is stored with {name} {stored!r}, but the signed payload says {signed!r}", None
    try:
        is_same = msgspec.json.decode(evidence) == body.evidence
    except (msgspec.MsgspecError, TypeError, ValueError):
        is_same = False
    if not is_same:
        return "is stored with evidence that differs from the signed payload", None
    if prev is not None and body.prev != prev:
        return "does not follow the previous decision: prev is not that decision's digest", body
    return None, body
