"""Replaced commitment secret: a signed message says so, since no key of the former one can be shown any more.

Without it an audit would take two commitments to the same rows, under two secrets, for a contradiction.
"""

from __future__ import annotations

import hmac
import logging

from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.protocol.wire.commitment import SECRET_REPLACED

log = logging.getLogger("outstation")

_META, _PURPOSE = "commitment secret", b"outstation secret identity v1"


def report_replaced_secret(store: Store, message_log: MessageLog, now: ClockReading, *, is_lost: bool) -> None:
    """Write an audit message if the secret is another than before, and remember this one. Raises StorageError.

    `is_lost`: the file was missing, which tells it where a store has no memory of the secret. A full store delays the
    report to the next opening.
    """
    identity = hmac.digest(message_log.secret, _PURPOSE, "sha256").hex()[:16]
    known = store.get_meta(_META, "")
    if known == identity:
        return
    try:
        with store.transaction(vital=True) as tx:
            if known or is_lost:
                through = tx.log_head()[0]
                summary = (
                    "The secret behind commitments to rows was replaced: no row that messages so far commit to "
                    "can be proven any more."
                )
                body = {"event": SECRET_REPLACED, "summary": summary, "evidence": {"through": through}}
                message_log.append(tx, "audit", None, body, now)
            tx.set_meta(_META, identity)
    except StorageFull as full:
        log.error("%s; the replaced secret is reported when there is room", full)
