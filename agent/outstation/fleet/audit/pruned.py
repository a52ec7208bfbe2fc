"""Retention statement: what `fleet db prune` removed of a device, signed with the collector's key.

Its state is that of an audit of all that went, so that an audit continues from there: the last digest of each chain,
gaps and coverage so far, the rows that several messages gave, and the alerts that are still open. Each statement
replaces the one before and names its digest; only the newest has a state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from outstation.fleet.audit.checkpoint import LogState
from outstation.fleet.database.interface import LogId
from outstation.fleet.database.schema.message_tables import ALERTS
from outstation.fleet.database.store import Devices, FleetStore
from outstation.foundation import decoders
from outstation.foundation.errors import MessageRefused
from outstation.protocol.documents.signed_document import DocumentKind, SignedDocument, SignerLookup
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import PublicKey


class PrunedLog(msgspec.Struct, frozen=True):
    """A log whose messages up to `through` went, with `digest` the chain's digest there.

    `messages` and `kinds` count all that ever went; `removed` is the SHA-256 of the topics, payloads and tokens of
    those from seq `first` on, which went last.
    """

    log: str
    first: int
    through: int
    digest: str | None
    messages: int
    kinds: dict[str, int]
    removed: str


class PrunedTable(msgspec.Struct, frozen=True):
    """Rows of one table that went although their messages may be stored: those of messages up to `through`."""

    log: str
    through: int
    rows: int


class Statement(msgspec.Struct, frozen=True):
    """`before`: what had arrived before these times went, by the kind of row. `state`: SHA-256 of the state."""

    fleet: str
    device: str
    n: int
    prev: str
    time: str
    before: dict[str, str]
    logs: list[PrunedLog]
    tables: dict[str, list[PrunedTable]]
    state: str
    v: int = 1


class PrunedState(msgspec.Struct, frozen=True):
    """`tables`: rows by table, as the audit derives them; `alerts`: rows of pruned messages that are still open."""

    logs: dict[str, LogState]
    tables: dict[str, list[list[Any]]]
    alerts: list[list[Any]]


class LogBase(msgspec.Struct):
    """Point at which the audit of a pruned log begins; `floors`: table → seq up to which its rows were pruned."""

    state: LogState = msgspec.field(default_factory=LogState)
    floors: dict[str, int] = {}


class PrunedDevice:
    """The newest statement of a device, verified, and its state."""

    def __init__(self, statement: Statement, payload: bytes, state: bytes) -> None:
        self.statement, self.payload, self._state = statement, payload, state

    def read_state(self) -> PrunedState:
        """Return a copy of the state: an audit changes its own."""
        return decoders.from_json(self._state, PrunedState)

    def read_bases(self) -> dict[LogId, LogBase]:
        """Return where the audit of each log begins."""
        device = self.statement.device
        bases = {(device, log): LogBase(state) for log, state in self.read_state().logs.items()}
        for table, logs in self.statement.tables.items():
            for pruned in logs:
                bases.setdefault((device, pruned.log), LogBase()).floors[table] = pruned.through
        return bases

    def read_alerts(self) -> dict[tuple[str, str, int], tuple[Any, ...]]:
        """Return the rows of alerts that are open although their messages went, by message."""
        names = ALERTS.names
        log, seq = names.index("log"), names.index("seq")
        return {(self.statement.device, row[log], row[seq]): tuple(row) for row in self.read_state().alerts}

    def to_report(self) -> list[dict[str, Any]]:
        """Return what went, a log or table of a log each, as the audit reports it."""
        statement = self.statement
        head = {"device": statement.device, "time": statement.time}
        logs = [
            {**head, "log": log.log, "table": "messages", "through": log.through, "count": log.messages}
            for log in statement.logs
        ]
        tables = [
            {**head, "log": log.log, "table": table, "through": log.through, "count": log.rows}
            for table, pruned in statement.tables.items()
            for log in pruned
        ]
        return [*logs, *tables]


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


KIND = DocumentKind(Statement, "outstation/{}/retention", digest=digest)


def verify_statement(payload: bytes, token: str, find_signer: SignerLookup) -> Statement:
    """Return a statement that a collector signed, for the fleet that it names. Raises MessageRefused."""
    statement = KIND.parse(payload)
    KIND.check(SignedDocument(payload, token), find_signer, statement.fleet)
    return statement


def verify(device: str, rows: Sequence[tuple[Any, ...]], collectors: Sequence[PublicKey]) -> PrunedDevice:
    """Verify the statements (n, payload, jws, state) of a device, oldest first. Raises MessageRefused."""
    signers: Mapping[str, Signer] = {key.kid: Signer("collector", key) for key in collectors}
    newest, statement = None, None
    for n, payload, token, _ in rows:
        statement = verify_statement(payload, token, signers.get)
        number, prev = KIND.find_next_place(newest)
        if (n, statement.n, statement.device, statement.prev) != (number, number, device, prev):
            raise MessageRefused("other statement", f"statement {number} does not follow the one before")
        newest = number, payload
    _, payload, _, state = rows[-1]
    if statement is None or not isinstance(state, bytes) or digest(state) != statement.state:
        raise MessageRefused("other state", "the state of the newest statement is not the one that was signed")
    return PrunedDevice(statement, payload, state)


def load(
    store: FleetStore, devices: Devices, collectors: Sequence[PublicKey]
) -> tuple[dict[str, PrunedDevice], dict[str, str]]:
    """Return the pruned devices, and the problem of each device whose statements do not verify."""
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for device, *row in store.retention_rows(devices):
        rows.setdefault(device, []).append(tuple(row))
    verified: dict[str, PrunedDevice] = {}
    problems: dict[str, str] = {}
    for device, statements in rows.items():
        try:
            verified[device] = verify(device, statements, collectors)
        except MessageRefused as refused:
            problems[device] = f"its retention statements do not verify: {refused}"
    return verified, problems
