"""Table `keys`: which keys may sign for a device, and up to which message; each change inside a transaction.

A key is active, bounded or revoked. A bounded key was replaced by another one and stays valid for one log up to one
seq, because messages signed before may still be in transit. A revoked key is refused; stored messages stay valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from outstation.fleet.database import log_succession
from outstation.fleet.database.interface import Connection
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.protocol.wire.key_rotation import parse_rotation
from outstation.protocol.wire.keys import PublicKey
from outstation.protocol.wire.verification import VerifiedMessage

# Where the private half was made: its maker could have copied it.
KeyMaker = Literal["device", "operator"]
_ACTIVE_KEY = "SELECT kid, key FROM keys WHERE device = ? AND revoked IS NULL AND last_seq IS NULL"


def enrol(
    db: Connection,
    device: str,
    key: PublicKey,
    *,
    replace: bool,
    keep_through: int | None,
    now: str,
    made_by: KeyMaker = "device",
) -> bool:
    """Let `key`, made by `made_by`, sign for `device`; return False if it already could.

    With `replace` the former key is revoked, or stays valid up to seq `keep_through` of the device's newest log. Raises
    UsageError if the key belongs to another device, or the device has another key and `replace` is not set.
    """
    # Before the lock: two processes that enrol the same new device wait for each other at this insert.
    db.execute("INSERT INTO devices VALUES (?, ?, NULL, NULL) ON CONFLICT DO NOTHING", (device, now))
    db.lock_devices([device])
    owner = db.execute("SELECT device, revoked, last_seq FROM keys WHERE kid = ?", (key.kid,)).fetchone()
    if owner == (device, None, None):
        return False
    db.execute("DELETE FROM retired_devices WHERE device = ?", (device,))
    if owner is not None:
        state = f"belongs to device {owner[0]!r}" if owner[0] != device else f"is revoked or replaced for {device!r}"
        raise UsageError(f"key {key.text} {state}; make a new one for {device!r}")
    active = db.execute(_ACTIVE_KEY, (device,)).fetchone()
    if active and not replace:
        raise UsageError(f"device {device!r} is enrolled with another key ({active[1]}); --replace revokes that one")
    if keep_through is None:
        db.execute("UPDATE keys SET revoked = ? WHERE device = ? AND revoked IS NULL", (now, device))
        # A device with another key begins another log.
        log_succession.end_logs(db, device, log_succession.ANY_LOG, now)
    elif active:
        newest = "SELECT log FROM logs WHERE device = ? AND live ORDER BY rowid LIMIT 1"
        log = db.execute(newest, (device,)).fetchone()
        _set_bound(db, active[0], log[0] if log else None, keep_through)
    _insert_key(db, device, key, now, made_by)
    return True


def retire(db: Connection, device: str, by: str, now: str) -> None:
    """Record that an operator removed `device`. Raises UsageError if a key of it may still sign."""
    db.lock_devices([device])
    if db.execute("SELECT 1 FROM keys WHERE device = ? AND revoked IS NULL", (device,)).fetchone() is not None:
        raise UsageError(
            f"a key of device {device!r} may still sign: `outstation fleet devices revoke {device}` revokes it"
        )
    db.execute("INSERT INTO retired_devices VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (device, now, by))


def revoke(db: Connection, device: str, kid: str | None, now: str) -> list[str]:
    """Revoke all keys of `device`, or only `kid`, and return their kids. Raises UsageError if there is none."""
    db.lock_devices([device])
    sql = """
        SELECT kid FROM keys WHERE device = ? AND revoked IS NULL AND (CAST(? AS TEXT) IS NULL OR kid = ?)
        ORDER BY kid"""
    kids = [str(revoked) for (revoked,) in db.execute(sql, (device, kid, kid))]
    if not kids:
        wanted = f"key {kid}" if kid else "key"
        raise UsageError(f"device {device!r} has no {wanted} to revoke; `outstation fleet devices` lists the keys")
    db.executemany("UPDATE keys SET revoked = ? WHERE kid = ?", [(now, kid) for kid in kids])
    _bump_keys_version(db)
    return kids


def rotate(db: Connection, messages: Iterable[VerifiedMessage], now: str) -> Iterator[tuple[VerifiedMessage, str]]:
    """Apply the key rotations that new messages announce; yield each message that changes nothing, with the reason.

    Their order does not matter: of two rotations in a log, the one with the lower seq is applied first.
    """
    changes = []
    for message in messages:
        try:
            change = parse_rotation(message)
        except MessageRefused as refused:
            device = message.body.device
            yield message, f"{device} announced a new signing key without a valid proof ({refused}); nothing changed."
        else:
            if change is not None:
                changes.append((change, message))
    for change, message in sorted(changes, key=lambda entry: (entry[0].log, entry[0].seq)):
        device, new_key = change.device, change.new_key
        valid = "FROM keys WHERE kid = ? AND revoked IS NULL"
        old = db.execute(f"SELECT log, last_seq {valid}", (change.old_kid,)).fetchone()
        owner = db.execute(f"SELECT device {valid}", (new_key.kid,)).fetchone()
        if old and old[1] is not None and owner == (device,):
            # A repeated rotation: see `Keyring.require_in_bounds`.
            continue
        if old != (None, None):
            problem = "with one that was already replaced"
            yield message, f"{device} announced a new signing key {problem}; nothing changed."
        elif db.execute("SELECT 1 FROM keys WHERE kid = ?", (new_key.kid,)).fetchone():
            yield message, f"{device} announced a signing key that is already known, {new_key.text}; nothing changed."
        else:
            _set_bound(db, change.old_kid, change.log, change.seq)
            _insert_key(db, device, new_key, now, "device")


def require_active(db: Connection, kids: Iterable[str]) -> None:
    """Raise MessageRefused if one of these keys is not enrolled, or is revoked.

    The signatures were verified before this transaction began. Since then a key may have been revoked, or the rotation
    that announced it may have been rejected.
    """
    wanted = sorted(kids)
    known = db.revocation_times(wanted)
    for kid in wanted:
        if kid not in known or known[kid] is not None:
            raise MessageRefused("revoked key" if kid in known else "unknown key", f"kid {kid}")


def _set_bound(db: Connection, kid: str, log: str | None, last_seq: int) -> None:
    db.execute("UPDATE keys SET log = ?, last_seq = ? WHERE kid = ?", (log, last_seq, kid))


def _insert_key(db: Connection, device: str, key: PublicKey, now: str, made_by: KeyMaker) -> None:
    sql = "INSERT INTO keys (kid, device, key, added, made_by) VALUES (?, ?, ?, ?, ?)"
    db.execute(sql, (key.kid, device, key.text, now, made_by))
    _bump_keys_version(db)


def _bump_keys_version(db: Connection) -> None:
    db.execute("UPDATE meta SET value = value + 1 WHERE name = 'keys_version'")
