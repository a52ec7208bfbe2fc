"""Audit of rollouts: decisions, their signatures, and the tables that follow from them.

- each decision verifies with an operator's key and follows the one before (see `rollout.decisions`)
- plan, topic, state and step of each rollout are as its decisions left them
- the desired state of each topic is signed, and is the one that the newest decision about the topic published
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from outstation.fleet.database import rollouts
from outstation.fleet.database.interface import Connection
from outstation.fleet.rollout import decisions, desired_state, journal
from outstation.fleet.rollout.decisions import DecisionBody
from outstation.foundation.errors import MessageRefused, StorageError
from outstation.protocol.documents.signed_document import SignerLookup
from outstation.protocol.wire.jws import Signer, digest
from outstation.protocol.wire.keys import PublicKey


class RolloutAuditReport(msgspec.Struct):
    """Number of decisions, and problems: rollout, n (None: the whole rollout) and reason."""

    decision_count: int = 0
    invalid: list[dict[str, Any]] = msgspec.field(default_factory=list)

    def add_problem(self, rollout: Any, n: Any, reason: str) -> None:
        self.invalid.append({"rollout": to_json_value(rollout), "n": to_json_value(n), "reason": reason})


def audit_rollouts(db: Connection, operators: Sequence[PublicKey]) -> RolloutAuditReport:
    """Audit every rollout; decisions are valid only with a key of `operators`."""
    find: SignerLookup = {key.kid: Signer("operator", key) for key in operators}.get
    report = RolloutAuditReport()
    # Topic → the newest counter, and the digest of the desired state published with it.
    published: dict[str, tuple[int, str]] = {}
    for name in rollouts.list_names(db):
        rows = rollouts.load_decisions(db, name)
        report.decision_count += len(rows)
        valid, invalid = (
            decisions.verify_chain(name, rows, find) if isinstance(name, str) else ([], [(None, "is not a name")])
        )
        for n, reason in invalid:
            report.add_problem(name, n, reason)
        if problem := _check_state(db, name, valid):
            report.add_problem(name, None, problem)
        for body in valid:
            topic, counter = str(body.evidence.get("topic")), body.evidence.get("counter")
            if type(counter) is int and counter > published.get(topic, (0, ""))[0]:
                published[topic] = counter, str(body.evidence.get("desired"))
    desired = {row.topic: row for row in journal.load_all_desired(db)}
    problems = dict.fromkeys(published.keys() - desired.keys(), "is missing, although a decision published it")
    for topic, row in desired.items():
        try:
            desired_state.verify(row, find)
            if published.get(topic) != (row.counter, digest(row.payload)):
                problems[topic] = "is not the one that the newest decision about it published"
        except MessageRefused as refused:
            problems[topic] = f"does not verify: {refused}"
    for topic, problem in problems.items():
        report.add_problem(None, None, f"desired on {topic}: {problem}")
    return report


def _check_state(db: Connection, name: str, verified_decisions: Sequence[DecisionBody]) -> str:
    """Return how the rollout differs from what its decisions left; "" if it does not."""
    if not verified_decisions:
        return "has no valid decision"
    try:
        rollout = next((rollout for rollout in journal.load_rollouts(db) if rollout.name == name), None)
    except StorageError as error:
        return str(error)
    if rollout is None:
        return "has decisions, but is missing in table rollouts"
    plan = msgspec.json.decode(msgspec.json.encode(rollout.plan))
    signed = verified_decisions[0].evidence.get("plan")
    if verified_decisions[0].event != "started" or plan != signed or rollout.started != verified_decisions[0].time:
        return "has another plan than the one that was started"
    last = verified_decisions[-1].evidence
    for member, stored in (("state", rollout.state), ("step", rollout.step), ("topic", rollout.topic)):
        if last.get(member) != stored:
            return f"is stored with {member} {stored!r}, its last decision left it with {last.get(member)!r}"
    return ""


def to_json_value(part: Any) -> Any:
    """Return a stored value of any type as a JSON value."""
    if isinstance(part, str):
        return part.encode(errors="backslashreplace").decode()
    return part if part is None or isinstance(part, int) else repr(part)
