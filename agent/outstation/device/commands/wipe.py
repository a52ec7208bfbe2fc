"""Wipe: operators erase the device's readings, results, state and keys.

The answer to the first command holds a word that the second must repeat, which proves that the operator read it. A wipe
that one key confirmed is announced by an alert and happens after a delay, unless an operator cancels it or its key is
revoked meanwhile; a second key that confirms one makes it happen at once. A restart continues the delay.

Once a wipe is committed, it happens whatever crashes: the store records it, then the marker file of `erasure`.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Mapping

import msgspec

from outstation.device.machine.trusted_keys import TrustedKeys
from outstation.device.pipeline.tasks import Effect
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import clock, decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import RowRejected, StorageFull
from outstation.protocol.alerts.kinds import WIPE_PENDING
from outstation.protocol.wire.commands import may_command

CONFIRM_VALID_S = 600.0
DELIVERY_TIMEOUT_S = 10.0
_FULL_RETRY_S = 5.0
# In table meta: seq of the audit message.
_WIPE_SEQ = "wipe"
# In table meta: the wipe that one key confirmed.
_PENDING = "pending wipe"


class _PendingWipe(msgspec.Struct, frozen=True):
    """A wipe that the key `kid` confirmed, due at `due_us` (epoch µs)."""

    kid: str
    due_us: int


class Wipe:
    """Commands `wipe` and `cancel-wipe`; `is_confirmed` once a wipe is committed."""

    def __init__(
        self, store: Store, message_log: MessageLog, trusted: TrustedKeys, halt: Callable[[], object], delay_s: float
    ) -> None:
        self._store, self._message_log, self._trusted = store, message_log, trusted
        self._halt, self._delay_s = halt, delay_s
        self._confirmation: tuple[str, float] | None = None
        text = store.get_meta(_PENDING, "")
        self._pending = decoders.from_json(text, _PendingWipe) if text else None
        # Without a time service, the delay begins anew with each start.
        self._pending_since_s: float | None = None
        self._next_try_s = float("-inf")
        self.is_confirmed = False

    def request(self, args: Mapping[str, str], now: ClockReading, kid: str) -> Effect:
        """Return the word, or confirm it. Raises RowRejected for a word that is wrong, expired or used."""
        if "confirm" not in args:
            self._confirmation = secrets.token_hex(4), now.boot_s + CONFIRM_VALID_S
            minutes = round(CONFIRM_VALID_S / 60)
            summary = f"Nothing is erased yet: send wipe again, with this word as confirm, within {minutes} min."
            return Effect(summary, {"confirm": self._confirmation[0]})
        word, self._confirmation = self._confirmation, None
        if word is None or now.boot_s >= word[1] or not hmac.compare_digest(word[0].encode(), args["confirm"].encode()):
            raise RowRejected("this is not the word, or it has expired; nothing is erased, begin again")
        pending = self._pending
        if pending is not None and not self._is_operator(pending.kid):
            pending = None
        if self._delay_s <= 0 or (pending is not None and pending.kid != kid):
            summary = (
                "Readings, outbox, state, stored bundles and signing keys are erased now; the daemon stops for good."
            )
            kids = [kid] if pending is None else [pending.kid, kid]
            return Effect(summary, {}, lambda tx: self._commit(tx, kids, now), self._stop)
        if pending is not None:
            due = clock.to_rfc3339(pending.due_us)
            raise RowRejected(f"a wipe by this key is pending until {due}; a second operator's key makes it happen now")
        return self._schedule(kid, now)

    def cancel(self, _args: Mapping[str, str], now: ClockReading) -> Effect:
        """Cancel the pending wipe. Raises RowRejected if there is none."""
        if self._pending is None:
            raise RowRejected("no wipe is pending")
        summary = "The wipe is cancelled; nothing was erased."
        return Effect(summary, {}, lambda tx: self._clear(tx, summary, now), self._forget)

    def tick(self, now: ClockReading) -> None:
        """Commit the pending wipe once its delay is over, or drop it if its key was revoked. Raises StorageError."""
        pending = self._pending
        if pending is None or self.is_confirmed or now.boot_s < self._next_try_s:
            return
        if self._pending_since_s is None:
            self._pending_since_s = now.boot_s
        has_waited = now.boot_s >= self._pending_since_s + self._delay_s
        is_due = now.wall_us >= pending.due_us if now.quality == "synced" else has_waited
        is_revoked = not self._is_operator(pending.kid)
        if not (is_due or is_revoked):
            return
        try:
            with self._store.transaction(vital=True) as tx:
                if is_revoked:
                    self._clear(tx, "The key that confirmed the wipe was revoked; nothing was erased.", now)
                else:
                    self._commit(tx, [pending.kid], now)
        except StorageFull:
            self._next_try_s = now.boot_s + _FULL_RETRY_S
            return
        if is_revoked:
            self._forget()
        else:
            self._stop()

    def _schedule(self, kid: str, now: ClockReading) -> Effect:
        pending = _PendingWipe(kid, now.wall_us + round(self._delay_s * 1e6))
        due = clock.to_rfc3339(pending.due_us)
        summary = (
            f"This device is erased at {due}, unless an operator sends cancel-wipe; a wipe by a second operator's key "
            "happens at once."
        )

        def write(tx: Transaction) -> None:
            tx.set_meta(_PENDING, msgspec.json.encode(pending).decode())
            alert = WIPE_PENDING.raised(summary, {"kid": kid, "due": due})
            self._message_log.append(tx, "alerts", None, alert.to_body(), now)

        def start_delay() -> None:
            self._pending, self._pending_since_s = pending, now.boot_s

        return Effect(summary, {"due": due}, write, start_delay)

    def _is_operator(self, kid: str) -> bool:
        signer = self._trusted.find_commander(kid)
        return signer is not None and may_command(signer.owner, "wipe")

    def _commit(self, tx: Transaction, kids: list[str], now: ClockReading) -> None:
        body = {"event": "wiped", "summary": "An operator erased this device.", "evidence": {"kids": kids}}
        tx.set_meta(_WIPE_SEQ, str(self._message_log.append(tx, "audit", None, body, now)))

    def _stop(self) -> None:
        self.is_confirmed = True
        self._halt()

    def _clear(self, tx: Transaction, summary: str, now: ClockReading) -> None:
        tx.set_meta(_PENDING, "")
        self._message_log.append(tx, "alerts", None, WIPE_PENDING.cleared(summary).to_body(), now)

    def _forget(self) -> None:
        self._pending = self._pending_since_s = None

    def is_delivered(self) -> bool:
        """Return True if the collector has the audit message, as far as the device knows."""
        seq = self._store.get_meta(_WIPE_SEQ, "")
        return not seq or not self._store.pending_messages([int(seq)])


def is_pending(store: Store) -> bool:
    """Return True if a wipe was confirmed and then interrupted."""
    return store.get_meta(_WIPE_SEQ, "") != ""
