"""Key rotation: the old signing key signs that the new one follows, and the new one proves itself.

The log continues with the new key behind that message. Messages outside the log (state, keys, replies) keep the old key
until the collector has acknowledged the rotation: before, it could not verify the new one. If that message is lost
first (a damaged card, no room), the old key signs it again: without it the collector takes nothing more of this device.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping

from outstation.device.machine.keys import (
    LOG_SIGNER_KID,
    PENDING_ROTATION,
    KeyFiles,
    append_rotation,
    keys_message,
    reissue_rotation,
)
from outstation.device.pipeline.tasks import Effect
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import RowRejected, StorageFull, UsageError
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.protocol.wire.keys import SigningKey

log = logging.getLogger("outstation")


class KeyRotation:
    """Command `rotate-key`. `publish` sends a live message; `reconnect` has the new key sign the last will."""

    def __init__(
        self,
        store: Store,
        message_log: MessageLog,
        files: KeyFiles,
        publish: Callable[[OutgoingMessage], object],
        reconnect: Callable[[], object],
    ) -> None:
        self._store, self._message_log, self._files = store, message_log, files
        self._publish, self._reconnect = publish, reconnect

    def rotate(self, _args: Mapping[str, str], now: ClockReading) -> Effect:
        """Make a new key. Raises RowRejected."""
        if self._store.get_meta(PENDING_ROTATION, ""):
            raise RowRejected("the collector has not acknowledged the last key rotation yet; wait for that")
        try:
            new = self._files.prepare()
        except (OSError, UsageError) as error:
            raise RowRejected(f"no new key could be written: {error}; the old one stays") from None
        old = self._message_log.key

        def write(tx: Transaction) -> None:
            self._commit(tx, old, new, now)

        summary = f"Signs with key {new.public.text} from now on; the one before was {old.public.text}."
        return Effect(summary, {"key": new.public.text, "kid": new.public.kid}, write, lambda: self._activate(new, now))

    def tick(self, now: ClockReading) -> None:
        """Drop the old key once the collector has acknowledged the rotation. Raises StorageError."""
        pending = self._store.get_meta(PENDING_ROTATION, "")
        if not pending:
            return
        seq = int(json.loads(pending)["seq"])
        is_known = seq in self._store.acknowledged()
        if not is_known and self._store.pending_messages([seq]):
            return
        try:
            with self._store.transaction(vital=True) as tx:
                if is_known:
                    tx.set_meta(PENDING_ROTATION, "")
                else:
                    reissue_rotation(tx, self._message_log, now)
        except StorageFull:
            return
        if not is_known:
            return
        log.info("the collector knows the new signing key")
        self._files.forget_old()
        self._message_log.live_key = None
        self._reconnect()

    def _commit(self, tx: Transaction, old: SigningKey, new: SigningKey, now: ClockReading) -> None:
        append_rotation(tx, self._message_log, old, new, now)
        tx.set_meta(LOG_SIGNER_KID, new.public.kid)

    def _activate(self, new: SigningKey, now: ClockReading) -> None:
        self._message_log.live_key, self._message_log.key = self._message_log.key, new
        try:
            self._files.promote()
        except OSError as error:
            # The store names the new key, so the next start puts it in place.
            log.error("the new key could not be put in place: %s; the next start does it", error)
        self._publish(keys_message(self._message_log, now))
