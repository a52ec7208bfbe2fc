"""Trusted keys of a device: the operators and the collector, with their roles, while the daemon runs.

The config names the first ones. From the first root with a trust document on (see `outstation.protocol.wire.trust`),
that document replaces all of them. Rules of an update; roots that break one change nothing and are only counted:
- each root follows the trusted one without a gap, signed by a threshold of both roots' keys
- the first trusted root is the file [updates] root; the newest one is stored and verified again at each start
- older roots are refused, so no revoked key returns
- once a document has named an encryption key, that of the config is never used again
Roots arrive by the retained MQTT message, and in the metadata folder where the fetch worker stores them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from outstation.device.machine.timekeeping import trusted_time_us
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation import decoders, input_files
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import MessageRefused, StorageFull
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire import root_metadata, trust
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import EncryptionKey, PublicKey
from outstation.protocol.wire.root_metadata import MAX_ROOT_BYTES, RootMetadata
from outstation.protocol.wire.trust import COLLECTOR, COMMANDING_ROLES, ENCRYPTION, OPERATOR, Trust

log = logging.getLogger("outstation")

# Counters are epoch milliseconds: how far one may be ahead of the trusted time. Without a time service the device only
# knows a time that has passed, so it may lag by as long as it was off.
MAX_AHEAD_S, MAX_AHEAD_UNSYNCED_S = 86_400, 400 * 86_400
# In table meta: SHA-256 of the first root, and the newest root.
_META_KEY = "trust root"
_FULL_RETRY_S = 5.0
_FOLDER_INTERVAL_S = 60.0


class _StoredRoot(msgspec.Struct, frozen=True):
    """`replaces_encryption`: this root or one before it named an encryption key."""

    anchor: str
    root: str
    replaces_encryption: bool


class TrustedKeys:
    """Keys by kid. The uplink's thread calls `accept` and `tick`; any thread looks keys up.

    `configured`: keys of the config. `anchor_file`: the first trusted root; None if the device has no repository.
    """

    refusal_name = "trust documents"

    def __init__(
        self,
        store: Store,
        message_log: MessageLog,
        now: Callable[[], ClockReading],
        configured: Sequence[Signer],
        anchor_file: Path | None = None,
        metadata_dir: Path | None = None,
    ) -> None:
        self._store, self._message_log, self._now = store, message_log, now
        self._topic = trust.topic_for(message_log.fleet)
        self._metadata_dir = metadata_dir
        self.on_change: Callable[[], object] = lambda: None
        self._root: RootMetadata | None = None
        self._pending: RootMetadata | None = None
        self._next_try_s = self._next_look_s = float("-inf")
        self._configured = {(signer.owner == COLLECTOR, signer.key.kid): signer for signer in configured}
        self._signers = self._configured
        self._first_counters: dict[str, int] = {}
        # The collector's encryption key of the trust document.
        self._encryption_key: EncryptionKey | None = None
        self._replaces_encryption = False
        self._anchor = ""
        if anchor_file is not None:
            self._restore(anchor_file)

    # --- lookups, on any thread ---

    def find_commander(self, kid: str) -> Signer | None:
        """Return the key of an operator, deployer or reporter; its owner is the role."""
        return self._signers.get((False, kid))

    def find_collector(self, kid: str) -> Signer | None:
        return self._signers.get((True, kid))

    def find_encryption_key(self, configured: EncryptionKey) -> EncryptionKey | None:
        """Return the trust document's key that messages are sealed to; `configured` until a document has named one."""
        return self._encryption_key or (None if self._replaces_encryption else configured)

    @property
    def commanders(self) -> list[Signer]:
        return [signer for (is_collector, _), signer in self._signers.items() if not is_collector]

    @property
    def may_be_commanded(self) -> bool:
        """True if a key may command this device now, or once a trust document arrives."""
        return self._root is not None or bool(self.commanders)

    # --- counters ---

    def valid_counter(self, kid: str, last: int) -> int:
        """Return the last counter of a key; the root's word replaces one that lies in the future."""
        first = self._first_counters.get(kid)
        return first if first is not None and last > self._highest_counter() else last

    def check_counter(self, counter: int, last: int) -> None:
        """Raise MessageRefused for a counter that is not above `last`, or not plausible at this time."""
        if counter <= last:
            raise MessageRefused("replayed", f"counter {counter}, this key has used {last}")
        highest = self._highest_counter()
        if counter > highest:
            text = f"counter {counter}; counters are epoch ms, and up to {highest} is plausible now: check both clocks"
            raise MessageRefused("counter in the future", text)

    def _highest_counter(self) -> int:
        now = self._now()
        ahead_s = MAX_AHEAD_S if now.quality == "synced" else MAX_AHEAD_UNSYNCED_S
        return trusted_time_us(self._store, now) // 1000 + ahead_s * 1000

    # --- updates, on the uplink's thread ---

    @property
    def subscriptions(self) -> list[str]:
        return [] if self._root is None else [self._topic]

    def owns(self, topic: str) -> bool:
        return topic == self._topic

    def on_connected(self) -> None:
        """Do nothing: the broker sends the retained message again."""

    def accept(self, delivery: IncomingMessage) -> None:
        """Verify the roots in a message; `tick` puts the newest into force. Raises MessageRefused."""
        self._advance([text.encode() for text in trust.decode_message(delivery.payload).roots])

    def tick(self, _session: object, now: ClockReading) -> None:
        """Take roots that the fetch worker stored, and put a verified one into force. Raises StorageError."""
        if now.boot_s >= self._next_look_s:
            self._next_look_s = now.boot_s + _FOLDER_INTERVAL_S
            self._read_folder()
        self.apply_pending(now)

    def apply_pending(self, now: ClockReading) -> None:
        """Store the verified root with its audit message, then use its keys. Raises StorageError."""
        root = self._pending
        if root is None or now.boot_s < self._next_try_s:
            return
        document = trust.read_trust(root)
        stored = _StoredRoot(self._anchor, root.data.decode(), self._replaces_encryption)
        try:
            with self._store.transaction(vital=True) as tx:
                tx.set_meta(_META_KEY, msgspec.json.encode(stored).decode())
                if document is not None:
                    self._message_log.append(tx, "audit", None, _audit_body(root.version, document), now)
        except StorageFull as full:
            log.warning("%s; the trust document of root %d waits", full, root.version)
            self._next_try_s = now.boot_s + _FULL_RETRY_S
            return
        self._pending = None
        self._use(root, document)
        self.on_change()

    def _advance(self, files: Sequence[bytes]) -> None:
        """Verify roots, oldest first, from the trusted one on; the newest becomes pending. Raises MessageRefused."""
        trusted = self._pending or self._root
        if trusted is None:
            raise MessageRefused("no root", "without [updates] root no trust document can be verified")
        start, newest = trusted, 0
        try:
            for data in files:
                newest = root_metadata.read_version(data)
                if newest > trusted.version:
                    successor = root_metadata.parse_successor(trusted, data)
                    # Also of a root that a later one in this message replaces.
                    if _find_encryption(trust.read_trust(successor)) is not None:
                        self._replaces_encryption = True
                    trusted = successor
        finally:
            # Roots before a bad one count: the next one follows them.
            if trusted is not start:
                self._pending = trusted
        if newest < trusted.version:
            raise MessageRefused("older root", f"root {newest}; this device trusts root {trusted.version}")

    def _read_folder(self) -> None:
        """Take the next roots from the metadata folder; the fetch worker may be replacing it at this moment."""
        while self._metadata_dir is not None and (trusted := self._pending or self._root) is not None:
            path = self._metadata_dir / root_metadata.root_history_file(self._anchor, trusted.version + 1)
            try:
                with input_files.open_regular(path) as file:
                    data = file.read(MAX_ROOT_BYTES + 1)
                self._advance([data])
                if (self._pending or self._root) is trusted:
                    raise MessageRefused("older root", f"the file holds root {trusted.version} again")
            except FileNotFoundError:
                return
            except (OSError, MessageRefused) as problem:
                log.error("%s: its trust document cannot be used: %s", path, problem)
                return

    # --- the stored root ---

    def _restore(self, anchor_file: Path) -> None:
        """Use the root in force, and forget a stored one that belongs to another first root. Raises StorageError."""
        self._anchor, data = _load_root(self._store, anchor_file)
        stored = _read_stored(self._store)
        self._replaces_encryption = stored is not None and stored.anchor == self._anchor and stored.replaces_encryption
        try:
            root = root_metadata.parse(data)
            self._use(root, trust.read_trust(root))
        except MessageRefused as problem:
            log.error("%s: the keys of operators and collector cannot be changed remotely: %s", anchor_file, problem)
            return
        if stored is not None and stored.anchor != self._anchor:
            try:
                with self._store.transaction(vital=True) as tx:
                    tx.delete_meta(_META_KEY)
            except StorageFull as full:
                log.warning("%s; the root of the former repository stays stored, but is not trusted", full)

    def _use(self, root: RootMetadata, document: Trust | None) -> None:
        """Use the keys of the document; a root without one leaves those of the config."""
        self._root, self._encryption_key = root, _find_encryption(document)
        self._replaces_encryption |= self._encryption_key is not None
        if self._replaces_encryption and self._encryption_key is None:
            log.error(
                "root %d names no encryption key any more: a device with [privacy] encrypt sends nothing until a root "
                "does; run `outstation fleet keys rotate-encryption` and publish it",
                root.version,
            )
        if document is None:
            self._signers, self._first_counters = self._configured, {}
            return
        signers: dict[tuple[bool, str], Signer] = {}
        for entry in document.keys:
            if entry.role == COLLECTOR or entry.role in COMMANDING_ROLES:
                key = entry.parse()
                signers[entry.role == COLLECTOR, key.kid] = Signer(entry.role, key)
        self._first_counters = {entry.kid: entry.counter for entry in document.keys if entry.counter is not None}
        # One assignment: other threads look keys up meanwhile.
        self._signers = signers
        log.info("the trust document of root %d names %d keys", root.version, len(signers))


