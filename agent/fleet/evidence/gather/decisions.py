"""Decisions: what changed on devices and in roll-outs, when, and by whom, as far as what is signed tells."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from agent.errors import Refused
from agent.fleet.evidence.contents import Decision, Place
from agent.fleet.evidence.gather import chain
from agent.fleet.evidence.limits import MOST
from agent.wire.jws import Signer
from agent.wire.messages import Audit

# What happened to a device, and was nobody's decision; it is counted.
HAPPENED = frozenset({"started", "stopped", "clock", "evicted", "new log"})
_ITSELF = "the device itself"
_BY_EVENT = {
    "quarantined": "the device itself, because the model kept ending it",
    "learned": "the device itself, as configured",
    "not learned": "the device itself, as configured",
    "key rotated": "the device, with its old key and the new one",
}
_BY_WHY = {
    "configured": "whoever configured the device",
    "rollback": "an operator, by command",
    "quarantine": "the device itself, because the model before kept ending it",
    "roll-out": "an operator, by a roll-out",
    "roll-out called back": "an operator, who called a roll-out back",
}


class Decisions(msgspec.Struct):
    """The newest are kept. `operators`: kid → name. `happened`: how often what was nobody's decision.

    `private`: how many messages quote labels, and stay where they are.
    """

    operators: dict[str, str]
    happened: Counter[str] = msgspec.field(default_factory=Counter)
    events: Counter[str] = msgspec.field(default_factory=Counter)
    left_out: int = 0
    private: int = 0
    _signed: list[Decision] = msgspec.field(default_factory=list)
    _newest: list[tuple[Any, ...]] = msgspec.field(default_factory=list)
    _n: int = 0

    def add(self, body: Audit) -> None:
        if carries_labels(body):
            self.private += 1
        if body.event in HAPPENED:
            self.happened[body.event] += 1
            return
        evidence = body.evidence
        self._keep(
            Decision(
                time=body.time,
                event=body.event,
                who=self._who(body),
                summary=body.summary,
                device=body.device,
                task=_text(evidence.get("task")) or _text(_args(evidence).get("task")),
                rollout=_text(evidence.get("rollout")),
                phase=_text(evidence.get("phase")) if body.event == "rollout" else "",
                place=None if carries_labels(body) else Place(body.device, body.log, body.seq),
            )
        )

    def add_operators(self, rows: Iterable[dict[str, Any]], find: Callable[[str], Signer | None]) -> int:
        """What operators signed, by roll-out and number; how many do not verify, and are left out."""
        refused = 0
        for row in rows:
            try:
                told = chain.opened(row["rollout"], row["payload"], row["jws"], find)
            except Refused:
                refused += 1
                continue
            if len(self._signed) >= MOST.decisions:
                self.left_out += 1
                continue
            self._count(told.event)
            self._signed.append(chain.decision(told, row["payload"], row["jws"]))
        return refused

    def in_order(self) -> list[Decision]:
        """Oldest first."""
        of_devices = [entry[-1] for entry in self._newest]
        return sorted([*self._signed, *of_devices], key=lambda one: (one.time, one.rollout, one.device))

    def _who(self, body: Audit) -> str:
        if body.event == "command":
            kid = _text(body.evidence.get("kid"))
            return f"{self.operators.get(kid, 'an operator')}, by command (key {kid[:10]}…)"
        if body.event == "activated":
            return who_activated(body)
        if body.event == "rollout":
            return f"the device, in roll-out {_text(body.evidence.get('rollout'))}"
        if body.event == "reference reset":
            return f"asked {_text(body.evidence.get('by')) or 'by somebody'}"
        return _BY_EVENT.get(body.event, _ITSELF)

    def _count(self, event: str) -> None:
        # Devices name them.
        known = event in self.events or len(self.events) < MOST.events
        self.events[event if known else "others"] += 1

    def _keep(self, one: Decision) -> None:
        self._count(one.event)
        self._n += 1
        entry = (one.time, self._n, one)
        if len(self._newest) < MOST.decisions:
            heapq.heappush(self._newest, entry)
            return
        heapq.heappushpop(self._newest, entry)
        self.left_out += 1


def who_activated(body: Audit) -> str:
    """Who decided that a bundle runs."""
    why = _text(body.evidence.get("why"))
    return _BY_WHY.get(why, f"the device itself: {why}" if why else "not told")


def carries_labels(body: Audit) -> bool:
    """Whether the signed message quotes what somebody said was true of results: such a message does not leave."""
    return body.event == "command" and body.evidence.get("name") == "label"


def _args(evidence: dict[str, Any]) -> dict[str, Any]:
    found = evidence.get("args")
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str:
    return value[:256] if isinstance(value, str) else ""
