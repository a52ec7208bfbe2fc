"""Who may sign, and up to where: the enrolled keys in memory, as fresh as the database."""

from __future__ import annotations

import logging

import msgspec

from agent.errors import MessageRefused
from agent.fleet.database.store import FleetStore
from agent.wire.jws import Signer
from agent.wire.key_rotation import parse_rotation
from agent.wire.keys import PublicKey, parse_public_key
from agent.wire.messages import LoggedPayload, VerifiedMessage

logger = logging.getLogger(__name__)


class DeviceKey(Signer, frozen=True):
    """A device's key. With `through` another one has followed it: it signs `log` (any, where None) up to that seq."""

    log: str | None = None
    through: int | None = None


class Keyring:
    """kid → signer. A look-up never touches the database: a flood of unknown keys costs a dict look-up each."""

    def __init__(self, store: FleetStore, roles: dict[str, PublicKey] | None = None) -> None:
        self._store, self._version = store, -1
        self._roles = {key.kid: Signer(role, key) for role, key in (roles or {}).items()}
        self._signers: dict[str, DeviceKey] = {}
        # What rotations on their way into the database change.
        self._pending_rotations: dict[str, DeviceKey] = {}
        # Every device that ever had a key.
        self.devices: frozenset[str] = frozenset()
        self.refresh()

    def refresh(self) -> None:
        """See enrolments and revocations made meanwhile; one small read where there were none. Forgets `learn`."""
        self._pending_rotations = {}
        version = self._store.keys_version()
        if version == self._version:
            return
        # Building a key costs more than reading it: those already known are kept.
        known = {kid: signer.key for kid, signer in self._signers.items()}
        signers = {}
        for kid, device, text, revoked, log, through in self._store.enrolled_keys():
            key = known.get(kid) or _parse_key(device, text)
            if key is not None:
                signers[kid] = DeviceKey(device, key, revoked, log, through)
        self._signers, self._version = signers, version
        self.devices = frozenset(signer.owner for signer in signers.values())

    def find(self, kid: str) -> Signer | None:
        """The signer with this key, revoked or not."""
        return self._pending_rotations.get(kid) or self._signers.get(kid) or self._roles.get(kid)

    def find_stored(self, kid: str) -> Signer | None:
        """The same for messages that are stored already: what a key signed before it was revoked stays valid."""
        signer = self._signers.get(kid)
        return msgspec.structs.replace(signer, revoked=False) if signer else None

    def add_rotation(self, message: VerifiedMessage) -> bool:
        """Know the new key of a verified rotation until the next `refresh`; whether the message is one that counts."""
        try:
            change = parse_rotation(message)
        except MessageRefused:
            return False
        old = self.find(change.old_kid) if change else None
        if change is None or not isinstance(old, DeviceKey) or old.through is not None or self.find(change.new_key.kid):
            return False
        self._pending_rotations[change.old_kid] = DeviceKey(old.owner, old.key, False, change.log, change.seq)
        self._pending_rotations[change.new_key.kid] = DeviceKey(old.owner, change.new_key)
        return True

    def _is_repeated_rotation(self, message: VerifiedMessage, old: DeviceKey, stored: bool) -> bool:
        """Whether a device repeats which key followed `old`: in a new log, or where it lost the first such message.

        Nobody else can: the new key proves itself for this very place in the log. No key changes by it.
        """
        try:
            change = parse_rotation(message)
        except MessageRefused:
            return False
        new = self.find(change.new_key.kid) if change else None
        return new is not None and new.owner == old.owner and (stored or not new.revoked)

    def require_in_bounds(self, message: VerifiedMessage, *, stored: bool = False) -> None:
        """Raises Refused where the key was followed by another one before this message.

        Logs other than the bounded one are over, or never were: of these only what is `stored` counts.
        """
        signer = self.find(message.signer.key.kid)
        if not isinstance(signer, DeviceKey) or signer.through is None:
            return
        body = message.body
        if isinstance(body, LoggedPayload):
            if self._is_repeated_rotation(message, signer, stored):
                return
            within = body.seq <= signer.through if signer.log in (None, body.log) else stored
            if within:
                return
        raise MessageRefused(
            "retired key", f"kid {signer.key.kid} of {signer.owner} signs up to seq {signer.through} only"
        )


def _parse_key(device: str, text: str) -> PublicKey | None:
    """One key that is none must not keep the collector from all the others."""
    try:
        return parse_public_key(text)
    except ValueError as error:
        logger.error("device %s: its enrolled key cannot be used (%s); enrol it again with --replace", device, error)
        return None
