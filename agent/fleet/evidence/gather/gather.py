"""Everything that the page and the files of a folder tell, gathered in one pass over the signed messages.

- what is told of a device comes from messages that verify here and now; those that do not are counted, not believed
- of what is too much the worst or the newest stays, and how much was left out is counted
- payloads are not held: which messages the folder relies on is remembered by their places, and read again
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent import clock
from agent.errors import MessageRefused, StorageError, UsageError
from agent.fleet.audit import audit
from agent.fleet.database.evidence import EvidenceQueries
from agent.fleet.database.interface import Connection
from agent.fleet.database.store import FleetStore
from agent.fleet.evidence.format.contents import (
    WRITE_LIMITS,
    AccuracyEntry,
    BundleComparison,
    BundleUsage,
    DecisionRecord,
    Incident,
    MessageRef,
    RunningTask,
)
from agent.fleet.evidence.format.manifest import ReceivedSpan, TrustedKey
from agent.fleet.evidence.gather import drift as drifting
from agent.fleet.evidence.gather import trusted_keys
from agent.fleet.evidence.gather.accuracy import AccuracyCollector
from agent.fleet.evidence.gather.bundles import BundleDocuments
from agent.fleet.evidence.gather.comparisons import ComparisonCollector
from agent.fleet.evidence.gather.decisions import DecisionCollector
from agent.fleet.evidence.gather.deployments import ActivationCollector, parse_agent_version
from agent.fleet.evidence.gather.incidents import IncidentCollector
from agent.fleet.keyring import Keyring
from agent.fleet.repository.signature_chain import SignatureChain
from agent.wire.jws import Signer
from agent.wire.keys import PublicKey, parse_public_key
from agent.wire.messages import (
    AlertPayload,
    AuditPayload,
    HealthPayload,
    LoggedPayload,
    QualityPayload,
    ShadowPayload,
    VerifiedMessage,
    verify_message,
)

_MAX_AUDIT_ENTRIES = 100


class EvidenceFacts(msgspec.Struct):
    """What is known of the fleet at `at`. `left_out`: how many of each were too many.

    `unpublished`: why what the repository holds is not signed as it should be, in words.
    """

    fleet: str
    as_of: str
    span: ReceivedSpan
    message_count: int
    devices: list[dict[str, Any]]
    incidents: list[Incident]
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
        """How many tasks of devices run a bundle, by its digest."""
        return count_tasks_by_digest(self.running_tasks)


def count_tasks_by_digest(running_tasks: Sequence[RunningTask]) -> dict[str, int]:
    return dict(Counter(one.model.digest for one in running_tasks if one.model is not None))


class MessageVerifier:
    """Stored messages, opened again; what does not verify is counted."""

    def __init__(self, store: FleetStore) -> None:
        self._keyring = Keyring(store)
        self.refused_count = 0

    def verify(self, row: Sequence[Any]) -> VerifiedMessage | None:
        """Of (device, log, seq, topic, payload, jws); None where it is not what the device signed for this place."""
        device, log, seq, topic, payload, jws = row
        try:
            if not (isinstance(topic, str) and isinstance(payload, bytes) and isinstance(jws, str)):
                raise MessageRefused("not stored as text and bytes")
            message = verify_message(topic, payload, (jws,), self._keyring.find_stored)
            self._keyring.require_in_bounds(message, stored=True)
            body = message.body
            if not isinstance(body, LoggedPayload) or (body.device, body.log, body.seq) != (device, log, seq):
                raise MessageRefused("another place")
        except MessageRefused:
            self.refused_count += 1
            return None
        return message


def gather(
    store: FleetStore,
    db: Connection,
    fleet: str,
    as_of: str | None,
    roles: Sequence[TrustedKey],
    advance: Callable[[int], None] = lambda _: None,
) -> EvidenceFacts:
    """`db` is what the store's `snapshot` gives. `roles`: keys of the operator, the collector and publishers.

    Raises UsageError where `at` is before what is stored, or nothing tells the time.
    """
    reading = EvidenceQueries(store, db)
    first, last, count = reading.load_received_span()
    as_of = _resolve_as_of(as_of, last, store.name)
    at_us = clock.parse_rfc3339(as_of)
    newest = reading.load_newest_logs()
    names = {key.kid: key.owner for key in roles if key.role == "operator"}
    verified, incidents = MessageVerifier(store), IncidentCollector(at_us, newest)
    decisions, activations, accuracy = DecisionCollector(names), ActivationCollector(newest), AccuracyCollector(newest)
    comparisons = ComparisonCollector()
    signers = {key.kid: Signer(key.role, parse_public_key(key.key)) for key in roles if key.role == "operator"}
    audited = _run_audit(store, [signer.key for signer in signers.values()], advance)
    for row in reading.stream_messages():
        message = verified.verify(row)
        body = message.body if message is not None else None
        if isinstance(body, AlertPayload):
            incidents.add(body)
        elif isinstance(body, QualityPayload):
            accuracy.add(body)
        elif isinstance(body, ShadowPayload):
            comparisons.add(body)
        elif isinstance(body, AuditPayload):
            decisions.add(body)
            activations.add(body)
    incidents.add_collector_alerts(reading.load_collector_alerts())
    forged = decisions.add_operator_decisions(reading.load_decisions(), signers.get)
    running, silent = _gather_running_tasks(reading, verified, activations, newest)
    measured = accuracy.build_entries(reading.load_collector_metrics(), reading.count_labels())
    rollouts = reading.load_rollouts()
    keys, broken = trusted_keys.build_device_keys(reading.load_keys())
    facts = EvidenceFacts(
        fleet=fleet,
        as_of=as_of,
        span=ReceivedSpan(first, last),
        message_count=count,
        devices=reading.load_devices(),
        incidents=incidents.sort_by_severity(),
        incident_counts=incidents.counts,
        incident_kinds=incidents.kinds,
        decisions=decisions.sort_by_time(),
        event_counts=decisions.event_counts,
        operational_events=decisions.operational_events,
        running_tasks=running[: WRITE_LIMITS.running_tasks],
        bundle_history=activations.build_history(count_tasks_by_digest(running)),
        accuracy=measured,
        comparisons=comparisons.build_comparisons({row["rollout"]: row["digest"] for row in rollouts}),
        drift=drifting.build_drift(store, at_us),
        audit=audited,
        refusals=reading.load_refusals(),
        rollouts=rollouts,
        phase_counts=reading.count_phases(),
        keys=[*roles, *keys],
        message_refs=[],
        unverified=verified.refused_count + forged,
        withheld=decisions.withheld,
        silent_devices=silent,
        broken_keys=broken,
        omitted=Counter(),
    )
    counts = {"incidents": incidents.omitted, "decisions": decisions.omitted, "metrics": accuracy.omitted}
    counts["messages of comparisons"] = comparisons.omitted + sum(one.left_out for one in facts.comparisons)
    counts["activations of bundles"] = activations.omitted
    facts.omitted.update({**counts, "running tasks": max(0, len(running) - WRITE_LIMITS.running_tasks)})
    places = sorted(_collect_message_refs(facts))
    facts.omitted["messages"] += max(0, len(places) - WRITE_LIMITS.messages)
    facts.message_refs = places[: WRITE_LIMITS.messages]
    return facts


def _resolve_as_of(as_of: str | None, last_received: str | None, database: str) -> str:
    try:
        newest = clock.parse_rfc3339(last_received) if last_received else None
    except ValueError:
        raise StorageError(
            f"{database}: table messages: received {last_received!r} is no time; restore the database"
        ) from None
    if as_of is None and last_received is None:
        raise UsageError(f"{database}: nothing was collected yet, so that no message tells the time; say it: --at TIME")
    if as_of is None or last_received is None:
        return as_of or last_received or ""
    if newest is not None and clock.parse_rfc3339(as_of) < newest:
        raise UsageError(f"--at {as_of}: the newest message came at {last_received}; evidence is of all that is stored")
    return as_of


def _gather_running_tasks(
    queries: EvidenceQueries, verifier: MessageVerifier, activations: ActivationCollector, newest_logs: dict[str, str]
) -> tuple[list[RunningTask], list[str]]:
    """What runs, and the devices that never told in their newest log."""
    found: list[RunningTask] = []
    silent: list[str] = []
    for device in (row["device"] for row in queries.load_devices()):
        log = newest_logs.get(device)
        row = queries.load_newest_message(device, log, "health") if log else None
        message = verifier.verify(row) if row else None
        if message is None or not isinstance(message.body, HealthPayload):
            silent.append(device)
            continue
        found += activations.build_running_tasks(message.body, parse_agent_version(message.payload))
    return found, silent


def _run_audit(store: FleetStore, operators: Sequence[PublicKey], advance: Callable[[int], None]) -> dict[str, Any]:
    """The audit's report; of what is wrong, the first of each kind, and how many there are."""
    report = audit.audit(store, progress=advance, operators=operators).to_dict()
    lists = {name: report[name] for name in ("gaps", "invalid", "coverage", "evicted", "invalid_decisions")}
    undeclared = [gap for gap in report["gaps"] if not gap["declared"]]
    counts = {f"{name}_count": len(listed) for name, listed in lists.items() if name != "invalid"}
    shown = {**lists, "gaps": [*undeclared, *(gap for gap in report["gaps"] if gap["declared"])]}
    cut = {name: listed[:_MAX_AUDIT_ENTRIES] for name, listed in shown.items()}
    return {**report, **cut, **counts, "undeclared_gaps": len(undeclared)}


def _collect_message_refs(facts: EvidenceFacts) -> set[MessageRef]:
    found: set[MessageRef | None] = {one.place for one in facts.decisions}
    found |= {place for one in facts.incidents for place in (one.raised, one.cleared)}
    found |= {place for one in facts.running_tasks for place in (one.health, one.activated)}
    found |= {one.place for one in facts.accuracy}
    found |= {place for one in facts.comparisons for place in one.places}
    return {place for place in found if place is not None}
