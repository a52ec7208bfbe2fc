"""Decisions: changes on devices and in roll-outs with their time and actor, from signed messages and signed decisions.

An operator's decisions of one roll-out form a chain: each names the digest of the decision before it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from outstation.evidence.format.contents import WRITE_LIMITS, DecisionRecord, MessageRef
from outstation.fleet.rollout import decisions as rollout_decisions
from outstation.fleet.rollout.decisions import DecisionBody
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import MAX_PAYLOAD, Signer
from outstation.protocol.wire.messages import AuditPayload

# Events that nobody decided. They are only counted.
OPERATIONAL_EVENTS = frozenset({"started", "stopped", "clock", "evicted", "new log", "acknowledgement"})
_DEVICE_ACTOR = "the device"
_ACTOR_BY_EVENT = {
    "quarantined": "the device, because the model kept crashing it",
    "learned": "the device, as configured",
    "not learned": "the device, as configured",
    "key rotated": "the device, with its old and new key",
}
_ACTOR_BY_REASON = {
    "configured": "whoever configured the device",
    "rollback": "an operator, by command",
    "quarantine": "the device, because the model before kept crashing it",
    "roll-out": "an operator, by a roll-out",
    "roll-out called back": "an operator, who called a roll-out back",
}
_ACTOR_BY_REQUEST = {"from the fleet": "an operator, by command", "on the device": "somebody at the device"}


class DecisionCollector(msgspec.Struct):
    """Newest decisions. `withheld` counts messages that quote labels and so do not leave the database."""

    operational_events: Counter[str] = msgspec.field(default_factory=Counter)
    event_counts: Counter[str] = msgspec.field(default_factory=Counter)
    omitted: int = 0
    withheld: int = 0
    _signed: list[DecisionRecord] = msgspec.field(default_factory=list)
    _newest: list[tuple[Any, ...]] = msgspec.field(default_factory=list)
    _sequence: int = 0

    def add(self, body: AuditPayload) -> None:
        if has_label_data(body):
            self.withheld += 1
        if body.event in OPERATIONAL_EVENTS:
            self.operational_events[body.event] += 1
            return
        evidence, args = body.evidence, body.evidence.get("args")
        task = _as_text(evidence.get("task")) or _as_text(args.get("task") if isinstance(args, dict) else "")
        record = DecisionRecord(
            time=body.time,
            event=body.event,
            decided_by=_name_actor(body),
            summary=body.summary,
            device=body.device,
            task=task,
            rollout=_as_text(evidence.get("rollout")),
            phase=_as_text(evidence.get("phase")) if body.event == "rollout" else "",
            message=None if has_label_data(body) else MessageRef(body.device, body.log, body.seq),
        )
        self._count_event(record.event)
        self._sequence += 1
        entry = (record.time, self._sequence, record)
        if len(self._newest) < WRITE_LIMITS.decisions:
            heapq.heappush(self._newest, entry)
        else:
            heapq.heappushpop(self._newest, entry)
            self.omitted += 1

    def add_operator_decisions(
        self, rows: Iterable[dict[str, Any]], find_signer: Callable[[str], Signer | None]
    ) -> int:
        """Add signed decisions, ordered by roll-out and number. Return how many did not verify; they are left out."""
        refused = 0
        for row in rows:
            try:
                body = verify_decision(row["rollout"], row["payload"], row["jws"], find_signer)
            except MessageRefused:
                refused += 1
                continue
            if len(self._signed) >= WRITE_LIMITS.decisions:
                self.omitted += 1
                continue
            self._count_event(body.event)
            self._signed.append(build_record(body, row["payload"], row["jws"]))
        return refused

    def sort_by_time(self) -> list[DecisionRecord]:
        """Return all decisions, oldest first."""
        device_records = [entry[-1] for entry in self._newest]
        return sorted([*self._signed, *device_records], key=lambda record: (record.time, record.rollout, record.device))

    def _count_event(self, event: str) -> None:
        # Devices choose event names, so their number has a limit.
        known = event in self.event_counts or len(self.event_counts) < WRITE_LIMITS.event_names
        self.event_counts[event if known else "others"] += 1


def _name_actor(body: AuditPayload) -> str:
    if body.event == "command":
        return f"an operator, by command (key {_as_text(body.evidence.get('kid'))[:10]}…)"
    if body.event == "activated":
        return name_activator(body)
    if body.event == "rollout":
        return f"the device, in roll-out {_as_text(body.evidence.get('rollout'))}"
    if body.event == "reference reset":
        return _ACTOR_BY_REQUEST.get(_as_text(body.evidence.get("by")), _DEVICE_ACTOR)
    return _ACTOR_BY_EVENT.get(body.event, _DEVICE_ACTOR)


def name_activator(body: AuditPayload) -> str:
    """Return the actor who decided that a bundle runs."""
    reason = _as_text(body.evidence.get("why"))
    return _ACTOR_BY_REASON.get(reason, f"the device: {reason}" if reason else "an unknown actor")


def has_label_data(body: AuditPayload) -> bool:
    """Return True if the signed message quotes labels. Such a message does not leave the database."""
    return body.event == "command" and body.evidence.get("name") == "label"


def verify_decision(
    rollout: str, payload: object, token: object, find_signer: Callable[[str], Signer | None]
) -> DecisionBody:
    """Return the decision signed for this roll-out. Raises MessageRefused and no other exception."""
    if not (isinstance(payload, bytes) and isinstance(token, str)) or len(payload) > MAX_PAYLOAD:
        raise MessageRefused("malformed decision", "payload or signature is missing or too large")
    body = rollout_decisions.verify(rollout, payload, token, find_signer)
    if body.rollout != rollout:
        raise MessageRefused("other roll-out", f"the payload belongs to {body.rollout!r}")
    return body


def build_record(body: DecisionBody, payload: bytes, token: str) -> DecisionRecord:
    """Return the line of decisions.jsonl for a signed decision."""
    return DecisionRecord(
        time=body.time,
        event=body.event,
        decided_by=f"an operator (key {jws.claimed_kid(token)[:10]}…)",
        summary=body.summary,
        rollout=body.rollout,
        payload=payload.decode(),
        jws=token,
    )


def find_chain_breaks(signed: Iterable[tuple[DecisionBody, bytes]], *, is_complete: bool) -> Iterator[str]:
    """Yield a sentence for each break in the chains of decisions. An incomplete chain may start at any number."""
    chains: dict[str, dict[int, tuple[DecisionBody, str]]] = {}
    for body, payload in signed:
        chain = chains.setdefault(body.rollout, {})
        if body.n in chain:
            yield f"roll-out {body.rollout}: decision {body.n} occurs twice"
        chain[body.n] = (body, rollout_decisions.KIND.digest(payload))
    for rollout, chain in chains.items():
        first = min(chain)
        if is_complete and first != 1:
            yield f"roll-out {rollout}: decisions before number {first} are missing"
        for n, (body, _) in sorted(chain.items()):
            previous = chain.get(n - 1)
            if n != first and previous is None:
                yield f"roll-out {rollout}: the decision before number {n} is missing"
            if (n == 1 and body.prev != "") or (previous is not None and body.prev != previous[1]):
                yield f"roll-out {rollout}: decision {n} does not follow the one before it: prev is not its digest"


def _as_text(value: object) -> str:
    return value[:256] if isinstance(value, str) else ""
