"""Decisions of roll-outs as the operator signs them: one after another, each naming the digest of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from agent.errors import Refused
from agent.fleet.evidence.contents import Decision
from agent.fleet.rollout import decisions
from agent.fleet.rollout.decisions import Body
from agent.wire import jws
from agent.wire.jws import Signer
from agent.wire.messages import MAX_PAYLOAD, digest


def opened(rollout: str, payload: object, token: object, find: Callable[[str], Signer | None]) -> Body:
    """What was signed for this roll-out. Raises Refused, never another exception."""
    if not (isinstance(payload, bytes) and isinstance(token, str)) or len(payload) > MAX_PAYLOAD:
        raise Refused("malformed decision", "payload or signature is none")
    told = decisions.opened(rollout, payload, token, find)
    if told.rollout != rollout:
        raise Refused("other roll-out", f"the payload is of {told.rollout!r}")
    return told


def decision(told: Body, payload: bytes, token: str) -> Decision:
    """As it stands in decisions.jsonl."""
    return Decision(
        time=told.time,
        event=told.event,
        who=f"an operator (key {jws.claimed_kid(token)[:10]}…)",
        summary=told.summary,
        rollout=told.rollout,
        payload=payload.decode(),
        jws=token,
    )


def breaks(signed: Iterable[tuple[Body, bytes]], *, whole: bool) -> Iterator[str]:
    """Where a chain is not one, in words; unless `whole`, it may begin in the middle."""
    chains: dict[str, dict[int, tuple[Body, str]]] = {}
    for told, payload in signed:
        of = chains.setdefault(told.rollout, {})
        if told.n in of:
            yield f"roll-out {told.rollout}: decision {told.n} is there twice"
        of[told.n] = (told, digest(payload))
    for rollout, of in chains.items():
        first = min(of)
        if whole and first != 1:
            yield f"roll-out {rollout}: decisions before number {first} are missing"
        for n, (told, _) in sorted(of.items()):
            before = of.get(n - 1)
            if n != first and before is None:
                yield f"roll-out {rollout}: what came before decision {n} is missing"
            if (n == 1 and told.prev != "") or (before is not None and told.prev != before[1]):
                yield f"roll-out {rollout}: decision {n} does not follow the one before it: prev is not its digest"
