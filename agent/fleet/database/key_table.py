"""Table `keys`: who may sign, until when; every change inside a transaction of the store.

A key is active, bounded, or revoked. A bounded one counts for one log up to one seq, for ever: another key has followed
it, and what it signed before may still be on its way. A revoked one counts no more; what is stored stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from agent.errors import MessageRefused, UsageError
from agent.fleet.database.interface import Connection
from agent.wire.key_rotation import KeyRotation, parse_rotation
from agent.wire.keys import PublicKey
from agent.wire.messages import VerifiedMessage

_ACTIVE_KEY = "SELECT kid, key FROM keys WHERE device = ? AND revoked IS NULL AND through IS NULL"


def enrol(db: Connection, device: str, key: PublicKey, *, replace: bool, keep_through: int | None, now: str) -> bool:
    """Let `key` sign for `device`; False where it could already.

    A key that is replaced is revoked, or counts up to seq `keep_through` of the device's newest log. Raises UsageError
    where another device has the key, or this device another one and not `replace`.
    """
    # First, for it is what two who enrol the same new device wait for.
    db.execute("INSERT INTO devices VALUES (?, ?, NULL, NULL) ON CONFLICT DO NOTHING", (device, now))
    db.lock_devices([device])
    owner = db.execute("SELECT device, revoked, through FROM keys WHERE kid = ?", (key.kid,)).fetchone()
    if owner == (device, None, None):
        return False
    if owner is not None:
        what = f"belongs to device {owner[0]!r}" if owner[0] != device else f"is revoked or replaced for {device!r}"
        raise UsageError(f"key {key.text} {what}; make a new one for {device!r}")
    active = db.execute(_ACTIVE_KEY, (device,)).fetchone()
    if active and not replace:
        raise UsageError(f"device {device!r} is enrolled with another key ({active[1]}); --replace revokes that one")
    if keep_through is None:
        db.execute("UPDATE keys SET revoked = ? WHERE device = ? AND revoked IS NULL", (now, device))
    elif active:
        newest = "SELECT log FROM logs WHERE device = ? ORDER BY rowid DESC LIMIT 1"
        log = db.execute(newest, (device,)).fetchone()
        _set_bound(db, active[0], log[0] if log else None, keep_through)
    _insert_key(db, device, key, now)
    return True


def revoke(db: Connection, device: str, kid: str | None, now: str) -> list[str]:
    """Let all keys of `device` sign no more, or the one `kid`; the kids. Raises UsageError where there is none."""
    db.lock_devices([device])
    which = "(CAST(? AS TEXT) IS NULL OR kid = ?)"
    sql = f"SELECT kid FROM keys WHERE device = ? AND revoked IS NULL AND {which} ORDER BY kid"
    found = [str(row[0]) for row in db.execute(sql, (device, kid, kid))]
    if not found:
        which = f"key {kid}" if kid else "key"
        raise UsageError(
            f"device {device!r} has no {which} that could be revoked; `outstation fleet devices` lists them"
        )
    for one in found:
        db.execute("UPDATE keys SET revoked = ? WHERE kid = ?", (now, one))
    _bump_keys_version(db)
    return found


def rotate(db: Connection, messages: Iterable[VerifiedMessage], now: str) -> Iterator[tuple[VerifiedMessage, str]]:
    """Do what messages that are new say about their devices' keys; where that must not be done, a sentence.

    Their order does not matter: of two changes in a log the one with the lower seq is the first.
    """
    changes = []
    for message in messages:
        try:
            change = parse_rotation(message)
        except MessageRefused as refused:
            who = message.body.device
            yield message, f"{who} announced a new signing key that cannot be believed ({refused}); nothing changed."
        else:
            if change is not None:
                changes.append((change, message))
    for change, message in sorted(changes, key=lambda entry: (entry[0].log, entry[0].seq)):
        if (problem := _apply_rotation(db, change, now)) is not None:
            yield message, problem


def require_active(db: Connection, kids: Iterable[str]) -> None:
    """Raises Refused where one of these is not enrolled, or is revoked.

    They were verified, but before this transaction: meanwhile a key may have been revoked, or the rotation that
    announced it turned out to be none that is stored.
    """
    wanted = sorted(kids)
    known = db.revocation_times(wanted)
    for kid in wanted:
        if kid not in known or known[kid] is not None:
            raise MessageRefused("revoked key" if kid in known else "unknown key", f"kid {kid}")


def _apply_rotation(db: Connection, change: KeyRotation, now: str) -> str | None:
    state = db.execute("SELECT log, through FROM keys WHERE kid = ? AND revoked IS NULL", (change.old_kid,)).fetchone()
    known = db.execute("SELECT device FROM keys WHERE kid = ? AND revoked IS NULL", (change.new_key.kid,)).fetchone()
    if state and state[1] is not None and known == (change.device,):
        # Said again: see `Keyring.require_in_bounds`.
        return None
    if state != (None, None):
        return f"{change.device} announced a new signing key with one that was followed by another; nothing changed."
    if db.execute("SELECT 1 FROM keys WHERE kid = ?", (change.new_key.kid,)).fetchone():
        return f"{change.device} announced a signing key that is known already, {change.new_key.text}; nothing changed."
    _set_bound(db, change.old_kid, change.log, change.seq)
    _insert_key(db, change.device, change.new_key, now)
    return None


def _set_bound(db: Connection, kid: str, log: str | None, through: int) -> None:
    db.execute("UPDATE keys SET log = ?, through = ? WHERE kid = ?", (log, through, kid))


def _insert_key(db: Connection, device: str, key: PublicKey, now: str) -> None:
    db.execute("INSERT INTO keys (kid, device, key, added) VALUES (?, ?, ?, ?)", (key.kid, device, key.text, now))
    _bump_keys_version(db)


def _bump_keys_version(db: Connection) -> None:
    db.execute("UPDATE meta SET value = value + 1 WHERE name = 'keys_version'")