def _find_encryption(document: Trust | None) -> EncryptionKey | None:
    listed = [] if document is None else [entry for entry in document.keys if entry.role == ENCRYPTION]
    return listed[-1].parse_encryption() if listed else None


def load_operators(store: Store, anchor_file: Path) -> list[PublicKey]:
    """Return the operators' keys of the trust document in force, none without one. Raises StorageError."""
    try:
        document = trust.read_trust(root_metadata.parse(_load_root(store, anchor_file)[1]))
    except MessageRefused:
        document = None
    return [] if document is None else [entry.parse() for entry in document.keys if entry.role == OPERATOR]


def _load_root(store: Store, anchor_file: Path) -> tuple[str, bytes]:
    """Return the hash of the first root, and the root in force: the stored one if it follows this first root."""
    stored = _read_stored(store)
    try:
        first = input_files.read_bytes(anchor_file)
    except OSError as error:
        log.error("%s: cannot be read: %s; the device uses the root that it has stored", anchor_file, error)
        return ("", b"") if stored is None else (stored.anchor, stored.root.encode())
    anchor = root_metadata.hash_anchor(first)
    return anchor, first if stored is None or stored.anchor != anchor else stored.root.encode()


def _read_stored(store: Store) -> _StoredRoot | None:
    try:
        return decoders.from_json(store.get_meta(_META_KEY, "null"), _StoredRoot | None)
    except msgspec.MsgspecError as damage:
        log.error("the stored root cannot be read (%s); it comes again when connected", damage)
        return None


def _audit_body(version: int, document: Trust) -> dict[str, object]:
    keys = [{"kid": entry.kid, "role": entry.role} for entry in document.keys]
    summary = f"Root {version} names the keys that may command this device and acknowledge its messages: {len(keys)}."
    return {"event": "trust changed", "summary": summary, "evidence": {"version": version, "keys": keys}}
