"""Keyring: the enrolled keys in memory, with their bounds, refreshed from the database."""

from __future__ import annotations

import logging

import msgspec

from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.key_rotation import parse_rotation
from outstation.protocol.wire.keys import PublicKey, parse_public_key
from outstation.protocol.wire.messages import LoggedPayload
from outstation.protocol.wire.verification import VerifiedMessage

logger = logging.getLogger(__name__)


class DeviceKey(Signer, frozen=True):
    """Key of a device. With `last_seq` another key replaced it: it signs `log` (any log if None) up to that seq."""

    log: str | None = None
    last_seq: int | None = None


class Keyring:
    """Signers by key id. A look-up never reads the database, so a flood of unknown keys is cheap."""

    def __init__(self, store: FleetStore, roles: dict[str, PublicKey] | None = None) -> None:
        self._store, self._version = store, -1
        self._roles = {key.kid: Signer(role, key) for role, key in (roles or {}).items()}
        self._signers: dict[str, DeviceKey] = {}
        # Changes by rotations that are not stored yet.
        self._pending_rotations: dict[str, DeviceKey] = {}
        # Devices that ever had a key.
        self.devices: frozenset[str] = frozenset()
        self.refresh()

    def refresh(self) -> None:
        """Read enrolments and revocations since the last call, and forget rotations that were added but not stored."""
        self._pending_rotations = {}
        version = self._store.keys_version()
        if version == self._version:
            return
        # Parsing a key costs more than reading it, so known keys are reused.
        known = {kid: signer.key for kid, signer in self._signers.items()}
        signers = {}
        for kid, device, text, revoked, log, last_seq in self._store.enrolled_keys():
            try:
                if not (isinstance(log, str | None) and all(isinstance(cell, str) for cell in (kid, device, text))):
                    raise ValueError("its row in table keys is damaged")
                if last_seq is not None and type(last_seq) is not int:
                    raise ValueError(f"last_seq is {last_seq!r}")
                key = known.get(kid) or parse_public_key(text)
            except ValueError as error:
                # It must not stop the collector from using the others.
                logger.error("device %s: its key is invalid (%s); enrol it again with --replace", device, error)
                continue
            signers[kid] = DeviceKey(device, key, revoked, log, last_seq)
        self._signers, self._version = signers, version
        self.devices = frozenset(signer.owner for signer in signers.values())

    def find(self, kid: str) -> Signer | None:
        """Return the signer with this key, revoked or not."""
        return self._pending_rotations.get(kid) or self._signers.get(kid) or self._roles.get(kid)

    def find_stored(self, kid: str) -> Signer | None:
        """Return the signer of a stored message: what a key signed before its revocation stays valid."""
        signer = self._signers.get(kid)
        return msgspec.structs.replace(signer, revoked=False) if signer and signer.revoked else signer

    def add_rotation(self, message: VerifiedMessage) -> bool:
        """Accept the new key of a verified rotation until the next `refresh`; return False if it is invalid."""
        try:
            change = parse_rotation(message)
        except MessageRefused:
            return False
        old = self.find(change.old_kid) if change else None
        if change is None or not isinstance(old, DeviceKey) or old.last_seq is not None:
            return False
        if self.find(change.new_key.kid):
            return False
        self._pending_rotations[change.old_kid] = DeviceKey(old.owner, old.key, False, change.log, change.seq)
        self._pending_rotations[change.new_key.kid] = DeviceKey(old.owner, change.new_key)
        return True

    def _is_repeated_rotation(self, message: VerifiedMessage, old: DeviceKey, stored: bool) -> bool:
        """Return True if a device repeats the rotation that replaced `old`, in a new log or after losing the first one.

        Nobody else can repeat it: the new key signs a proof for this message's log and seq. It changes no key.
        """
        try:
            change = parse_rotation(message)
        except MessageRefused:
            return False
        new = self.find(change.new_key.kid) if change else None
        return new is not None and new.owner == old.owner and (stored or not new.revoked)

    def require_in_bounds(self, message: VerifiedMessage, *, stored: bool = False) -> None:
        """Raise MessageRefused if another key replaced the signing key before this message.

        Every other log of the key ended before: there only `stored` messages are valid.
        """
        signer = self.find(message.signer.key.kid)
        if not isinstance(signer, DeviceKey) or signer.last_seq is None:
            return
        body = message.body
        if isinstance(body, LoggedPayload):
            within = body.seq <= signer.last_seq if signer.log in (None, body.log) else stored
            if within or self._is_repeated_rotation(message, signer, stored):
                return
        raise MessageRefused(
            "retired key", f"kid {signer.key.kid} of {signer.owner} is valid up to seq {signer.last_seq} only"
        )
