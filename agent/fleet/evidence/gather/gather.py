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
from agent.errors import Refused, StorageError, UsageError
from agent.fleet.audit import audit
from agent.fleet.database.interface import Connection
from agent.fleet.database.store import FleetStore
from agent.fleet.evidence.contents import Compared, Decision, Incident, Measured, Place, Ran, Running
from agent.fleet.evidence.gather import drift as drifting
from agent.fleet.evidence.gather import trusted_keys
from agent.fleet.evidence.gather.accuracy import Accuracy
from agent.fleet.evidence.gather.bundles import Bundles
from agent.fleet.evidence.gather.comparisons import Comparisons
from agent.fleet.evidence.gather.database import Reading
from agent.fleet.evidence.gather.decisions import Decisions
from agent.fleet.evidence.gather.deployments import Activations, agent_version
from agent.fleet.evidence.gather.incidents import Incidents
from agent.fleet.evidence.limits import MOST
from agent.fleet.evidence.manifest import Key, Span
from agent.fleet.keyring import Keyring
from agent.fleet.repository.signature_chain import Chain
from agent.wire.jws import Signer
from agent.wire.keys import PublicKey, public_key
from agent.wire.messages import Alerts, Audit, Health, Logged, Message, Quality, Shadow, open_message

_MOST_AUDITED = 100


class Facts(msgspec.Struct):
    """What is known of the fleet at `at`. `left_out`: how many of each were too many.

    `unpublished`: why what the repository holds is not signed as it should be, in words.
    """

    fleet: str
    at: str
    span: Span
    messages: int
    devices: list[dict[str, Any]]
    incidents: list[Incident]
    incident_counts: Counter[tuple[str, str]]
    incident_kinds: Counter[str]
    decisions: list[Decision]
    events: Counter[str]
    happened: Counter[str]
    running: list[Running]
    history: list[Ran]
    measured: list[Measured]
    compared: list[Compared]
    drift: dict[str, Any]
    audit: dict[str, Any]
    refusals: list[dict[str, Any]]
    rollouts: list[dict[str, Any]]
    phases: list[dict[str, Any]]
    keys: list[Key]
    places: list[Place]
    unverified: int
    private: int
    silent: list[str]
    broken_keys: list[str]
    left_out: Counter[str]
    published: Chain = msgspec.field(default_factory=Chain)
    unpublished: list[str] = msgspec.field(default_factory=list)
    bundles: Bundles = msgspec.field(default_factory=Bundles)

    @property
    def models(self) -> dict[str, int]:
        """How many tasks of devices run a bundle, by its digest."""
        return models_of(self.running)


def models_of(running: Sequence[Running]) -> dict[str, int]:
    return dict(Counter(one.model.digest for one in running if one.model is not None))


class Verified:
    """Stored messages, opened again; what does not verify is counted."""

    def __init__(self, store: FleetStore) -> None:
        self._keyring = Keyring(store)
        self.refused = 0

    def open(self, row: Sequence[Any]) -> Message | None:
        """Of (device, log, seq, topic, payload, jws); None where it is not what the device signed for this place."""
        device, log, seq, topic, payload, jws = row
        try:
            if not (isinstance(topic, str) and isinstance(payload, bytes) and isinstance(jws, str)):
                raise Refused("not stored as text and bytes")
            message = open_message(topic, payload, (jws,), self._keyring.find_stored)
            self._keyring.require_in_bounds(message, stored=True)
            body = message.body
            if not isinstance(body, Logged) or (body.device, body.log, body.seq) != (device, log, seq):
                raise Refused("another place")
        except Refused:
            self.refused += 1
            return None
        return message


