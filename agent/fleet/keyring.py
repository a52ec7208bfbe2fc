"""Who may sign: the enrolled keys in memory, as fresh as the database."""

from __future__ import annotations

from agent.fleet.store import FleetStore
from agent.wire.jws import Signer
from agent.wire.keys import PublicKey, public_key


class Keyring:
    """kid → signer. A look-up never touches the database: a flood of unknown keys costs a dict look-up each."""

    def __init__(self, store: FleetStore, roles: dict[str, PublicKey] | None = None) -> None:
        self._store, self._version = store, -1
        self._roles = {key.kid: Signer(role, key) for role, key in (roles or {}).items()}
        self._signers: dict[str, Signer] = {}
        self.refresh()

    def refresh(self) -> None:
        """See enrolments and revocations made meanwhile; one small read where there were none."""
        version = self._store.keys_version()
        if version == self._version:
            return
        # Building a key costs more than reading it: those already known are kept.
        known = {kid: signer.key for kid, signer in self._signers.items()}
        self._signers = {
            kid: Signer(device, known.get(kid) or public_key(text), revoked)
            for kid, device, text, revoked in self._store.enrolled_keys()
        }
        self._version = version

    def find(self, kid: str) -> Signer | None:
        """The signer with this key, revoked or not."""
        return self._signers.get(kid) or self._roles.get(kid)

    def find_stored(self, kid: str) -> Signer | None:
        """The same for messages that are stored already: what a key signed before it was revoked stays valid."""
        signer = self._signers.get(kid)
        return Signer(signer.owner, signer.key) if signer else None
