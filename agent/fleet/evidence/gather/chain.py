"""Decisions of roll-outs as the operator signs them: one after another, each naming the digest of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from agent.errors import MessageRefused
from agent.fleet.evidence.contents import DecisionRecord
from agent.fleet.rollout import decisions
from agent.fleet.rollout.decisions import DecisionBody
from agent.wire import jws
from agent.wire.jws import Signer
from agent.wire.messages import MAX_PAYLOAD, digest


def verify_decision(
    rollout: str, payload: object, token: object, find_signer: Callable[[str], Signer | None]
) -> DecisionBody:
    """What was signed for this roll-out. Raises Refused, never another exception."""
    if not (isinstance(payload, bytes) and isinstance(token, str)) or len(payload) > MAX_PAYLOAD:
        raise MessageRefused("malformed decision", "payload or signature is none")
    told = decisions.verify(rollout, payload, token, find_signer)
    if told.rollout != rollout:
        raise MessageRefused("other roll-out", f"the payload is of {told.rollout!r}")
    return told


def build_record(body: DecisionBody, payload: bytes, token: str) -> DecisionRecord:
    """As it stands in decisions.jsonl."""
    return DecisionRecord(
        time=body.time,
        event=body.event,
        who=f"an operator (key {jws.claimed_kid(token)[:10]}…)",
        summary=body.summary,
        rollout=body.rollout,
        payload=payload.decode(),
        jws=token,
    )


def find_chain_breaks(signed: Iterable[tuple[DecisionBody, bytes]], *, is_complete: bool) -> Iterator[str]:
    """Where a chain is not one, in words; unless `whole`, it may begin in the middle."""
    chains: dict[str, dict[int, tuple[DecisionBody, str]]] = {}
    for told, payload in signed:
        of = chains.setdefault(told.rollout, {})
        if told.n in of:
            yield f"roll-out {told.rollout}: decision {told.n} is there twice"
        of[told.n] = (told, digest(payload))
    for rollout, of in chains.items():
        first = min(of)
        if is_complete and first != 1:
            yield f"roll-out {rollout}: decisions before number {first} are missing"
        for n, (told, _) in sorted(of.items()):
            before = of.get(n - 1)
            if n != first and before is None:
                yield f"roll-out {rollout}: what came before decision {n} is missing"
            if (n == 1 and told.prev != "") or (before is not None and told.prev != before[1]):
                yield f"roll-out {rollout}: decision {n} does not follow the one before it: prev is not its digest"
