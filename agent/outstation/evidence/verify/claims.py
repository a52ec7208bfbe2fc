"""Claims of an evidence folder about signed messages, compared with the content of those messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from outstation.evidence.format.contents import (
    AccuracyEntry,
    BundleComparison,
    DecisionRecord,
    IncidentRecord,
    MessageRef,
    RunningTask,
)
from outstation.evidence.format.manifest import EvidenceManifest
from outstation.evidence.gather import comparisons, decisions
from outstation.evidence.verify.chains import CLOCK_TOLERANCE_US, MESSAGE, ChainChecker, Commitment
from outstation.fleet.rollout.decisions import DecisionBody
from outstation.foundation.clock import parse_rfc3339
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import parse_public_key
from outstation.protocol.wire.log_chain import digest
from outstation.protocol.wire.messages import (
    AcknowledgementRef,
    AlertPayload,
    AuditPayload,
    HealthPayload,
    LoggedPayload,
    QualityPayload,
    ShadowPayload,
)
from outstation.protocol.wire.verification import VerifiedMessage


class ClaimChecker:
    """Checker of claims. Call `add_message` for all messages first, then check the claims, then the chains.

    `messages_complete`: every file in messages/ is unaltered. `unsupported` counts claims whose message is not in the
    folder, because it was omitted or because its file is altered.
    """

    def __init__(
        self,
        manifest: EvidenceManifest,
        chains: ChainChecker,
        add_problem: Callable[[str, str], None],
        *,
        messages_complete: bool,
    ) -> None:
        self._add_problem, self._chains = add_problem, chains
        self._bodies: dict[MessageRef, Any] = {}
        self._shadow_messages: dict[MessageRef, ShadowPayload] = {}
        self._signed_decisions: list[tuple[DecisionBody, bytes]] = []
        self._messages_incomplete = "messages" in manifest.omitted or not messages_complete
        self._decisions_complete = "decisions" not in manifest.omitted
        operators = [key for key in manifest.keys if key.role == "operator"]
        self._operators = {key.kid: Signer(key.owner, parse_public_key(key.key)) for key in operators}
        self.decisions = self.unsupported = 0

    def add_message(self, where: str, message: VerifiedMessage) -> None:
        body = message.body
        if not isinstance(body, LoggedPayload):
            self._add_problem(where, f"is of kind {body.__struct_config__.tag}, which is not part of a device's log")
            return
        ref = MessageRef(body.device, body.log, body.seq)
        if ref in self._bodies:
            self._add_problem(where, f"duplicates a message: {_format_ref(ref)}")
            return
        self._bodies[ref] = _claimable_fields(body)
        if isinstance(body, ShadowPayload):
            self._shadow_messages[ref] = body
        device = body.device
        self._chains.add(Commitment(ref, digest(message.payload), where, MESSAGE))
        self._chains.add_declarations(body)
        if isinstance(body, HealthPayload) and (quoted := body.acknowledged) is not None:
            self._check_time(where, body, quoted)
            if quoted.through and quoted.digest is not None:
                source = f"the acknowledgement of {quoted.time} that {device} quotes"
                ref = MessageRef(device, quoted.log, quoted.through)
                self._chains.add(Commitment(ref, quoted.digest, where, source))

    def _check_time(self, where: str, body: HealthPayload, quoted: AcknowledgementRef) -> None:
        """Check that a message is not older than the acknowledgement in it."""
        written_us, quoted_us = parse_rfc3339(body.time), parse_rfc3339(quoted.time)
        if body.clock == "synced" and written_us < quoted_us - CLOCK_TOLERANCE_US:
            self._add_problem(
                where, f"is dated {body.time}, before the acknowledgement of {quoted.time} that it quotes"
            )

    def check_decision(self, where: str, record: DecisionRecord) -> None:
        self.decisions += 1
        if record.payload is not None:
            payload = record.payload.encode(errors="surrogatepass")
            try:
                body = decisions.verify_decision(record.rollout, payload, record.jws, self._operators.get)
            except MessageRefused as refused:
                self._add_problem(where, f"does not verify: {refused}")
                return
            self._signed_decisions.append((body, payload))
            for name in ("time", "event", "summary"):
                if getattr(record, name) != getattr(body, name):
                    self._add_problem(where, f"{name} differs from what the operator signed")
        elif record.message is not None:
            claims = {"device": record.device, "event": record.event, "time": record.time, "summary": record.summary}
            self._compare_with_message(where, record.message, "audit", claims)

    def check_incident(self, where: str, record: IncidentRecord) -> None:
        claims = {"device": record.device, "alert": record.alert, "subject": record.subject}
        if record.source == "device" and record.raised is None:
            self._add_problem(where, "names no message in which the device raised it")
        if record.raised is not None:
            raised = {**claims, "state": "raised", "time": record.started, "summary": record.summary}
            self._compare_with_message(where, record.raised, "alerts", raised)
        if record.cleared is not None:
            cleared = {**claims, "state": "cleared", "time": record.ended}
            self._compare_with_message(where, record.cleared, "alerts", cleared)

    def check_running(self, where: str, task: RunningTask) -> None:
        model = None if task.model is None else msgspec.to_builtins(task.model)
        claims = {"device": task.device, "time": task.reported_at, f"model of {task.task}": model}
        self._compare_with_message(where, task.health, "health", claims)
        if task.activated is not None:
            claims = {"device": task.device, "time": task.since, "event": "activated", "task": task.task, "to": model}
            self._compare_with_message(where, task.activated, "audit", claims)

    def check_accuracy(self, where: str, entry: AccuracyEntry) -> None:
        if entry.message is not None:
            claims = {name: getattr(entry, name) for name in ("device", "task", "output", "time", "metrics")}
            self._compare_with_message(where, entry.message, "quality", claims)
        elif entry.source == "device":
            self._add_problem(where, "names no message in which the device reported it")

    def check_comparison(self, where: str, comparison: BundleComparison) -> None:
        """Compute the statistics again from the messages that the comparison names."""
        if len(set(comparison.messages)) < len(comparison.messages):
            self._add_problem(where, "counts a message twice")
            return
        bodies = [self._shadow_messages[ref] for ref in comparison.messages if ref in self._shadow_messages]
        if len(bodies) < len(comparison.messages):
            for ref in comparison.messages:
                self._compare_with_message(where, ref, "shadow", {})
            return
        if len({comparisons.comparison_key(body) for body in bodies}) > 1:
            self._add_problem(where, "combines messages of different devices, roll-outs or bundles")
            return
        computed = comparisons.compare_messages(
            bodies, new_is_shadow=comparison.new_is_shadow, omitted=comparison.omitted
        )
        for name in computed.__struct_fields__:
            if getattr(computed, name) != getattr(comparison, name):
                self._add_problem(where, f"{name} differs from the value computed from its {len(bodies)} messages")

    def check_chains(self) -> None:
        """Check the chains of decisions. Call it last."""
        for problem in decisions.find_chain_breaks(self._signed_decisions, is_complete=self._decisions_complete):
            self._add_problem("decisions.jsonl", problem)

    def _compare_with_message(self, where: str, ref: MessageRef, kind: str, claims: dict[str, Any]) -> None:
        body = self._bodies.get(ref)
        if body is None:
            if self._messages_incomplete:
                self.unsupported += 1
            else:
                self._add_problem(where, f"refers to a message that is not in messages/: {_format_ref(ref)}")
            return
        if body["kind"] != kind:
            self._add_problem(where, f"refers to {_format_ref(ref)}, which is of kind {body['kind']}, not {kind}")
            return
        for name, value in claims.items():
            if body.get(name) != value:
                self._add_problem(where, f"{name} differs from {_format_ref(ref)}, which the device signed")


def _format_ref(ref: MessageRef) -> str:
    return f"{ref.device} log {ref.log} seq {ref.seq}"


def _claimable_fields(body: LoggedPayload) -> dict[str, Any]:
    """Return the members of a message that claims are compared with."""
    fields: dict[str, Any] = {"kind": body.__struct_config__.tag, "device": body.device, "time": body.time}
    if isinstance(body, AuditPayload):
        fields |= {"event": body.event, "summary": body.summary}
        fields |= {name: body.evidence.get(name) for name in ("task", "to")}
    elif isinstance(body, AlertPayload):
        fields |= {name: getattr(body, name) for name in ("alert", "subject", "state", "summary")}
    elif isinstance(body, HealthPayload):
        fields |= {f"model of {task}": state.get("model") for task, state in body.tasks.items()}
    elif isinstance(body, QualityPayload):
        fields |= {"task": body.task, "output": body.output, "metrics": list(body.metrics)}
    return fields
