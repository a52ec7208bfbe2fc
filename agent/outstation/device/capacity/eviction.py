"""Eviction declarations: signed `audit` messages, event "evicted", for messages and readings that were given up.

The transaction that deletes something also declares it. The evidence names messages, {"seq": [[first, last], …]}, or
readings, {"stream", "rows": [[first, last], …], "used", "tasks"}, with "reason" and "bytes". A declaration that is not
acknowledged yet is merged into the next one of its kind, which then lists its seq too: weeks of evictions make one
message. A declaration that would be too large for the broker is split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import ranges
from outstation.foundation.clock import ClockReading
from outstation.foundation.ranges import Ranges
from outstation.protocol.alerts.kinds import DAMAGED_MESSAGES
from outstation.protocol.wire.jws import encode

EVENT = "evicted"
NO_ROOM, ACKNOWLEDGED_EARLIER, DAMAGED, EXPIRED = "no room", "acknowledged earlier", "damaged", "expired"
EXPIRED_COUNTER = "messages expired"
# Name in table meta: the newest declaration of each kind.
OPEN_DECLARATIONS = "open declarations"
# The members that every message carries, and the event, at their longest.
_HEADER_BYTES = 700
_RANGE_BYTES = len("[9007199254740991,9007199254740991],")
_MAX_SUMMARY = 2000
_MAX_LISTED = 50
_REASON_TEXTS = {
    NO_ROOM: "the store is full; give it more room ([buffer] max_size) or see why nothing is delivered",
    ACKNOWLEDGED_EARLIER: "the collector asks for them again, but acknowledged them earlier; they are no longer kept",
    DAMAGED: "they cannot be read back; check the card",
    EXPIRED: "they waited longer than [broker.metered] max_age; give it a larger budget or longer windows",
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
    """Declare messages that are no longer in the outbox; `acknowledgement` is an earlier one that covered them."""
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
    """Declare readings that are no longer in the store; `tasks` have not used them and never will."""
    members = {"stream": stream, "used": used, "tasks": list(tasks), "reason": reason, "bytes": size}
    kind = json.dumps([stream, used, list(tasks), reason])
    _declare(tx, message_log, now, kind, "rows", rows, members)


def declared_seqs(tx: Transaction) -> list[tuple[int, int]]:
    """Return the messages that the newest declaration of each kind lists, if its CRC is right."""
    payloads = (tx.outbox.payload(seq) for seq in json.loads(tx.get_meta(OPEN_DECLARATIONS, "{}")).values())
    listed = (json.loads(payload)["evidence"].get("seq", []) for payload in payloads if payload is not None)
    return ranges.union((first, last) for pairs in listed for first, last in pairs)


def quarantine_damaged(store: Store, message_log: MessageLog, seqs: Sequence[int], now: ClockReading) -> None:
    """Quarantine messages whose CRC is wrong and declare them, so that the others can be sent. Raises StorageError."""
    with store.transaction(vital=True) as tx:
        for seq in seqs:
            tx.outbox.quarantine(seq)
        # The seq itself may be damaged, or the message may have declared others: everything that is neither stored nor
        # declared counts.
        missing = ranges.subtract(tx.outbox.missing_seqs(tx.log_head()[0]), declared_seqs(tx))
        declare_messages(tx, message_log, now, missing, DAMAGED)
        summary = (
            f"{len(seqs)} messages in the outbox do not have their CRC and are not sent; they are in the store's table "
            "`quarantined_messages`. Check the card."
        )
        evidence = {"messages": missing[:_MAX_LISTED]}
        alert = DAMAGED_MESSAGES.raised(summary, evidence, log=message_log.log_id, seq=seqs[0])
        message_log.append(tx, "alerts", None, alert.to_body(), now)


def _declare(
    tx: Transaction,
    message_log: MessageLog,
    now: ClockReading,
    kind: str,
    name: str,
    evicted: Ranges,
    members: dict[str, Any],
) -> None:
    if not evicted:
        return
    newest = json.loads(tx.get_meta(OPEN_DECLARATIONS, "{}"))
    # In a small store a transaction cannot hold the old declaration and a new one of any length.
    max_bytes = min(message_log.max_bytes, tx.remaining_bytes // 4) - _HEADER_BYTES
    merged = _merge_with_earlier(tx, newest.get(kind), name, evicted, members)
    if merged is not None and _fits(merged, max_bytes):
        tx.outbox.delete([newest[kind]])
        parts = [merged]
    else:
        if not _fits({**members, name: [[2**53, 2**53]]}, max_bytes):
            # Only an acknowledgement is that long, and the collector has its own copy.
            members = {key: value for key, value in members.items() if key != "acknowledgement"}
        count = max(1, (max_bytes - len(encode(members))) // _RANGE_BYTES)
        parts = []
        for start in range(0, len(evicted), count):
            parts.append({**members, name: [list(pair) for pair in evicted[start : start + count]]})
            members = {**members, "bytes": 0}
    for evidence in parts:
        body = {"event": EVENT, "summary": _summary(evidence, name), "evidence": evidence}
        newest[kind] = message_log.append(tx, "audit", None, body, now)
    tx.set_meta(OPEN_DECLARATIONS, json.dumps(newest))


def _merge_with_earlier(
    tx: Transaction, earlier: int | None, name: str, evicted: Ranges, members: dict[str, Any]
) -> dict[str, Any] | None:
    """Return one evidence for message `earlier` and `evicted`; None if the earlier one was acknowledged or is gone."""
    if earlier is None or earlier in tx.outbox.acknowledged or (payload := tx.outbox.payload(earlier)) is None:
        return None
    old = json.loads(payload)["evidence"]
    listed = {key: [(first, last) for first, last in old.get(key, [])] for key in ("seq", "rows")}
    listed[name] += evicted
    listed["seq"].append((earlier, earlier))
    both = {key: ranges.union(pairs) for key, pairs in listed.items() if pairs}
    return {**old, **members, **both, "bytes": old["bytes"] + members["bytes"]}


def _fits(evidence: dict[str, Any], max_bytes: int) -> bool:
    return len(encode(evidence)) <= max_bytes


def _summary(evidence: dict[str, Any], name: str) -> str:
    count, first, last = ranges.count(evidence[name]), evidence[name][0][0], evidence[name][-1][1]
    why, size = _REASON_TEXTS[evidence["reason"]], f", {evidence['bytes'] / 2**20:.1f} MiB" if evidence["bytes"] else ""
    if name == "seq":
        return f"Gave up {count} messages, {first} to {last}{size}: {why}."
    fate = "used" if evidence["used"] else "not used by " + ", ".join(evidence["tasks"])
    text = f"Gave up {count} readings of {evidence['stream']}, rows {first} to {last}{size}, {fate}: {why}."
    return text[:_MAX_SUMMARY]
