"""What a folder's files say of signed messages, held against what these messages say themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from agent.errors import Refused
from agent.fleet.evidence.contents import Compared, Decision, Incident, Measured, Place, Running
from agent.fleet.evidence.gather import chain, comparisons
from agent.fleet.evidence.manifest import Manifest
from agent.fleet.rollout.decisions import Body
from agent.wire.jws import Signer
from agent.wire.keys import public_key
from agent.wire.messages import Alerts, Audit, Health, Logged, Message, Quality, Shadow, digest

_NOT_HERE = "relies on a message that is not in messages/"


class Claims:
    """Messages first, then what is said of them; `whole` where every file with messages is as it was signed.

    `unsupported`: claims whose message was too much for the folder, or lies in a file that is not read.
    """

    def __init__(self, head: Manifest, add: Callable[[str, str], None], *, whole: bool) -> None:
        self._add = add
        self._bodies: dict[Place, Any] = {}
        self._shadows: dict[Place, Shadow] = {}
        self._digests: dict[Place, tuple[str, str]] = {}
        self._signed: list[tuple[Body, bytes]] = []
        self._some_left_out = "messages" in head.left_out or not whole
        self._whole = "decisions" not in head.left_out
        operators = [key for key in head.keys if key.role == "operator"]
        self._operators = {key.kid: Signer(key.owner, public_key(key.key)) for key in operators}
        self.decisions = self.unsupported = 0

    def message(self, where: str, message: Message) -> None:
        body = message.body
        if not isinstance(body, Logged):
            self._add(where, f"is of kind {body.__struct_config__.tag}, which no device logs")
            return
        place = Place(body.device, body.log, body.seq)
        if place in self._bodies:
            self._add(where, f"is there twice: {_named(place)}")
            return
        self._bodies[place] = _needed(body)
        if isinstance(body, Shadow):
            self._shadows[place] = body
        self._digests[place] = (digest(message.payload), body.prev)

    def decision(self, where: str, one: Decision) -> None:
        self.decisions += 1
        if one.payload is not None:
            self._operators_decision(where, one)
        elif one.place is not None:
            said = {"device": one.device, "event": one.event, "time": one.time, "summary": one.summary}
            self._compare(where, one.place, "audit", said)

    def incident(self, where: str, one: Incident) -> None:
        said = {"device": one.device, "alert": one.alert, "subject": one.subject}
        if one.source == "device" and one.raised is None:
            self._add(where, "names no message in which the device raised it")
        if one.raised is not None:
            raised = {**said, "state": "raised", "time": one.began, "summary": one.summary}
            self._compare(where, one.raised, "alerts", raised)
        if one.cleared is not None:
            self._compare(where, one.cleared, "alerts", {**said, "state": "cleared", "time": one.ended})

    def running(self, where: str, one: Running) -> None:
        model = None if one.model is None else msgspec.to_builtins(one.model)
        said = {"device": one.device, "time": one.told, f"model of {one.task}": model}
        self._compare(where, one.health, "health", said)
        if one.activated is not None:
            to = {"device": one.device, "time": one.since, "event": "activated", "task": one.task, "to": model}
            self._compare(where, one.activated, "audit", to)

    def measured(self, where: str, one: Measured) -> None:
        if one.place is not None:
            said = {"device": one.device, "task": one.task, "time": one.time, "metrics": one.metrics}
            self._compare(where, one.place, "quality", said)
        elif one.source == "device":
            self._add(where, "names no message in which the device told it")

    def compared(self, where: str, one: Compared) -> None:
        """Its figures are counted again from the messages it names."""
        if len(set(one.places)) < len(one.places):
            self._add(where, "counts a message twice")
            return
        told = [self._shadows[place] for place in one.places if place in self._shadows]
        if len(told) < len(one.places):
            for place in one.places:
                self._compare(where, place, "shadow", {})
            return
        if len(comparisons.of(told)) > 1:
            self._add(where, "counts messages together that are of different devices, roll-outs or bundles")
            return
        found = comparisons.compared(told, new_is_beside=one.new_is_beside, left_out=one.left_out)
        for name in found.__struct_fields__:
            if getattr(found, name) != getattr(one, name):
                self._add(where, f"says other {name} than its {len(told)} messages come to, which the device signed")

    def finish(self) -> None:
        """What can be told of all of them together only."""
        for problem in chain.breaks(self._signed, whole=self._whole):
            self._add("decisions.jsonl", problem)
        for place, (_, prev) in self._digests.items():
            before = self._digests.get(Place(place.device, place.log, place.seq - 1)) if place.seq > 1 else None
            if before is not None and before[0] != prev:
                self._add("messages/", f"{_named(place)} does not follow the message before it: prev is not its digest")

    def _operators_decision(self, where: str, one: Decision) -> None:
        payload = (one.payload or "").encode(errors="surrogatepass")
        try:
            told = chain.opened(one.rollout, payload, one.jws, self._operators.get)
        except Refused as refused:
            self._add(where, f"does not verify: {refused}")
            return
        self._signed.append((told, payload))
        for name in ("time", "event", "summary"):
            if getattr(one, name) != getattr(told, name):
                self._add(where, f"says another {name} than what the operator signed")

    def _compare(self, where: str, place: Place, kind: str, said: dict[str, Any]) -> None:
        body = self._bodies.get(place)
        if body is None:
            if self._some_left_out:
                self.unsupported += 1
            else:
                self._add(where, f"{_NOT_HERE}: {_named(place)}")
            return
        if body["kind"] != kind:
            self._add(where, f"relies on {_named(place)}, which is of kind {body['kind']}")
            return
        for name, value in said.items():
            if body.get(name) != value:
                self._add(where, f"says another {name} than {_named(place)}, which the device signed")


def _named(place: Place) -> str:
    return f"{place.device} log {place.log} seq {place.seq}"


def _needed(body: Logged) -> dict[str, Any]:
    """Of a message's content, what claims are compared with."""
    found: dict[str, Any] = {"kind": body.__struct_config__.tag, "device": body.device, "time": body.time}
    if isinstance(body, Audit):
        found |= {"event": body.event, "summary": body.summary}
        found |= {name: body.evidence.get(name) for name in ("task", "to")}
    elif isinstance(body, Alerts):
        names = ("alert", "subject", "state", "summary")
        found |= {name: getattr(body, name) for name in names}
    elif isinstance(body, Health):
        found |= {f"model of {task}": told.get("model") for task, told in body.tasks.items()}
    elif isinstance(body, Quality):
        found |= {"task": body.task, "metrics": list(body.metrics)}
    return found
