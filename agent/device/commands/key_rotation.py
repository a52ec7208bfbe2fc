"""Changing the device's signing key: the old key signs that the new one follows, and the new one proves itself.

The log goes on with the new key behind that message. What is not of the log (state, keys, replies) keeps the old one
until the collector has acknowledged the change: before, it could not verify the new one. Where that message is lost
before (a damaged card, no room), the old key says it again, for without it nothing more of this device is taken.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping

from agent.clock import Now
from agent.device.commands.executor import Deed
from agent.device.machine.keys import KeyFiles
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import Rejected, StorageFull, UsageError
from agent.transport.packets import Outgoing
from agent.wire import key_rotation as wire
from agent.wire.keys import SigningKey

log = logging.getLogger("outstation")

# In table meta: the kid that signs the log, and the rotation that no collector has acknowledged yet.
SIGNER, PENDING = "signing key", "rotation"


def open_keys(store: Store, files: KeyFiles) -> tuple[SigningKey, SigningKey | None]:
    """The key of the log, and that of live messages where it is another one. Raises UsageError."""
    key = files.opened(store.meta(SIGNER, ""))
    live = files.before() if store.meta(PENDING, "") else None
    return key, live if live is not None and live.public.kid != key.public.kid else None


def keys_message(author: Author, now: Now) -> Outgoing:
    """The retained statement of the key in force."""
    return author.live("keys", {"keys": [author.key.public.jwk]}, now)


class Rotation:
    """`renew`: connect anew, so that the Will is signed by the new key. `say`: publish a live message."""

    def __init__(
        self,
        store: Store,
        author: Author,
        files: KeyFiles,
        say: Callable[[Outgoing], object],
        renew: Callable[[], object],
    ) -> None:
        self._store, self._author, self._files, self._say, self._renew = store, author, files, say, renew

    def rotate(self, _args: Mapping[str, str], now: Now) -> Deed:
        """The command. Raises Rejected."""
        if self._store.meta(PENDING, ""):
            raise Rejected("the collector has not acknowledged the last change of the key yet; wait for that")
        try:
            new = self._files.prepare()
        except (OSError, UsageError) as error:
            raise Rejected(f"no new key could be written: {error}; the old one stays") from None
        old = self._author.key

        def write(tx: Transaction) -> None:
            self._write(tx, old, new, now)

        summary = f"Signs with key {new.public.text} from now on; the one before was {old.public.text}."
        return Deed(summary, {"key": new.public.text, "kid": new.public.kid}, write, lambda: self._begin(new, now))

    def turn(self, now: Now) -> None:
        """Whether the collector knows the new key by now; then the old one is done with. Raises StorageError."""
        pending = self._store.meta(PENDING, "")
        if not pending:
            return
        seq = int(json.loads(pending)["seq"])
        known = seq in self._store.acknowledged()
        if not known and self._store.pending([seq]):
            return
        try:
            with self._store.transaction(vital=True) as tx:
                if known:
                    tx.set_meta(PENDING, "")
                else:
                    say_again(tx, self._author, now)
        except StorageFull:
            return
        if not known:
            return
        log.info("the collector knows the new signing key")
        self._files.forget_old()
        self._author.live_key = None
        self._renew()

    def _write(self, tx: Transaction, old: SigningKey, new: SigningKey, now: Now) -> None:
        _announce(tx, self._author, old, new, now)
        tx.set_meta(SIGNER, new.public.kid)

    def _begin(self, new: SigningKey, now: Now) -> None:
        self._author.live_key, self._author.key = self._author.key, new
        try:
            self._files.promote()
        except OSError as error:
            # The store names the new key: the next start goes on from there.
            log.error("the new key could not be put in place: %s; the next start does it", error)
        self._say(keys_message(self._author, now))


def say_again(tx: Transaction, author: Author, now: Now) -> None:
    """Write the rotation that waits once more, at the end of the log, signed by the old key."""
    new, old = author.key, author.live_key
    if old is None:
        # Only one key is left, as where the device was given another one: there is nothing to follow.
        tx.set_meta(PENDING, "")
        return
    log.warning("the message that names the new signing key is lost here; it is written again")
    _announce(tx, author, old, new, now)


def _announce(tx: Transaction, author: Author, old: SigningKey, new: SigningKey, now: Now) -> None:
    seq = tx.chain()[0] + 1
    evidence = wire.evidence(author.fleet, author.device, author.log_id, seq, old.public, new)
    summary = f"The signing key {old.public.text} is followed by {new.public.text}."
    author.write(tx, "audit", None, {"event": wire.EVENT, "summary": summary, "evidence": evidence}, now, old)
    tx.set_meta(PENDING, json.dumps({"seq": seq, "old": old.public.kid}))
