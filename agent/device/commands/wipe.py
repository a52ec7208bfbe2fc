"""Wipe: operators erase the device's readings, results, state and keys.

The answer to the first command holds a word that the second must repeat, which proves that somebody read it. A wipe
that one key confirmed is announced by an alert and happens after a delay, unless an operator cancels it or its key is
revoked meanwhile; a second key that confirms one makes it happen at once. A restart continues the delay.

Once a wipe is committed, it happens whatever crashes: the store records it, then the marker file. Flash memory may keep
deleted data: where that matters, encrypt or destroy the medium.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from agent import clock, decoders, durable_files, input_files
from agent.alerts.kinds import WIPE_PENDING
from agent.clock import ClockReading
from agent.config import Config
from agent.device.bundles import history
from agent.device.machine.trusted_keys import TrustedKeys
from agent.device.pipeline.tasks import Effect
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import RowRejected, StorageError, StorageFull, UsageError
from agent.wire.commands import may_command

log = logging.getLogger("outstation")

MARKER = "wiped"
CONFIRM_VALID_S = 600.0
DELIVERY_TIMEOUT_S = 10.0
_FULL_RETRY_S = 5.0
# In table meta: seq of the audit message.
_WIPE_SEQ = "wipe"
# In table meta: the wipe that one key confirmed.
_PENDING = "pending wipe"
_PRESERVED = frozenset({MARKER, "lock", "bundles"})


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


def read_marker(data_dir: Path) -> dict[str, Any] | None:
    """Return the marker's members, or None if nothing was wiped. Raises StorageError if it cannot be read."""
    path = data_dir / MARKER
    try:
        return dict(json.loads(input_files.read_bytes(path)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror}; the daemon cannot tell whether this device was wiped, and does nothing: "
            "check the disk and the folder's permissions"
        ) from error
    except (ValueError, TypeError):
        return {"state": "wiping"}


def describe_marker(data_dir: Path, marker: Mapping[str, Any]) -> str:
    left = [str(path) for path in marker.get("left", [])]
    still = f" These could not be deleted, do it by hand: {', '.join(left)}." if left else ""
    return (
        f"{data_dir}: this device was wiped by an operator at {marker.get('time', 'a time not known')}; it does not "
        f"start again.{still} To use it anew, enrol it with a new key (`outstation fleet enrol --replace`) and delete "
        f"{data_dir / MARKER}"
    )


def require_unwiped(data_dir: Path) -> None:
    """Raise UsageError if the device was wiped, or StorageError if that cannot be read."""
    marker = read_marker(data_dir)
    if marker is not None:
        raise UsageError(describe_marker(data_dir, marker))


def erase(data_dir: Path, preserved: Collection[Path], keys: Iterable[Path]) -> dict[str, Any]:
    """Delete the daemon's files in `data_dir`, and `keys`, but not `preserved`; return the marker's members.

    May be called again after a crash. Files that cannot be deleted are listed in the marker.
    """
    time = clock.to_rfc3339(clock.read().wall_us)
    _write_marker(data_dir, {"state": "wiping", "time": time})
    excluded = {path.resolve() for path in preserved}
    doomed = [path for path in data_dir.iterdir() if path.name not in _PRESERVED and path.name != MARKER + ".new"]
    doomed += [history.copies_folder(data_dir), data_dir / "bundles" / ".fetched", *keys]
    left = [str(path) for path in doomed if path.resolve() not in excluded and not _delete(path)]
    durable_files.fsync(data_dir)
    marker = {"state": "wiped", "time": time, "left": left}
    _write_marker(data_dir, marker)
    log.warning("%s", describe_marker(data_dir, marker))
    return marker


def installation_files(file: Path, conf: Config) -> list[Path]:
    """Return files of the installation, which must stay even if they lie in the data folder."""
    listed = [conf.broker.ca_file, conf.broker.cert_file, conf.broker.tls_key_file]
    if conf.updates is not None:
        listed += [conf.updates.ca_file, conf.updates.root]
    return [file, *(Path(path) for path in listed if path)]


def _delete(path: Path) -> bool:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.error("%s: cannot be deleted: %s", path, error.strerror)
        return False
    with contextlib.suppress(OSError):
        durable_files.fsync(path.parent)
    return True


def _write_marker(data_dir: Path, content: dict[str, Any]) -> None:
    durable_files.write(data_dir / MARKER, json.dumps(content).encode() + b"\n")
