"""Signing keys of the device on disk: the provisioned key and its successors after key rotations.

The provisioned key may lie on a read-only path (systemd's LoadCredential), so it is never changed. Its successor is
`<data_dir>/keys/<kid of the provisioned key>.key`; a device that is given another key starts with that one.
The steps of a rotation, each durable before the next:
- `.next` is written
- the store commits the rotation message and the new kid in table meta
- the current file becomes `.old`, and `.next` becomes the current file
`KeyFiles.recover` finds the key that the store has committed, whatever step a crash comes after.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import durable_files
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import SigningKey

if TYPE_CHECKING:
    from outstation.protocol.transport.packets import OutgoingMessage

log = logging.getLogger("outstation")

# Names in table meta: the kid that signs the log, and the rotation that no collector has acknowledged yet.
LOG_SIGNER_KID, PENDING_ROTATION = "signing key", "rotation"


class KeyFiles:
    def __init__(self, data_dir: Path, provisioned: SigningKey) -> None:
        self._folder, self._provisioned = data_dir / "keys", provisioned
        name = provisioned.public.kid
        self._current, self._next, self._old = (self._folder / f"{name}.key{end}" for end in ("", ".next", ".old"))

    def recover(self, committed: str) -> SigningKey:
        """Finish or undo an interrupted rotation and return the key in force. Raises UsageError.

        `committed` is the kid in the store, "" before the first rotation.
        """
        if self._next.exists():
            try:
                kid = keys.load_private(self._next).public.kid
            except UsageError:
                # Half a file: the store never committed this key.
                kid = ""
            if kid == committed:
                self.promote()
            else:
                self._next.unlink()
        return self.load_active()

    def load_active(self) -> SigningKey:
        """Return the key in force without changing any file. Raises UsageError."""
        return keys.load_private(self._current) if self._current.exists() else self._provisioned

    def load_previous(self) -> SigningKey:
        """Return the key before the one in force. Raises UsageError."""
        return keys.load_private(self._old) if self._old.exists() else self._provisioned

    def prepare(self) -> SigningKey:
        """Write a new key, which `promote` puts in force. Raises UsageError, OSError."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._next.unlink(missing_ok=True)
        key = keys.generate(self._next, write_public=False)
        durable_files.fsync(self._folder)
        durable_files.fsync(self._folder.parent)
        return key

    def promote(self) -> None:
        """Put the prepared key in force. Raises OSError."""
        if self._current.exists():
            durable_files.rename(self._current, self._old)
        durable_files.rename(self._next, self._current)

    def forget_old(self) -> None:
        """Delete the previous key, once the collector knows the one in force."""
        with contextlib.suppress(OSError):
            self._old.unlink(missing_ok=True)


def open_keys(store: Store, files: KeyFiles) -> tuple[SigningKey, SigningKey | None]:
    """Return the key of the log, and the key of live messages if it is another one. Raises UsageError."""
    key = files.recover(store.get_meta(LOG_SIGNER_KID, ""))
    live = files.load_previous() if store.get_meta(PENDING_ROTATION, "") else None
    return key, live if live is not None and live.public.kid != key.public.kid else None


def keys_message(message_log: MessageLog, now: ClockReading) -> OutgoingMessage:
    """Build the retained `keys` message with the key in force."""
    return message_log.build_live_message("keys", {"keys": [message_log.key.public.jwk]}, now)


def append_rotation(
    tx: Transaction, message_log: MessageLog, old: SigningKey, new: SigningKey, now: ClockReading
) -> None:
    """Append the message that names `new` as the successor of `old`, signed by `old`, and remember it as pending."""
    from outstation.protocol.wire import key_rotation

    seq = tx.log_head()[0] + 1
    evidence = key_rotation.build_evidence(
        message_log.fleet, message_log.device, message_log.log_id, seq, old.public, new
    )
    summary = f"The signing key {old.public.text} is followed by {new.public.text}."
    body = {"event": key_rotation.ROTATION_EVENT, "summary": summary, "evidence": evidence}
    message_log.append(tx, "audit", None, body, now, old)
    tx.set_meta(PENDING_ROTATION, json.dumps({"seq": seq, "old": old.public.kid}))


def reissue_rotation(tx: Transaction, message_log: MessageLog, now: ClockReading) -> None:
    """Append the pending rotation message again: without it the collector accepts nothing signed by the new key."""
    new, old = message_log.key, message_log.live_key
    if old is None:
        # Only one key is left, for example because the device was given another one: nothing to hand over from.
        tx.set_meta(PENDING_ROTATION, "")
        return
    log.warning("the message that names the new signing key was lost on this device; it is appended again")
    append_rotation(tx, message_log, old, new, now)
