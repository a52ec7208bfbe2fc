"""What is given up is declared by the transaction that gives it up: a signed `audit` message, event "evicted".

Its evidence names messages, {"seq": [[first, last], …]}, or readings, {"stream", "rows": [[first, last], …], "used",
"tasks"}, with "reason" and "bytes". A declaration that is not acknowledged yet is folded into the next one of its kind,
which then lists its seq too: weeks of evictions make one message. One that would be too large for the broker is split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from agent.alerts import DAMAGED_MESSAGES
from agent.clock import ClockReading
from agent.device.store import ranges
from agent.device.store.message_log import MessageLog
from agent.device.store.ranges import Ranges
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.wire.messages import encode

EVENT = "evicted"
NO_ROOM, ACKNOWLEDGED_EARLIER, DAMAGED = "no room", "acknowledged earlier", "damaged"
# In table meta: the newest declaration of each kind.
OPEN_DECLARATIONS = "evicted"
# The members that every message carries, and the event, at their longest.
_HEADER_BYTES = 700
_RANGE_BYTES = len("[9007199254740991,9007199254740991],")
_REASON_TEXTS = {
    NO_ROOM: "the store is full; give it more room ([buffer] max_size) or see why nothing is delivered",
    ACKNOWLEDGED_EARLIER: "the collector asks for them again, but acknowledged them earlier; they are no longer kept",
    DAMAGED: "they cannot be read back; check the card",
}


def declare_messages(
    tx: Transaction,
    message_log: MessageLog,
    now: ClockReading,
    seqs: Ranges,
    reason: str,
    size: int = 0,
    acknowledgement: Mapping[str, Any] | None = None,
) -> None:
    """Declare messages that are in the outbox no more; `proof` is the earlier acknowledgement, where there was one."""
    more = {"acknowledgement": acknowledgement} if acknowledgement else {}
    _declare(tx, message_log, now, f"messages, {reason}", "seq", seqs, {"reason": reason, "bytes": size, **more})


def declare_readings(
    tx: Transaction,
    message_log: MessageLog,
    now: ClockReading,
    stream: str,
    rows: Ranges,
    reason: str,
    size: int = 0,
    *,
    used: bool,
    tasks: Sequence[str] = (),
) -> None:
    """Declare readings that are in the store no more; `tasks` have not used them and never will."""
    members = {"stream": stream, "used": used, "tasks": list(tasks), "reason": reason, "bytes": size}
    kind = json.dumps([stream, used, list(tasks), reason])
    _declare(tx, message_log, now, kind, "rows", rows, members)


def declared_seqs(tx: Transaction) -> list[tuple[int, int]]:
    """The messages that the newest declaration of each kind lists, as far as it is still what was written."""
    payloads = (tx.outbox.payload(seq) for seq in json.loads(tx.get_meta(OPEN_DECLARATIONS, "{}")).values())
    listed = (json.loads(payload)["evidence"].get("seq", []) for payload in payloads if payload is not None)
    return ranges.union((first, last) for pairs in listed for first, last in pairs)


def _declare(
    tx: Transaction,
    message_log: MessageLog,
    now: ClockReading,
    kind: str,
    name: str,
    given_up: Ranges,
    members: dict[str, Any],
) -> None:
    if not given_up:
        return
    newest = json.loads(tx.get_meta(OPEN_DECLARATIONS, "{}"))
    # In a small store a transaction cannot hold the old one and a new one of any length.
    most = min(message_log.max_bytes, tx.remaining_bytes // 4) - _HEADER_BYTES
    folded = _fold_into_earlier(tx, newest.get(kind), name, given_up, members)
    if folded is not None and _fits(folded, most):
        tx.outbox.delete([newest[kind]])
        parts = [folded]
    else:
        parts = _split(name, given_up, members, most)
    for evidence in parts:
        body = {"event": EVENT, "summary": _summary(evidence, name), "evidence": evidence}
        newest[kind] = message_log.append(tx, "audit", None, body, now)
    tx.set_meta(OPEN_DECLARATIONS, json.dumps(newest))


def _fold_into_earlier(
    tx: Transaction, earlier: int | None, name: str, given_up: Ranges, members: dict[str, Any]
) -> dict[str, Any] | None:
    """One evidence for what the `earlier` message declares and for `given_up`; None where it is too late for that."""
    if earlier is None or earlier in tx.outbox.acknowledged or (payload := tx.outbox.payload(earlier)) is None:
        return None
    old = json.loads(payload)["evidence"]
    listed = {key: [(first, last) for first, last in old.get(key, [])] for key in ("seq", "rows")}
    listed[name] += given_up
    listed["seq"].append((earlier, earlier))
    both = {key: ranges.union(found) for key, found in listed.items() if found}
    return {**old, **members, **both, "bytes": old["bytes"] + members["bytes"]}


def _split(name: str, given_up: Ranges, members: dict[str, Any], max_bytes: int) -> list[dict[str, Any]]:
    if not _fits({**members, name: [[2**53, 2**53]]}, max_bytes):
        # Only an acknowledgement is that long; its digest is in the collector's own hands.
        members = {key: value for key, value in members.items() if key != "acknowledgement"}
    count = max(1, (max_bytes - len(encode(members))) // _RANGE_BYTES)
    parts = []
    for start in range(0, len(given_up), count):
        parts.append({**members, name: [list(pair) for pair in given_up[start : start + count]]})
        members = {**members, "bytes": 0}
    return parts


def _fits(evidence: dict[str, Any], max_bytes: int) -> bool:
    return len(encode(evidence)) <= max_bytes


def _summary(evidence: dict[str, Any], name: str) -> str:
    count, first, last = ranges.count(evidence[name]), evidence[name][0][0], evidence[name][-1][1]
    why, size = _REASON_TEXTS[evidence["reason"]], f", {evidence['bytes'] / 2**20:.1f} MiB" if evidence["bytes"] else ""
    if name == "seq":
        return f"Gave up {count} messages, {first} to {last}{size}: {why}."
    fate = "used" if evidence["used"] else "not used by " + ", ".join(evidence["tasks"])
    return f"Gave up {count} readings of {evidence['stream']}, rows {first} to {last}{size}, {fate}: {why}."[:2000]


_MAX_LISTED = 50


def quarantine_damaged(store: Store, message_log: MessageLog, seqs: Sequence[int], now: ClockReading) -> None:
    """Set messages aside that do not have their CRC, and say so in the log. Raises StorageError."""
    with store.transaction(vital=True) as tx:
        for seq in seqs:
            tx.outbox.quarantine(seq)
        # One may have had another number, or have declared others: whatever is neither here nor declared counts.
        gone = ranges.subtract(tx.outbox.missing_seqs(tx.log_head()[0]), declared_seqs(tx))
        declare_messages(tx, message_log, now, gone, DAMAGED)
        summary = (
            f"{len(seqs)} messages in the outbox were not what was written and are not sent; they are in the store's "
            "table `damaged_messages`. Check the card."
        )
        evidence = {"messages": gone[:_MAX_LISTED]}
        alert = DAMAGED_MESSAGES.raised(summary, evidence, log=message_log.log_id, seq=seqs[0])
        message_log.append(tx, "alerts", None, alert.to_body(), now)
