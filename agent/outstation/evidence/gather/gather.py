"""Fact gathering for an evidence folder: one pass over the signed messages, in memory bounded by the limits.

- facts about a device come only from messages that verify during the pass; others are counted and ignored
- above a limit, the worst or the newest entries stay and the omitted ones are counted
- payloads are not kept: the folder refers to messages by (device, log, seq), and they are read again when written
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from outstation.evidence.format.contents import (
    OMITTED_DECLARATIONS,
    WRITE_LIMITS,
    AccuracyEntry,
    BundleComparison,
    BundleUsage,
    DecisionRecord,
    IncidentRecord,
    MessageRef,
    RunningTask,
)
from outstation.evidence.format.manifest import ReceivedSpan, TrustedKey
from outstation.evidence.gather import drift as fleet_drift
from outstation.evidence.gather import trusted_keys
from outstation.evidence.gather.accuracy import AccuracyCollector
from outstation.evidence.gather.bundles import BundleDocuments
from outstation.evidence.gather.comparisons import ComparisonCollector
from outstation.evidence.gather.decisions import DecisionCollector
from outstation.evidence.gather.deployments import ActivationCollector, parse_agent_version
from outstation.evidence.gather.incidents import IncidentCollector
from outstation.fleet.audit import audit
from outstation.fleet.database.evidence import EvidenceQueries
from outstation.fleet.database.gap_ledger import parse_evictions, parse_log_end
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.store import FleetStore
from outstation.fleet.repository.signature_chain import SignatureChain
from outstation.foundation import clock
from outstation.foundation.errors import MessageRefused, StorageError, UsageError
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import PublicKey, parse_public_key
from outstation.protocol.wire.messages import (
    AlertPayload,
    AuditPayload,
    Body,
    HealthPayload,
    LoggedPayload,
    QualityPayload,
    ShadowPayload,
)
from outstation.protocol.wire.verification import VerifiedMessage, verify_message

_MAX_AUDIT_ENTRIES = 100
# A device quotes an acknowledgement in one of 60 health messages.
_QUOTATION_SEARCH = 120


class EvidenceFacts(msgspec.Struct):
    """Facts about the fleet at `as_of`. `omitted` counts entries above a limit, by kind.

    `repository_problems` has a sentence for each broken signature in the fleet's repository.
    """

    fleet: str
    as_of: str
    span: ReceivedSpan
    message_count: int
    devices: list[dict[str, Any]]
    incidents: list[IncidentRecord]
    incident_counts: Counter[tuple[str, str]]
    incident_kinds: Counter[str]
    decisions: list[DecisionRecord]
    event_counts: Counter[str]
    operational_events: Counter[str]
    running_tasks: list[RunningTask]
    bundle_history: list[BundleUsage]
    accuracy: list[AccuracyEntry]
    comparisons: list[BundleComparison]
    drift: dict[str, Any]
    audit: dict[str, Any]
    refusals: list[dict[str, Any]]
    rollouts: list[dict[str, Any]]
    phase_counts: list[dict[str, Any]]
    keys: list[TrustedKey]
    message_refs: list[MessageRef]
    unverified: int
    withheld: int
    silent_devices: list[str]
    broken_keys: list[str]
    omitted: Counter[str]
    signature_chain: SignatureChain = msgspec.field(default_factory=SignatureChain)
    repository_problems: list[str] = msgspec.field(default_factory=list)
    bundles: BundleDocuments = msgspec.field(default_factory=BundleDocuments)

    @property
    def tasks_by_digest(self) -> dict[str, int]:
        """Return bundle digest → number of tasks that run it."""
        return count_tasks_by_digest(self.running_tasks)


def count_tasks_by_digest(running_tasks: Sequence[RunningTask]) -> dict[str, int]:
    return dict(Counter(task.model.digest for task in running_tasks if task.model is not None))


class MessageVerifier:
    """Verifier of stored messages. It counts those that do not verify."""

    def __init__(self, store: FleetStore) -> None:
        self._keyring = Keyring(store)
        self.refused_count = 0

    def verify(self, row: Sequence[Any]) -> VerifiedMessage | None:
        """Return the message of a row (device, log, seq, topic, payload, jws).

        None if the device did not sign this payload for this (device, log, seq).
        """
        device, log, seq, topic, payload, jws = row
        try:
            if not (isinstance(topic, str) and isinstance(payload, bytes) and isinstance(jws, str)):
                raise MessageRefused("not stored as text and bytes")
            message = verify_message(topic, payload, (jws,), self._keyring.find_stored)
            self._keyring.require_in_bounds(message, stored=True)
            body = message.body
            if not isinstance(body, LoggedPayload) or (body.device, body.log, body.seq) != (device, log, seq):
                raise MessageRefused("other device, log or seq")
        except MessageRefused:
            self.refused_count += 1
            return None
        return message


class _Collectors:
    """Collectors of facts, which one pass over the verified messages feeds.

    `unverified`: messages and decisions that did not verify. `running`: the running tasks. `silent`: the devices whose
    newest log has no valid `health` message.
    """

    def __init__(self, as_of_us: int, newest_logs: dict[str, str]) -> None:
        self.unverified = 0
        self.running: list[RunningTask] = []
        self.silent: list[str] = []
        self._newest_logs = newest_logs
        self.incidents = IncidentCollector(as_of_us, newest_logs)
        self.declarations: list[MessageRef] = []
        self.decisions, self.comparisons = DecisionCollector(), ComparisonCollector()
        self.activations, self.accuracy = ActivationCollector(newest_logs), AccuracyCollector(newest_logs)

    def add(self, body: Body) -> None:
        if isinstance(body, AlertPayload):
            self.incidents.add(body)
        elif isinstance(body, QualityPayload):
            self.accuracy.add(body)
        elif isinstance(body, ShadowPayload):
            self.comparisons.add(body)
        elif isinstance(body, AuditPayload):
            if parse_evictions(body) or parse_log_end(body):
                self.declarations.append(MessageRef(body.device, body.log, body.seq))
            self.decisions.add(body)
            self.activations.add(body)

    def read(
        self, queries: EvidenceQueries, verifier: MessageVerifier, find_operator: Callable[[str], Signer | None]
    ) -> None:
        """Read messages, alerts of the collector, decisions and running tasks."""
        for row in queries.stream_messages():
            if (message := verifier.verify(row)) is not None:
                self.add(message.body)
        self.incidents.add_collector_alerts(queries.load_collector_alerts())
        unverified_decisions = self.decisions.add_operator_decisions(queries.load_decisions(), find_operator)
        self._read_running_tasks(queries, verifier)
        self.unverified = verifier.refused_count + unverified_decisions

    def _read_running_tasks(self, queries: EvidenceQueries, verifier: MessageVerifier) -> None:
        for device in (row["device"] for row in queries.load_devices()):
            log = self._newest_logs.get(device)
            row = queries.load_newest_message(device, log, "health") if log else None
            message = verifier.verify(row) if row else None
            if message is None or not isinstance(message.body, HealthPayload):
                self.silent.append(device)
                continue
            version = parse_agent_version(message.payload)
            self.running += self.activations.build_running_tasks(message.body, version)

    def count_omitted(self, comparisons: Sequence[BundleComparison]) -> Counter[str]:
        counts = {
            "incidents": self.incidents.omitted,
            "decisions": self.decisions.omitted,
            "metrics": self.accuracy.omitted,
            OMITTED_DECLARATIONS: max(0, len(self.declarations) - WRITE_LIMITS.declarations),
            "comparison messages": self.comparisons.omitted + sum(pair.omitted for pair in comparisons),
            "bundle activations": self.activations.omitted,
            "running tasks": max(0, len(self.running) - WRITE_LIMITS.running_tasks),
        }
        return Counter(counts)


def gather(
    store: FleetStore,
    db: Connection,
    fleet: str,
    as_of: str | None,
    roles: Sequence[TrustedKey],
    advance: Callable[[int], None] = lambda _: None,
) -> EvidenceFacts:
    """Return the facts in a snapshot `db` of the store. `roles` are keys of operators, collector and publishers.

    Raises UsageError if `as_of` precedes the newest message, or if it is None and nothing is stored.
    """
    queries = EvidenceQueries(store, db)
    first, last, count = queries.load_received_span()
    as_of = _resolve_as_of(as_of, last, store.name)
    as_of_us = clock.parse_rfc3339(as_of)
    newest_logs = dict(store.newest_logs())
    collectors = _Collectors(as_of_us, newest_logs)
    incidents, decisions = collectors.incidents, collectors.decisions
    signers = {key.kid: Signer(key.role, parse_public_key(key.key)) for key in roles if key.role == "operator"}
    collector_keys = [parse_public_key(key.key) for key in roles if key.role == "collector"]
    audit_report = _run_audit(store, [signer.key for signer in signers.values()], collector_keys, advance)
    collectors.read(queries, MessageVerifier(store), signers.get)
    rollouts = queries.load_rollouts()
    keys, broken = trusted_keys.build_device_keys(queries.load_keys())
    comparisons = collectors.comparisons.build_comparisons({row["rollout"]: row["digest"] for row in rollouts})
    facts = EvidenceFacts(
        fleet=fleet,
        as_of=as_of,
        span=ReceivedSpan(first, last),
        message_count=count,
        devices=queries.load_devices(),
        incidents=incidents.sort_by_severity(),
        incident_counts=incidents.counts,
        incident_kinds=incidents.kinds,
        decisions=decisions.sort_by_time(),
        event_counts=decisions.event_counts,
        operational_events=decisions.operational_events,
        running_tasks=collectors.running[: WRITE_LIMITS.running_tasks],
        bundle_history=collectors.activations.build_history(count_tasks_by_digest(collectors.running)),
        accuracy=collectors.accuracy.build_entries(queries.load_collector_metrics(), queries.count_labels()),
        comparisons=comparisons,
        drift=fleet_drift.build_drift(store, as_of_us),
        audit=audit_report,
        refusals=store.refusals(),
        rollouts=rollouts,
        phase_counts=queries.count_phases(),
        keys=[*roles, *keys],
        message_refs=[],
        unverified=collectors.unverified,
        withheld=decisions.withheld,
        silent_devices=collectors.silent,
        broken_keys=broken,
        omitted=collectors.count_omitted(comparisons),
    )
    declarations = collectors.declarations[-WRITE_LIMITS.declarations :]
    _refer_to_messages(facts, {*declarations} | _collect_quotations(queries, newest_logs))
    return facts


def _resolve_as_of(as_of: str | None, last_received: str | None, database: str) -> str:
    try:
        newest = clock.parse_rfc3339(last_received) if last_received else None
    except ValueError:
        raise StorageError(
            f"{database}: table messages: received {last_received!r} is not a time; restore the database"
        ) from None
    if as_of is None and last_received is None:
        raise UsageError(f"{database}: no message is stored yet, so the moment is unknown; give it with --at TIME")
    if as_of is None or last_received is None:
        return as_of or last_received or ""
    if newest is not None and clock.parse_rfc3339(as_of) < newest:
        raise UsageError(
            f"--at {as_of}: earlier than the newest message, received {last_received}; evidence covers all stored "
            "messages, so give a later time"
        )
    return as_of


def _run_audit(
    store: FleetStore, operators: Sequence[PublicKey], collectors: Sequence[PublicKey], advance: Callable[[int], None]
) -> dict[str, Any]:
    """Return the audit report. Each list holds its first entries and has a count beside it."""
    report = audit.audit(store, progress=advance, operators=operators, collectors=collectors).to_dict()
    lists = {name: report[name] for name in ("gaps", "invalid", "coverage", "evicted", "invalid_decisions")}
    undeclared = [gap for gap in report["gaps"] if not gap["declared"]]
    counts = {f"{name}_count": len(listed) for name, listed in lists.items() if name != "invalid"}
    shown = {**lists, "gaps": [*undeclared, *(gap for gap in report["gaps"] if gap["declared"])]}
    cut = {name: listed[:_MAX_AUDIT_ENTRIES] for name, listed in shown.items()}
    return {**report, **cut, **counts, "undeclared_gaps": len(undeclared)}


def _collect_quotations(queries: EvidenceQueries, newest_logs: dict[str, str]) -> set[MessageRef]:
    """Return the newest health message of each device that quotes an acknowledgement."""
    refs = set()
    for device, log in newest_logs.items():
        for seq, payload in queries.load_newest_health(device, log, _QUOTATION_SEARCH):
            if isinstance(payload, bytes) and b'"acknowledged":{' in payload:
                refs.add(MessageRef(device, log, seq))
                break
    return refs


def _refer_to_messages(facts: EvidenceFacts, others: set[MessageRef]) -> None:
    """List the messages of all facts and the `others`, up to the limit."""
    refs: set[MessageRef | None] = {*others, *(decision.message for decision in facts.decisions)}
    refs |= {ref for incident in facts.incidents for ref in (incident.raised, incident.cleared)}
    refs |= {ref for task in facts.running_tasks for ref in (task.health, task.activated)}
    refs |= {entry.message for entry in facts.accuracy}
    refs |= {ref for pair in facts.comparisons for ref in pair.messages}
    message_refs = sorted(ref for ref in refs if ref is not None)
    facts.omitted["messages"] += max(0, len(message_refs) - WRITE_LIMITS.messages)
    facts.message_refs = message_refs[: WRITE_LIMITS.messages]
