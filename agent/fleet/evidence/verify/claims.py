"""What a folder's files say of signed messages, held against what these messages say themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from agent.errors import MessageRefused
from agent.fleet.evidence.format.contents import (
    AccuracyEntry,
    BundleComparison,
    DecisionRecord,
    Incident,
    MessageRef,
    RunningTask,
)
from agent.fleet.evidence.format.manifest import EvidenceManifest
from agent.fleet.evidence.gather import comparisons, decisions
from agent.fleet.rollout.decisions import DecisionBody
from agent.wire.jws import Signer
from agent.wire.keys import parse_public_key
from agent.wire.messages import (
    AlertPayload,
    AuditPayload,
    HealthPayload,
    LoggedPayload,
    QualityPayload,
    ShadowPayload,
    VerifiedMessage,
    digest,
)

_MISSING_MESSAGE = "relies on a message that is not in messages/"


class ClaimChecker:
    """Messages first, then what is said of them; `whole` where every file with messages is as it was signed.

    `unsupported`: claims whose message was too much for the folder, or lies in a file that is not read.
    """

    def __init__(
        self, manifest: EvidenceManifest, add_problem: Callable[[str, str], None], *, messages_complete: bool
    ) -> None:
        self._add_problem = add_problem
        self._bodies: dict[MessageRef, Any] = {}
        self._shadow_messages: dict[MessageRef, ShadowPayload] = {}
        self._digests: dict[MessageRef, tuple[str, str]] = {}
        self._signed_decisions: list[tuple[DecisionBody, bytes]] = []
        self._messages_incomplete = "messages" in manifest.left_out or not messages_complete
        self._decisions_complete = "decisions" not in manifest.left_out
        operators = [key for key in manifest.keys if key.role == "operator"]
        self._operators = {key.kid: Signer(key.owner, parse_public_key(key.key)) for key in operators}
        self.decisions = self.unsupported = 0

    def add_message(self, where: str, message: VerifiedMessage) -> None:
        body = message.body
        if not isinstance(body, LoggedPayload):
            self._add_problem(where, f"is of kind {body.__struct_config__.tag}, which no device logs")
            return
        place = MessageRef(body.device, body.log, body.seq)
        if place in self._bodies:
            self._add_problem(where, f"is there twice: {_format_ref(place)}")
            return
        self._bodies[place] = _claimable_fields(body)
        if isinstance(body, ShadowPayload):
            self._shadow_messages[place] = body
        self._digests[place] = (digest(message.payload), body.prev)

    def check_decision(self, where: str, record: DecisionRecord) -> None:
        self.decisions += 1
        if record.payload is not None:
            self._check_operator_decision(where, record)
        elif record.place is not None:
            said = {"device": record.device, "event": record.event, "time": record.time, "summary": record.summary}
            self._compare_with_message(where, record.place, "audit", said)

    def check_incident(self, where: str, record: Incident) -> None:
        said = {"device": record.device, "alert": record.alert, "subject": record.subject}
        if record.source == "device" and record.raised is None:
            self._add_problem(where, "names no message in which the device raised it")
        if record.raised is not None:
            raised = {**said, "state": "raised", "time": record.began, "summary": record.summary}
            self._compare_with_message(where, record.raised, "alerts", raised)
        if record.cleared is not None:
            self._compare_with_message(
                where, record.cleared, "alerts", {**said, "state": "cleared", "time": record.ended}
            )

    def check_running(self, where: str, running_task: RunningTask) -> None:
        model = None if running_task.model is None else msgspec.to_builtins(running_task.model)
        said = {"device": running_task.device, "time": running_task.told, f"model of {running_task.task}": model}
        self._compare_with_message(where, running_task.health, "health", said)
        if running_task.activated is not None:
            to = {
                "device": running_task.device,
                "time": running_task.since,
                "event": "activated",
                "task": running_task.task,
                "to": model,
            }
            self._compare_with_message(where, running_task.activated, "audit", to)

    def check_accuracy(self, where: str, entry: AccuracyEntry) -> None:
        if entry.place is not None:
            said = {"device": entry.device, "task": entry.task, "time": entry.time, "metrics": entry.metrics}
            self._compare_with_message(where, entry.place, "quality", said)
        elif entry.source == "device":
            self._add_problem(where, "names no message in which the device told it")

    def check_comparison(self, where: str, comparison: BundleComparison) -> None:
        """Its figures are counted again from the messages it names."""
        if len(set(comparison.places)) < len(comparison.places):
            self._add_problem(where, "counts a message twice")
            return
        told = [self._shadow_messages[place] for place in comparison.places if place in self._shadow_messages]
        if len(told) < len(comparison.places):
            for place in comparison.places:
                self._compare_with_message(where, place, "shadow", {})
            return
        if len(comparisons.comparison_keys(told)) > 1:
            self._add_problem(where, "counts messages together that are of different devices, roll-outs or bundles")
            return
        found = comparisons.compare_messages(told, new_is_shadow=comparison.new_is_beside, omitted=comparison.left_out)
        for name in found.__struct_fields__:
            if getattr(found, name) != getattr(comparison, name):
                self._add_problem(
                    where, f"says other {name} than its {len(told)} messages come to, which the device signed"
                )

    def check_chains(self) -> None:
        """What can be told of all of them together only."""
        for problem in decisions.find_chain_breaks(self._signed_decisions, is_complete=self._decisions_complete):
            self._add_problem("decisions.jsonl", problem)
        for place, (_, prev) in self._digests.items():
            before = self._digests.get(MessageRef(place.device, place.log, place.seq - 1)) if place.seq > 1 else None
            if before is not None and before[0] != prev:
                self._add_problem(
                    "messages/", f"{_format_ref(place)} does not follow the message before it: prev is not its digest"
                )

    def _check_operator_decision(self, where: str, record: DecisionRecord) -> None:
        payload = (record.payload or "").encode(errors="surrogatepass")
        try:
            told = decisions.verify_decision(record.rollout, payload, record.jws, self._operators.get)
        except MessageRefused as refused:
            self._add_problem(where, f"does not verify: {refused}")
            return
        self._signed_decisions.append((told, payload))
        for name in ("time", "event", "summary"):
            if getattr(record, name) != getattr(told, name):
                self._add_problem(where, f"says another {name} than what the operator signed")

    def _compare_with_message(self, where: str, message_ref: MessageRef, kind: str, claimed: dict[str, Any]) -> None:
        body = self._bodies.get(message_ref)
        if body is None:
            if self._messages_incomplete:
                self.unsupported += 1
            else:
                self._add_problem(where, f"{_MISSING_MESSAGE}: {_format_ref(message_ref)}")
            return
        if body["kind"] != kind:
            self._add_problem(where, f"relies on {_format_ref(message_ref)}, which is of kind {body['kind']}")
            return
        for name, value in claimed.items():
            if body.get(name) != value:
                self._add_problem(
                    where, f"says another {name} than {_format_ref(message_ref)}, which the device signed"
                )


def _format_ref(message_ref: MessageRef) -> str:
    return f"{message_ref.device} log {message_ref.log} seq {message_ref.seq}"


def _claimable_fields(body: LoggedPayload) -> dict[str, Any]:
    """Of a message's content, what claims are compared with."""
    found: dict[str, Any] = {"kind": body.__struct_config__.tag, "device": body.device, "time": body.time}
    if isinstance(body, AuditPayload):
        found |= {"event": body.event, "summary": body.summary}
        found |= {name: body.evidence.get(name) for name in ("task", "to")}
    elif isinstance(body, AlertPayload):
        names = ("alert", "subject", "state", "summary")
        found |= {name: getattr(body, name) for name in names}
    elif isinstance(body, HealthPayload):
        found |= {f"model of {task}": told.get("model") for task, told in body.tasks.items()}
    elif isinstance(body, QualityPayload):
        found |= {"task": body.task, "metrics": list(body.metrics)}
    return found
