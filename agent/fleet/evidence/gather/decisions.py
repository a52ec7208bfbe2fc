"""Decisions: what changed on devices and in roll-outs, when, and by whom, as far as what is signed tells."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from agent.errors import MessageRefused
from agent.fleet.evidence.format.contents import WRITE_LIMITS, DecisionRecord, MessageRef
from agent.fleet.rollout import decisions as rollout_decisions
from agent.fleet.rollout.decisions import DecisionBody
from agent.wire import jws
from agent.wire.jws import Signer
from agent.wire.messages import MAX_PAYLOAD, AuditPayload, digest

# What happened to a device, and was nobody's decision; it is counted.
OPERATIONAL_EVENTS = frozenset({"started", "stopped", "clock", "evicted", "new log"})
_DEVICE_ACTOR = "the device itself"
_ACTOR_BY_EVENT = {
    "quarantined": "the device itself, because the model kept ending it",
    "learned": "the device itself, as configured",
    "not learned": "the device itself, as configured",
    "key rotated": "the device, with its old key and the new one",
}
_ACTOR_BY_REASON = {
    "configured": "whoever configured the device",
    "rollback": "an operator, by command",
    "quarantine": "the device itself, because the model before kept ending it",
    "roll-out": "an operator, by a roll-out",
    "roll-out called back": "an operator, who called a roll-out back",
}


class DecisionCollector(msgspec.Struct):
    """The newest are kept. `operators`: kid → name. `happened`: how often what was nobody's decision.

    `private`: how many messages quote labels, and stay where they are.
    """

    operators: dict[str, str]
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
        evidence = body.evidence
        self._store(
            DecisionRecord(
                time=body.time,
                event=body.event,
                who=self._name_actor(body),
                summary=body.summary,
                device=body.device,
                task=_as_text(evidence.get("task")) or _as_text(_get_args(evidence).get("task")),
                rollout=_as_text(evidence.get("rollout")),
                phase=_as_text(evidence.get("phase")) if body.event == "rollout" else "",
                place=None if has_label_data(body) else MessageRef(body.device, body.log, body.seq),
            )
        )

    def add_operator_decisions(
        self, rows: Iterable[dict[str, Any]], find_signer: Callable[[str], Signer | None]
    ) -> int:
        """What operators signed, by roll-out and number; how many do not verify, and are left out."""
        refused = 0
        for row in rows:
            try:
                told = verify_decision(row["rollout"], row["payload"], row["jws"], find_signer)
            except MessageRefused:
                refused += 1
                continue
            if len(self._signed) >= WRITE_LIMITS.decisions:
                self.omitted += 1
                continue
            self._count_event(told.event)
            self._signed.append(build_record(told, row["payload"], row["jws"]))
        return refused

    def sort_by_time(self) -> list[DecisionRecord]:
        """Oldest first."""
        of_devices = [entry[-1] for entry in self._newest]
        return sorted([*self._signed, *of_devices], key=lambda one: (one.time, one.rollout, one.device))

    def _name_actor(self, body: AuditPayload) -> str:
        if body.event == "command":
            kid = _as_text(body.evidence.get("kid"))
            return f"{self.operators.get(kid, 'an operator')}, by command (key {kid[:10]}…)"
        if body.event == "activated":
            return name_activator(body)
        if body.event == "rollout":
            return f"the device, in roll-out {_as_text(body.evidence.get('rollout'))}"
        if body.event == "reference reset":
            return f"asked {_as_text(body.evidence.get('by')) or 'by somebody'}"
        return _ACTOR_BY_EVENT.get(body.event, _DEVICE_ACTOR)

    def _count_event(self, event: str) -> None:
        # Devices name them.
        known = event in self.event_counts or len(self.event_counts) < WRITE_LIMITS.event_names
        self.event_counts[event if known else "others"] += 1

    def _store(self, record: DecisionRecord) -> None:
        self._count_event(record.event)
        self._sequence += 1
        entry = (record.time, self._sequence, record)
        if len(self._newest) < WRITE_LIMITS.decisions:
            heapq.heappush(self._newest, entry)
            return
        heapq.heappushpop(self._newest, entry)
        self.omitted += 1


def name_activator(body: AuditPayload) -> str:
    """Who decided that a bundle runs."""
    why = _as_text(body.evidence.get("why"))
    return _ACTOR_BY_REASON.get(why, f"the device itself: {why}" if why else "not told")


def has_label_data(body: AuditPayload) -> bool:
    """Whether the signed message quotes what somebody said was true of results: such a message does not leave."""
    return body.event == "command" and body.evidence.get("name") == "label"


def _get_args(evidence: dict[str, Any]) -> dict[str, Any]:
    found = evidence.get("args")
    return found if isinstance(found, dict) else {}


def _as_text(value: object) -> str:
    return value[:256] if isinstance(value, str) else ""


def verify_decision(
    rollout: str, payload: object, token: object, find_signer: Callable[[str], Signer | None]
) -> DecisionBody:
    """What was signed for this roll-out. Raises Refused, never another exception."""
    if not (isinstance(payload, bytes) and isinstance(token, str)) or len(payload) > MAX_PAYLOAD:
        raise MessageRefused("malformed decision", "payload or signature is none")
    told = rollout_decisions.verify(rollout, payload, token, find_signer)
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
