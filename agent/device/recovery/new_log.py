"""A new log in a store whose old one cannot go on: what the collector does not have is written again there.

A store that went back in time would give numbers a second meaning, and its collector would take it for a copied key. So
the messages it still holds move into a new log: those the collector has are dropped, the others get a new seq, `prev`
and signature, everything else as it was, and say where they come from (`reissued`). In pieces, each a transaction: a
new number is never above the old one, so what lies behind the last old message that was seen to is still as it was.
"""

from __future__ import annotations

import json
import logging
import uuid

import msgspec

from agent.clock import Now
from agent.device.commands import key_rotation
from agent.device.recovery.catch_up import OPENED, PREVIOUS_LOG, UNPROVEN
from agent.device.recovery.findings import NEW_LOG, NewLog
from agent.device.store import eviction, retention
from agent.device.store.message_log import Author
from agent.device.store.retention import Acknowledged
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import StorageFull
from agent.wire import key_rotation as wire_rotation

log = logging.getLogger("outstation")

EVENT = "new log"
_PIECE = 32


def relog(store: Store, author: Author, now: Now) -> None:
    """Do what is planned in table meta, if anything is; `author` and `store` are in the new log afterwards."""
    text = store.meta(NEW_LOG, "")
    if not text:
        return
    plan = msgspec.json.decode(text, type=NewLog)
    if not plan.new:
        plan = _begin(store, plan)
    store.log_id = author.log_id = plan.new
    size = _PIECE
    while page := store.unsent(plan.done, size):
        try:
            with store.transaction(vital=True) as tx:
                for message in page:
                    if not message.intact:
                        tx.outbox.put_aside(message.seq)
                        continue
                    tx.outbox.delete([message.seq])
                    if not has(plan, message.seq):
                        author.reissue(tx, message, plan.old)
                further = msgspec.structs.replace(plan, done=page[-1].seq)
                _keep(tx, further)
            plan = further
        except StorageFull:
            if size == 1:
                raise
            size //= 2
    lost = _is_rotation_lost(store, plan)
    with store.transaction(vital=True) as tx:
        if lost:
            key_rotation.say_again(tx, author, now)
        _finish(tx, author, plan, now)
    log.critical("%s Log %s begins.", plan.why, plan.new)


def has(plan: NewLog, seq: int) -> bool:
    """Whether the collector has the message that this store has as `seq` of the old log."""
    if seq in Acknowledged.from_json(plan.acknowledged):
        return True
    return seq <= min(plan.common, plan.through) and not any(a <= seq <= b for a, b in plan.missing)


def _is_rotation_lost(store: Store, plan: NewLog) -> bool:
    """Whether a change of the signing key waits that is neither at the collector nor in what was written again."""
    pending = store.meta(key_rotation.PENDING, "")
    if not pending or has(plan, int(json.loads(pending)["seq"])):
        return False
    after, wanted = 0, f'"event":"{wire_rotation.EVENT}"'.encode()
    while page := store.unsent(after, _PIECE):
        if any(message.intact and wanted in message.payload for message in page):
            return False
        after = page[-1].seq
    return True


def _begin(store: Store, plan: NewLog) -> NewLog:
    last = int(store.meta("seq", "0"))
    plan = msgspec.structs.replace(plan, new=str(uuid.uuid4()), last=max(plan.last, plan.through, last))
    with store.transaction(vital=True) as tx:
        # Each kept message waits until it is seen to.
        tx.outbox.set_acknowledged(Acknowledged())
        anew = {"log": plan.new, "seq": "0", "digest": "", PREVIOUS_LOG: plan.old, UNPROVEN: "", OPENED: "0"}
        for key, value in anew.items():
            tx.set_meta(key, value)
        for key in (retention.STEPS, retention.ACKNOWLEDGEMENT, eviction.OPEN):
            tx.drop_meta(key)
        tx.segments.announce_all_again()
        _keep(tx, plan)
        tx.progress.anew = True
    return plan


def _finish(tx: Transaction, author: Author, plan: NewLog, now: Now) -> None:
    reissued = tx.chain()[0]
    summary = f"{plan.why} Log {plan.new} begins; {reissued} messages of log {plan.old} are written again in it."
    evidence = {"old": plan.old, "through": plan.last, "reissued": reissued}
    seq = author.write(tx, "audit", None, {"event": EVENT, "summary": summary[:1900], "evidence": evidence}, now)
    alert = {
        "alert": "storage",
        "subject": "log",
        "state": "raised",
        "severity": "critical",
        "id": f"storage/log/{plan.new}",
        "summary": summary[:1900],
        "evidence": {"seq": seq, **evidence},
    }
    author.write(tx, "alerts", None, alert, now)
    tx.drop_meta(NEW_LOG)
    if pending := tx.meta(key_rotation.PENDING, ""):
        # What waits for an acknowledgement of the old log waits for this one.
        tx.set_meta(key_rotation.PENDING, json.dumps({**json.loads(pending), "seq": seq}))


def _keep(tx: Transaction, plan: NewLog) -> None:
    tx.set_meta(NEW_LOG, msgspec.json.encode(plan).decode())
