"""A store that went back in time without knowing it (its whole folder was restored from a copy) learns it here.

The collector's signed acknowledgement speaks of a message that this store never wrote, or of other bytes than ours:
then nothing more is sent in this log, and the next opening begins a new one (`relog`).
"""

from __future__ import annotations

import msgspec

from agent.device.recovery.catch_up import OPENED_SEQ, UNPROVEN_FROM
from agent.device.recovery.findings import NEW_LOG, NewLogPlan
from agent.device.store import retention
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import StorageForked
from agent.wire.messages import AckPayload


def require_same_history(store: Store, ack: AckPayload) -> int:
    """Up to which seq `ack`, which the collector signed for this log, proves that its messages are ours; 0 for none.

    Raises StorageForked where it tells of another history.
    """
    last = int(store.get_meta("seq", "0"))
    ours = store.message_digest(ack.through) if ack.digest else None
    if ack.through > last:
        why = f"The collector has {ack.through} messages of log {ack.log}, this store has written {last}"
    elif ours not in (None, ack.digest):
        why = f"The collector has another message {ack.through} of log {ack.log} than this store"
    else:
        return ack.through if ours is not None else 0
    why += ": the store was restored from an old copy, or is used twice."
    common = min(int(store.get_meta(UNPROVEN_FROM, "") or last), ack.through)
    plan = NewLogPlan(
        reason=why,
        old=ack.log,
        common_through=common,
        through=ack.through,
        missing=list(ack.missing),
        acknowledged=store.get_meta(retention.ACKNOWLEDGED, ""),
    )
    with store.transaction(vital=True) as tx:
        tx.set_meta(NEW_LOG, msgspec.json.encode(plan).decode())
    raise StorageForked(f"{store.path}: {why} It is opened again, with a new log")


def record_proof(tx: Transaction, proven: int) -> None:
    """Our messages up to seq `proven` are the collector's.

    Only one that was written since the opening is in no copy of the store: until then an acknowledgement may be of the
    time before this store went back.
    """
    if proven > int(tx.get_meta(OPENED_SEQ, tx.get_meta("seq", "0"))):
        tx.set_meta(UNPROVEN_FROM, "")
    elif (unproven := tx.get_meta(UNPROVEN_FROM, "")) and proven > int(unproven):
        tx.set_meta(UNPROVEN_FROM, str(proven))
