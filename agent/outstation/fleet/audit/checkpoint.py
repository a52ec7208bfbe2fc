"""Audit checkpoint: a signed state from which the next audit continues.

It verifies the messages behind the checkpoint, and compares those before it with a digest of their rows: that finds any
change without signatures or decoding. The digest begins with the rows of the device's keys, on which the signatures
depend. A device with a change is audited as a whole.

`checkpoint.json` names a file for each range of devices, with its digest, and is signed with the operator's key. Each
file is a database: the derived tables of the replay, and the state of each log. A device with a problem is in none, so
that the next audit verifies all of it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from outstation.fleet.audit.coverage import CoverageState
from outstation.fleet.database.store import DeviceRange
from outstation.foundation import decoders, durable_files
from outstation.foundation.errors import MessageRefused, StorageError, UsageError
from outstation.protocol.documents.signed_document import DocumentKind
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import PublicKey, SigningKey

_FILE = "checkpoint.json"
_READ_BYTES = 1 << 20


class LogState(msgspec.Struct):
    """State of the audit of one log up to `last_seq`: the digest of that message, and the gaps so far.

    `stored_digest`: of the device's keys, and of all rows that the messages up to there have in the database.
    """

    last_seq: int = 0
    stored_digest: str = ""
    last_digest: str | None = ""
    missing: list[tuple[int, int]] = []
    declared: list[tuple[int, int]] = []
    coverage: CoverageState = msgspec.field(default_factory=CoverageState)


class Part(msgspec.Struct, frozen=True):
    """A range of devices, and the file with their state; `digest` is of its content."""

    devices: DeviceRange
    file: str
    digest: str


class Checkpoint(msgspec.Struct, frozen=True):
    fleet: str
    time: str
    messages: int
    parts: list[Part]


_KIND = DocumentKind(Checkpoint, "outstation/{}/audit-checkpoint")


class CheckpointFolder:
    """Folder with the checkpoint of one fleet. `trusted`: keys whose checkpoint is believed."""

    def __init__(self, path: Path, fleet: str, trusted: Sequence[PublicKey]) -> None:
        self.path, self._fleet = path, fleet
        self._signers = {key.kid: Signer("auditor", key) for key in trusted}

    def load(self) -> Checkpoint | None:
        """Return the checkpoint; None if there is none. Raises UsageError if it is not genuine."""
        file = self.path / _FILE
        try:
            checkpoint = self._read(file)
            for part in checkpoint.parts:
                if Path(part.file).name != part.file or _digest(self.path / part.file) != part.digest:
                    raise UsageError(f"{part.file} is not the file that was signed")
        except FileNotFoundError as error:
            if not file.exists():
                return None
            raise UsageError(self._describe(f"{error.filename} is missing")) from None
        except (OSError, MessageRefused, UsageError, ValueError) as error:
            raise UsageError(self._describe(str(error))) from None
        return checkpoint

    def read_signed(self) -> Checkpoint | None:
        """Return the checkpoint as it was signed, without a look at its files. Raises UsageError as `load`."""
        try:
            return self._read(self.path / _FILE)
        except FileNotFoundError:
            return None
        except (OSError, MessageRefused, ValueError) as error:
            raise UsageError(self._describe(str(error))) from None

    def _read(self, file: Path) -> Checkpoint:
        return _KIND.verify(_KIND.read_json(file.read_bytes()), self._signers.get, self._fleet)

    def _describe(self, problem: str) -> str:
        return f"{self.path / _FILE}: cannot be believed: {problem}; audit everything with --full"

    def new_file(self) -> Path:
        return self.path / f"part-{uuid.uuid4().hex}.db"

    def save(self, key: SigningKey, time: str, messages: int, parts: Sequence[tuple[DeviceRange, Path]]) -> None:
        """Sign the files of all ranges as the new checkpoint, and remove those of earlier ones. Raises StorageError."""
        try:
            made = [Part(devices, file.name, _digest(file)) for devices, file in parts]
            signed = _KIND.sign_body(key, Checkpoint(self._fleet, time, messages, made), self._fleet)
            durable_files.write(self.path / _FILE, signed.to_json(), 0o600)
        except OSError as error:
            raise StorageError(f"{self.path / _FILE}: cannot be written: {error}; run one audit at a time") from error
        named = {part.file for part in made}
        for file in self.path.glob("part-*.db*"):
            if file.name not in named:
                file.unlink(missing_ok=True)


def load_states(db: sqlite3.Connection) -> dict[tuple[str, str], LogState]:
    """Return the state of each log in a part."""
    rows = db.execute("SELECT device, log, state FROM audited ORDER BY device, log")
    return {(device, log): decoders.from_json(state, LogState) for device, log, state in rows}


def save_states(db: sqlite3.Connection, states: dict[tuple[Any, Any], LogState]) -> None:
    rows = [(*log, msgspec.json.encode(state)) for log, state in states.items()]
    db.execute("DELETE FROM audited")
    db.executemany("INSERT INTO audited VALUES (?, ?, ?)", rows)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_READ_BYTES):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def copy_database(source: sqlite3.Connection, file: Path) -> None:
    """Write a database to a new file, readable by its owner only. Raises StorageError."""
    try:
        file.touch(mode=0o600)
        with contextlib.closing(sqlite3.connect(file)) as target:
            source.backup(target)
        durable_files.fsync(file)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"{file}: the checkpoint cannot be written: {error}") from error
