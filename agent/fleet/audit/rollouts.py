"""The audit of roll-outs: what was decided, by whom, and whether the tables say what was signed.

- every decision verifies with a key of an operator and follows the one before (see `decisions`)
- each roll-out is as its decisions left it: plan, topic, state and step
- what is desired on a topic is signed, and is what the newest decision about that topic published
- tables shadows and rollout_devices, which roll-outs are judged by, hold what the messages say
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from agent.errors import MessageRefused, StorageError
from agent.fleet.database.interface import Connection
from agent.fleet.database.rollout_tables import COLUMNS, build_phase_rows, build_shadow_row
from agent.fleet.rollout import decisions, journal
from agent.fleet.rollout import desired_state as wishes
from agent.fleet.rollout.decisions import DecisionBody, SignerLookup
from agent.wire.jws import Signer
from agent.wire.keys import PublicKey
from agent.wire.messages import AuditPayload, ShadowPayload, decode, digest

MessageKey = tuple[Any, Any, Any]


class RolloutAuditReport(msgspec.Struct):
    """`invalid`: rollout, n (None: of all of it) and reason."""

    decision_count: int = 0
    invalid: list[dict[str, Any]] = msgspec.field(default_factory=list)

    def add_problem(self, rollout: Any, n: Any, reason: str) -> None:
        self.invalid.append({"rollout": _printable(rollout), "n": _printable(n), "reason": reason})


def audit_rollouts(db: Connection, operators: Sequence[PublicKey]) -> RolloutAuditReport:
    """Of every roll-out; `operators`: whose decisions count."""
    find: SignerLookup = {key.kid: Signer("operator", key) for key in operators}.get
    found = RolloutAuditReport()
    # Of each topic, the newest counter and the digest of what was published with it.
    told: dict[str, tuple[int, str]] = {}
    names = db.execute("SELECT rollout FROM rollouts UNION SELECT rollout FROM decisions ORDER BY rollout").fetchall()
    for (name,) in names:
        rows = journal.load_decision_rows(db, name)
        found.decision_count += len(rows)
        good, wrong = (
            decisions.verify_chain(name, rows, find) if isinstance(name, str) else ([], [(None, "is no name")])
        )
        for n, reason in wrong:
            found.add_problem(name, n, reason)
        if problem := _check_state(db, name, good):
            found.add_problem(name, None, problem)
        for body in good:
            topic, counter = str(body.evidence.get("topic")), body.evidence.get("counter")
            if type(counter) is int and counter > told.get(topic, (0, ""))[0]:
                told[topic] = counter, str(body.evidence.get("desired"))
    for topic, problem in _check_desired(db, told, find):
        found.add_problem(None, None, f"desired on {topic}: {problem}")
    return found


def check_projection(db: Connection, device: str | None) -> Iterator[tuple[MessageKey, str]]:
    """(device, log, seq) of each message that the tables of roll-outs do not hold as it is, and in what."""
    for table in ("shadows", "rollout_devices"):
        where, values = ("WHERE t.device = ?", (device,)) if device else ("", ())
        columns = ", ".join(f"t.{name}" for name in COLUMNS[table])
        sql = f"SELECT {columns}, m.payload FROM {table} t LEFT JOIN messages m USING (device, log, seq) {where}"
        for *row, payload in db.execute(sql, values):
            if tuple(row) not in _project_payload(payload):
                yield (row[0], row[-2], row[-1]), f"is not what table {table} holds for it"
    for table, what in (("shadows", "m.kind = 'shadow'"), ("rollout_devices", "m.kind = 'audit'")):
        sql = f"""
            SELECT m.device, m.log, m.seq, m.payload FROM messages m LEFT JOIN {table} t USING (device, log, seq)
            WHERE {what} AND t.device IS NULL AND (CAST(? AS TEXT) IS NULL OR m.device = ?)"""
        for *key, payload in db.execute(sql, (device, device)):
            if _project_payload(payload):
                yield (key[0], key[1], key[2]), f"is missing in table {table}"


def _project_payload(payload: Any) -> Iterable[tuple[Any, ...]]:
    try:
        body = decode(payload) if isinstance(payload, bytes) else None
    except MessageRefused:
        return []
    if isinstance(body, ShadowPayload):
        return [build_shadow_row(body, payload)]
    return build_phase_rows(body) if isinstance(body, AuditPayload) else []


def _check_state(db: Connection, name: str, verified_decisions: Sequence[DecisionBody]) -> str:
    """In what the roll-out is not as its decisions left it."""
    if not verified_decisions:
        return "no decision of it can be believed"
    try:
        rollout = next((one for one in journal.load_rollouts(db) if one.name == name), None)
    except StorageError as error:
        return str(error)
    if rollout is None:
        return "is decided about, but is in table rollouts no more"
    plan = msgspec.json.decode(msgspec.json.encode(rollout.plan))
    signed = verified_decisions[0].evidence.get("plan")
    if verified_decisions[0].event != "started" or plan != signed or rollout.started != verified_decisions[0].time:
        return "its plan is not the one that was started"
    last = verified_decisions[-1].evidence
    for what, stored in (("state", rollout.state), ("step", rollout.step), ("topic", rollout.topic)):
        if last.get(what) != stored:
            return f"is stored with {what} {stored!r}, its last decision left it with {last.get(what)!r}"
    return ""


def _check_desired(
    db: Connection, published: dict[str, tuple[int, str]], find_signer: SignerLookup
) -> Iterator[tuple[str, str]]:
    rows = {row.topic: row for row in journal.load_all_desired(db)}
    for topic, row in rows.items():
        try:
            wishes.verify(row, find_signer)
        except MessageRefused as refused:
            yield topic, f"does not verify: {refused}"
            continue
        if published.get(topic) != (row.counter, digest(row.payload)):
            yield topic, "is not what the newest decision about it published"
    for topic in published.keys() - rows.keys():
        yield topic, "is missing, though a decision published it"


def _printable(part: Any) -> Any:
    if isinstance(part, str):
        return part.encode(errors="backslashreplace").decode()
    return part if part is None or isinstance(part, int) else repr(part)
