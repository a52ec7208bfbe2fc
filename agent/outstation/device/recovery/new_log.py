"""New log in a store whose old one cannot continue: messages that the collector does not have are written again.

A store that went back in time would assign numbers twice, and its collector would take it for a copied key. So a new
log begins: messages that the collector has are dropped, and the others get a new seq, `prev` and signature, with a
reference to their origin (`reissued`). This runs in pieces, each a transaction. A new seq is never above the old one,
so the old messages behind the last processed one are still unchanged.

A store whose whole folder was restored from a copy learns of it from the collector: its signed acknowledgement names a
message that this store never wrote, or another digest. Then nothing more is sent in this log, and the next opening
begins a new one.

A device that joins a fleet begins a new log, too: its store's messages get the topics, the id and the signatures that
the fleet's collector takes.
"""

from __future__ import annotations

import json
import logging
import uuid
from typing import TYPE_CHECKING

import msgspec

from outstation.device.machine import keys
from outstation.device.recovery.catch_up import OPENED_SEQ, PREVIOUS_LOG, UNPROVEN_FROM
from outstation.device.recovery.findings import NEW_LOG, NewLogPlan
from outstation.device.store import retention
from outstation.device.store.message_log import MessageLog
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageForked, StorageFull, UsageError
from outstation.protocol.alerts.kinds import NEW_LOG_STARTED

if TYPE_CHECKING:
    from outstation.protocol.wire.messages import AckPayload

log = logging.getLogger("outstation")

EVENT = "new log"
_MESSAGES_PER_COMMIT = 32
_MAX_SUMMARY = 1900


# --- fork detection ---


def require_same_history(store: Store, ack: AckPayload) -> int:
    """Return the seq up to which a signed acknowledgement of this log proves that its messages are ours; 0 for none.

    Raises StorageForked if it belongs to another history, after planning a new log.
    """
    last = int(store.get_meta("seq", "0"))
    ours = store.message_digest(ack.through) if ack.digest else None
    if ack.through > last:
        reason = f"The collector has {ack.through} messages of log {ack.log}, this store has written {last}"
    elif ours not in (None, ack.digest):
        reason = f"The collector has another message {ack.through} of log {ack.log} than this store"
    else:
        return ack.through if ours is not None else 0
    reason += ": the store was restored from an old copy, or is used twice."
    plan = NewLogPlan(
        reason=reason,
        old=ack.log,
        common_through=min(int(store.get_meta(UNPROVEN_FROM, "") or last), ack.through),
        through=ack.through,
        missing=list(ack.missing),
        acknowledged=store.get_meta(retention.ACKNOWLEDGED, ""),
    )
    with store.transaction(vital=True) as tx:
        _save_plan(tx, plan)
    raise StorageForked(f"{store.path}: {reason} It is opened again, with a new log")


def record_proof(tx: Transaction, proven: int) -> None:
    """Record that our messages up to seq `proven` are the collector's.

    Only a message written since the opening is in no copy of the store. An acknowledgement of earlier messages only may
    be from before this store went back in time.
    """
    if proven > int(tx.get_meta(OPENED_SEQ, tx.get_meta("seq", "0"))):
        tx.set_meta(UNPROVEN_FROM, "")
    elif (unproven := tx.get_meta(UNPROVEN_FROM, "")) and proven > int(unproven):
        tx.set_meta(UNPROVEN_FROM, str(proven))


# --- joining a fleet ---


def plan_move(store: Store, fleet: str, device: str) -> bool:
    """Bind the store to a device of another fleet; the next opening writes all its messages again, for that fleet.

    Returns False if it is bound to it already. Raises UsageError if it began a new log and has not finished.
    """
    name = f"{fleet}/{device}"
    owner = store.get_meta("device", name)
    if owner == name:
        return False
    if store.get_meta(NEW_LOG, ""):
        hint = "run `outstation batch` once with its former config, then join again"
        raise UsageError(f"the store at {store.path} belongs to {owner} and has begun a new log: {hint}")
    # Nobody of the new fleet has any of its messages, delivered or not.
    plan = NewLogPlan(reason=f"The device {owner} joined a fleet as {name}.", old=store.log_id, joined=True)
    with store.transaction(vital=True) as tx:
        tx.set_meta("device", name)
        _save_plan(tx, plan)
    return True


# --- new log ---