def gather(
    store: FleetStore,
    db: Connection,
    fleet: str,
    at: str | None,
    roles: Sequence[Key],
    advance: Callable[[int], None] = lambda _: None,
) -> Facts:
    """`db` is what the store's `snapshot` gives. `roles`: keys of the operator, the collector and publishers.

    Raises UsageError where `at` is before what is stored, or nothing tells the time.
    """
    reading = Reading(store, db)
    first, last, count = reading.span()
    at = _moment(at, last, store.name)
    at_us = clock.epoch_us(at)
    newest = reading.newest_logs()
    names = {key.kid: key.owner for key in roles if key.role == "operator"}
    verified, incidents = Verified(store), Incidents(at_us, newest)
    decisions, activations, accuracy = Decisions(names), Activations(newest), Accuracy(newest)
    comparisons = Comparisons()
    signers = {key.kid: Signer(key.role, public_key(key.key)) for key in roles if key.role == "operator"}
    audited = _audited(store, [signer.key for signer in signers.values()], advance)
    for row in reading.told():
        message = verified.open(row)
        body = message.body if message is not None else None
        if isinstance(body, Alerts):
            incidents.add(body)
        elif isinstance(body, Quality):
            accuracy.add(body)
        elif isinstance(body, Shadow):
            comparisons.add(body)
        elif isinstance(body, Audit):
            decisions.add(body)
            activations.add(body)
    incidents.add_collectors(reading.collector_alerts())
    forged = decisions.add_operators(reading.decisions(), signers.get)
    running, silent = _running(reading, verified, activations, newest)
    measured = accuracy.all(reading.collector_metrics(), reading.labels())
    rollouts = reading.rollouts()
    keys, broken = trusted_keys.of_devices(reading.keys())
    facts = Facts(
        fleet=fleet,
        at=at,
        span=Span(first, last),
        messages=count,
        devices=reading.devices(),
        incidents=incidents.worst(),
        incident_counts=incidents.counts,
        incident_kinds=incidents.kinds,
        decisions=decisions.in_order(),
        events=decisions.events,
        happened=decisions.happened,
        running=running[: MOST.running],
        history=activations.history(models_of(running)),
        measured=measured,
        compared=comparisons.all({row["rollout"]: row["digest"] for row in rollouts}),
        drift=drifting.chapters(store, at_us),
        audit=audited,
        refusals=reading.refusals(),
        rollouts=rollouts,
        phases=reading.phases(),
        keys=[*roles, *keys],
        places=[],
        unverified=verified.refused + forged,
        private=decisions.private,
        silent=silent,
        broken_keys=broken,
        left_out=Counter(),
    )
    counts = {"incidents": incidents.left_out, "decisions": decisions.left_out, "metrics": accuracy.left_out}
    counts["messages of comparisons"] = comparisons.left_out + sum(one.left_out for one in facts.compared)
    counts["activations of bundles"] = activations.left_out
    facts.left_out.update({**counts, "running tasks": max(0, len(running) - MOST.running)})
    places = sorted(_relied_on(facts))
    facts.left_out["messages"] += max(0, len(places) - MOST.messages)
    facts.places = places[: MOST.messages]
    return facts


def _moment(at: str | None, last: str | None, database: str) -> str:
    try:
        newest = clock.epoch_us(last) if last else None
    except ValueError:
        raise StorageError(f"{database}: table messages: received {last!r} is no time; restore the database") from None
    if at is None and last is None:
        raise UsageError(f"{database}: nothing was collected yet, so that no message tells the time; say it: --at TIME")
    if at is None or last is None:
        return at or last or ""
    if newest is not None and clock.epoch_us(at) < newest:
        raise UsageError(f"--at {at}: the newest message came at {last}; evidence is of all that is stored")
    return at


def _running(
    reading: Reading, verified: Verified, activations: Activations, newest: dict[str, str]
) -> tuple[list[Running], list[str]]:
    """What runs, and the devices that never told in their newest log."""
    found: list[Running] = []
    silent: list[str] = []
    for device in (row["device"] for row in reading.devices()):
        log = newest.get(device)
        row = reading.newest(device, log, "health") if log else None
        message = verified.open(row) if row else None
        if message is None or not isinstance(message.body, Health):
            silent.append(device)
            continue
        found += activations.running(message.body, agent_version(message.payload))
    return found, silent


def _audited(store: FleetStore, operators: Sequence[PublicKey], advance: Callable[[int], None]) -> dict[str, Any]:
    """The audit's report; of what is wrong, the first of each kind, and how many there are."""
    report = audit.audit(store, progress=advance, operators=operators).document()
    lists = {name: report[name] for name in ("gaps", "invalid", "coverage", "evicted", "invalid_decisions")}
    undeclared = [gap for gap in report["gaps"] if not gap["declared"]]
    counts = {f"{name}_count": len(listed) for name, listed in lists.items() if name != "invalid"}
    shown = {**lists, "gaps": [*undeclared, *(gap for gap in report["gaps"] if gap["declared"])]}
    cut = {name: listed[:_MOST_AUDITED] for name, listed in shown.items()}
    return {**report, **cut, **counts, "undeclared_gaps": len(undeclared)}


def _relied_on(facts: Facts) -> set[Place]:
    found: set[Place | None] = {one.place for one in facts.decisions}
    found |= {place for one in facts.incidents for place in (one.raised, one.cleared)}
    found |= {place for one in facts.running for place in (one.health, one.activated)}
    found |= {one.place for one in facts.measured}
    found |= {place for one in facts.compared for place in one.places}
    return {place for place in found if place is not None}