def start_new_log(store: Store, message_log: MessageLog, now: ClockReading) -> None:
    """Carry out the plan in table meta, if there is one; `store` and `message_log` then use the new log."""
    text = store.get_meta(NEW_LOG, "")
    if not text:
        return
    plan = decoders.from_json(text, NewLogPlan)
    if not plan.new:
        plan = _create_log(store, plan)
    store.log_id = message_log.log_id = plan.new
    size = _MESSAGES_PER_COMMIT
    while page := store.unacknowledged_messages(plan.done, size):
        try:
            with store.transaction(vital=True) as tx:
                for message in page:
                    if not message.intact:
                        tx.outbox.quarantine(message.seq)
                        continue
                    tx.outbox.delete([message.seq])
                    if not _is_delivered(plan, message.seq):
                        message_log.reissue(tx, message, plan.old)
                further = msgspec.structs.replace(plan, done=page[-1].seq)
                _save_plan(tx, further)
            plan = further
        except StorageFull:
            if size == 1:
                raise
            size //= 2
    is_lost = _is_rotation_lost(store, plan)
    with store.transaction(vital=True) as tx:
        if is_lost:
            keys.reissue_rotation(tx, message_log, now)
        _finish(tx, message_log, plan, now)
    log.log(logging.INFO if plan.joined else logging.CRITICAL, "%s Log %s begins.", plan.reason, plan.new)


def _is_delivered(plan: NewLogPlan, seq: int) -> bool:
    """Return True if the collector has the message that this store has as `seq` of the old log."""
    if seq in AcknowledgedSeqs.from_json(plan.acknowledged):
        return True
    return seq <= min(plan.common_through, plan.through) and not any(a <= seq <= b for a, b in plan.missing)


def _is_rotation_lost(store: Store, plan: NewLogPlan) -> bool:
    """Return True if a pending key rotation is neither at the collector nor among the reissued messages."""
    pending = store.get_meta(keys.PENDING_ROTATION, "")
    if not pending or _is_delivered(plan, int(json.loads(pending)["seq"])):
        return False
    from outstation.protocol.wire import key_rotation

    after, event = 0, f'"event":"{key_rotation.ROTATION_EVENT}"'.encode()
    while page := store.unacknowledged_messages(after, _MESSAGES_PER_COMMIT):
        if any(message.intact and event in message.payload for message in page):
            return False
        after = page[-1].seq
    return True


def _create_log(store: Store, plan: NewLogPlan) -> NewLogPlan:
    from outstation.device.capacity import eviction

    last = int(store.get_meta("seq", "0"))
    plan = msgspec.structs.replace(plan, new=str(uuid.uuid4()), last=max(plan.last, plan.through, last))
    with store.transaction(vital=True) as tx:
        # Each stored message waits until it is processed.
        tx.outbox.set_acknowledged(AcknowledgedSeqs())
        values = {"log": plan.new, "seq": "0", "digest": "", PREVIOUS_LOG: plan.old, UNPROVEN_FROM: "", OPENED_SEQ: "0"}
        for key, value in values.items():
            tx.set_meta(key, value)
        histories = (retention.ACKNOWLEDGED_HISTORY, retention.WRITTEN_HISTORY)
        for key in (*histories, retention.ACKNOWLEDGEMENT, eviction.OPEN_DECLARATIONS):
            tx.delete_meta(key)
        tx.segments.reset_announcements()
        _save_plan(tx, plan)
        tx.progress.needs_refresh = True
    return plan


def _finish(tx: Transaction, message_log: MessageLog, plan: NewLogPlan, now: ClockReading) -> None:
    reissued = tx.log_head()[0]
    summary = f"{plan.reason} Log {plan.new} begins; {reissued} messages of log {plan.old} are written again in it."
    summary = summary[:_MAX_SUMMARY]
    evidence = {"old": plan.old, "through": plan.last, "reissued": reissued}
    seq = message_log.append(tx, "audit", None, {"event": EVENT, "summary": summary, "evidence": evidence}, now)
    if not plan.joined:
        alert = NEW_LOG_STARTED.raised(summary, {"seq": seq, **evidence}, log=plan.new)
        message_log.append(tx, "alerts", None, alert.to_body(), now)
    tx.delete_meta(NEW_LOG)
    if pending := tx.get_meta(keys.PENDING_ROTATION, ""):
        # It waited for an acknowledgement of the old log, and now waits for one of the new log.
        tx.set_meta(keys.PENDING_ROTATION, json.dumps({**json.loads(pending), "seq": seq}))


def _save_plan(tx: Transaction, plan: NewLogPlan) -> None:
    tx.set_meta(NEW_LOG, msgspec.json.encode(plan).decode())
