"""Journal of small commits: a file of fixed size, written in place, that holds commits which the database lacks.

A commit of ten rows changes four pages of the database, and ext4 journals the growth of the write-ahead log: 28 KB of
flash. In the journal it takes one block. A record is one commit: the statements that it ran, with a number and a CRC.
The newest block is written again with one record more, in the *other* of two places, so a torn write never touches a
record that was acknowledged. The database holds the number of the last record that it includes, in the transaction that
includes it, so no record is ever applied twice.

Records are bound to one opening of the store: a journal left from another one is not applied. Each has the opening's id
itself, so a record is intact or damaged whatever became of the database.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from outstation.device.store import watermark
from outstation.device.store.tables import meta, schema
from outstation.foundation import decoders, durable_files
from outstation.foundation.errors import StorageError

FILE_NAME, WRITE_AHEAD_LOG = "journal", "outstation.db-wal"
SIZE, _BLOCK = 64 << 10, 4096
_BLOCKS = SIZE // _BLOCK
_MAX_SIZE = 1 << 20  # of a file that another release may have written
# Id of the opening, number, length of the body; then the CRC-32 of these and the body.
_RECORD, _CRC = struct.Struct("<8sQI"), struct.Struct("<I")
_HEADER_SIZE = _RECORD.size + _CRC.size
MAX_BODY = _BLOCK - _HEADER_SIZE
# In table meta: id of the opening, and number of the last record that the database includes.
_PROGRESS = "journal"
# A statement's place is its code in the file: never reorder them, and have a new version apply those of earlier ones. A
# changed one, also with other parameters, is a new one: an older version then refuses it instead of leaving it out.
_STATEMENTS = (
    schema.INSERT_CHUNK,
    schema.UPDATE_NEXT_ROW,
    schema.UPDATE_LATEST_TIME,
    schema.REPLACE_CATEGORY,
    schema.UPDATE_SOURCE_POSITION,
    schema.INSERT_SOURCE_POSITION,
    schema.PRUNE_SOURCE_POSITIONS,
    schema.INCREMENT_COUNTER,
    schema.EXTEND_SEGMENT,
)
_CODES = {sql: code for code, sql in enumerate(_STATEMENTS)}
# Statements of one record with their parameters.
Record = list[tuple[int, list[Any] | dict[str, Any]]]
_Integer = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
_PARAMETERS: dict[int, Any] = {
    _CODES[schema.INSERT_CHUNK]: tuple[
        _Integer, _Count, _Count, _Integer, _Integer, bytes, _Integer, _Integer, _Integer, _Integer, _Integer
    ],
    _CODES[schema.UPDATE_NEXT_ROW]: tuple[_Integer, _Integer],
}
_ENCODER, _DECODER = msgspec.msgpack.Encoder(), decoders.msgpack_decoder(Record)
_READING = ("SELECT", "PRAGMA")
_SELECT_NEXT_ROWS = """
    SELECT id, fields, next_row, (SELECT first_row + n FROM chunks WHERE stream = s.id ORDER BY first_row DESC LIMIT 1)
    FROM streams s
"""
# Errors of a statement with wrong parameters, not of the disk.
_REFUSALS = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError)


class JournaledConnection(sqlite3.Connection):
    """Connection that records what a small transaction writes.

    `recorded` is None while nothing is to be recorded, or after a statement that the journal cannot hold.
    """

    recorded: list[tuple[int, Any]] | None = None

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        cursor = super().execute(sql, parameters)
        if self.recorded is not None and not sql.lstrip().startswith(_READING):
            if (code := _CODES.get(sql)) is None:
                self.recorded = None
            else:
                self.recorded.append((code, parameters))
        return cursor

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> sqlite3.Cursor:
        self.recorded = None
        return super().executemany(sql, parameters)


class RecordedChunk(msgspec.Struct, frozen=True):
    """Chunk that a record inserts, with rows `first` to `last`."""

    stream: int
    first: int
    last: int
    crc: int


class PendingRecords(msgspec.Struct):
    """Records that a database does not include, body by number, in order.

    `opening`: their id; `included`: number of the last record that the database includes; `newest`: of the last record
    in the file, 0 if there is none.
    """

    opening: str
    included: int
    newest: int
    bodies: dict[int, bytes]


class Journal:
    """Journal file of the process that writes."""

    def __init__(self, folder: Path, mode: int) -> None:
        """Open or create the file. Raises OSError, and StorageError if something else has its name."""
        path = folder / FILE_NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        require_own_file(path)
        self._file = os.open(path, flags, mode)
        try:
            if os.fstat(self._file).st_mode & 0o007:
                os.fchmod(self._file, mode)
            if _extend(self._file) and (folder / WRITE_AHEAD_LOG).exists():
                # Else SQLite flushes the folder, when it makes its log.
                durable_files.fsync(folder)
        except BaseException:
            os.close(self._file)
            raise
        self._opening, self.number = "", 0
        # Places of the newest block and of the next one.
        self._current: int | None = None
        self._spare = 0
        self.clear()

    def begin(self, db: sqlite3.Connection) -> None:
        """Bind the records that follow to this opening, in the transaction that includes those of the last one."""
        self._opening, self.number = os.urandom(8).hex(), 0
        self.write_progress(db, 0)
        self.clear()

    def write_progress(self, db: sqlite3.Connection, number: int) -> None:
        """Record in `db` that it includes the records up to `number`."""
        meta.put(db, _PROGRESS, f"{self._opening} {number}")

    def clear(self) -> None:
        """Forget all records, which the database includes. The newest stays in the file until the next is written."""
        self.records: dict[int, bytes] = {}
        self._block = b""
        self._free = [number for number in range(_BLOCKS) if number not in (self._current, self._spare)]

    def shrink(self) -> None:
        """Cut a larger file to SIZE, once the database includes its records. Raises OSError."""
        if os.fstat(self._file).st_size > SIZE:
            os.ftruncate(self._file, SIZE)

    def has_place(self, body: bytes) -> bool:
        """Return True if the next record fits into the newest block, or a block is free."""
        return bool(self._free) or len(self._block) + _HEADER_SIZE + len(body) <= _BLOCK

    def append(self, body: bytes) -> None:
        """Write the next record, which has a place, through to the disk.

        Raises OSError: it is then unknown whether the record is on the disk, and `number` counts it.
        """
        number = self.number + 1
        record = _frame(self._opening, number, body)
        is_full = len(self._block) + len(record) > _BLOCK
        block = record if is_full else self._block + record
        self.number = number
        if os.pwrite(self._file, block.ljust(_BLOCK, b"\0"), self._spare * _BLOCK) != _BLOCK:
            raise OSError("the block was written in part")
        os.fdatasync(self._file)
        # The records of a full block have no other place.
        next_spare = self._free.pop(0) if is_full or self._current is None else self._current
        self._current, self._spare = self._spare, next_spare
        self._block = block
        self.records[number] = body

    def close(self) -> None:
        os.close(self._file)


def _extend(file: int) -> bool:
    """Write zeros up to SIZE, so that later writes change no metadata. Return False if nothing was missing.

    What is there stays: records of the last opening have yet to be replayed. Raises OSError.
    """
    size = os.fstat(file).st_size
    if size >= SIZE:
        return False
    while size < SIZE:
        # A disk that fills up takes a part without an error.
        size += os.pwrite(file, bytes(SIZE - size), size)
    return True


def encode(recorded: list[tuple[int, Any]]) -> bytes | None:
    """Encode what a transaction wrote as the body of a record; None if a block cannot hold it."""
    try:
        body = _ENCODER.encode(recorded)
    except (TypeError, ValueError, OverflowError):
        return None
    return body if len(body) <= MAX_BODY else None


def decode(body: bytes) -> Record:
    """Decode an intact body. Raises ValueError if it is none, StorageError if a newer version wrote it."""
    record = _DECODER.decode(body)
    if any(code >= len(_STATEMENTS) for code, _ in record):
        raise StorageError(
            f"file {FILE_NAME} in the data folder: made by a newer version of outstation, and it holds acknowledged "
            "rows; install that version again"
        )
    for code, parameters in record:
        if code < 0:
            raise ValueError("a statement is not known")
        if expected := _PARAMETERS.get(code):
            decoders.convert(parameters, expected)
    return record


def chunks(record: Record) -> list[RecordedChunk]:
    """Return the chunks that a record inserts."""
    inserted = [list(parameters) for code, parameters in record if code == _CODES[schema.INSERT_CHUNK]]
    return [RecordedChunk(stream, first, first + n - 1, crc) for stream, first, n, _, _, _, crc, *_ in inserted]


def without_chunks(record: Record, streams: set[int]) -> Record:
    """Return a record without its chunks of these streams."""
    place = {_CODES[schema.INSERT_CHUNK]: 0, _CODES[schema.UPDATE_NEXT_ROW]: 1}
    return [
        (code, parameters)
        for code, parameters in record
        if not (code in place and isinstance(parameters, list) and parameters[place[code]] in streams)
    ]


def apply(db: sqlite3.Connection, record: Record) -> None:
    """Run a record's statements inside a transaction, all or none. Raises ValueError if it is wrong, sqlite3.Error."""
    db.execute("SAVEPOINT record")
    try:
        for code, parameters in record:
            db.execute(_STATEMENTS[code], parameters)
    except (ValueError, TypeError, OverflowError, *_REFUSALS) as error:
        db.execute("ROLLBACK TO record")
        db.execute("RELEASE record")
        raise ValueError(f"the database does not take it: {error}") from error
    db.execute("RELEASE record")


def require_own_file(path: Path) -> None:
    """Raise StorageError if a link, a pipe or a file with a second name stands at `path`."""
    try:
        status = os.lstat(path)
    except OSError:
        return
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise StorageError(f"{path}: not a file of the store's own; somebody put it there: move it away")


def read_file(folder: Path) -> bytes:
    """Return what the journal in `folder` holds, b"" if there is none. Raises StorageError."""
    path = folder / FILE_NAME
    require_own_file(path)
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return os.pread(file, _MAX_SIZE, 0)
        finally:
            os.close(file)
    except FileNotFoundError:
        return b""
    except OSError as error:
        problem = f"{path}: {error.strerror}; it may hold acknowledged rows"
        raise StorageError(f"{problem}: make it readable, or move it away to lose them") from error


def require_known_records(folder: Path) -> None:
    """Raise StorageError if the journal has a record of a newer version, whether the database includes it or not."""
    for _, _, body in _intact_records(read_file(folder)):
        with contextlib.suppress(ValueError):
            decode(body)


def pending(db: sqlite3.Connection, content: bytes) -> PendingRecords:
    """Return the records that the database does not include. Raises StorageError, sqlite3.Error."""
    intact = list(_intact_records(content))
    opening, _, number = meta.get(db, _PROGRESS, "").partition(" ")
    # The first block has the newest opening. A salvage may have lost the progress.
    opening = opening or next((opening for opening, _, _ in intact), "")
    bodies = {number: body for written, number, body in sorted(intact) if written == opening}
    included = int(number) if number else _infer_included(db, bodies)
    newest = max(bodies, default=0)
    return PendingRecords(opening, included, newest, {n: body for n, body in bodies.items() if n > included})


def include(db: sqlite3.Connection, opening: str, number: int) -> None:
    """Record that the database includes the records of an opening up to `number`."""
    meta.put(db, _PROGRESS, f"{opening} {number}")


def included_through(db: sqlite3.Connection) -> int:
    """Return the number of the last record that the database includes."""
    return int(meta.get(db, _PROGRESS, "").partition(" ")[2] or 0)


def end_progress(db: sqlite3.Connection) -> None:
    """Record that commits go to the database alone."""
    meta.delete(db, _PROGRESS)


def _infer_included(db: sqlite3.Connection, bodies: dict[int, bytes]) -> int:
    """Return the number of the last record that the database includes, from the rows that it has or had."""
    next_rows = dict[int, int]()
    for stream, fields, next_row, stored in db.execute(_SELECT_NEXT_ROWS).fetchall():
        # A salvage has the row of a damaged stream from the watermark, which counts the journal's rows, too.
        next_rows[stream] = (stored or 1) if watermark.is_placeholder(fields) else next_row
    for number, body in bodies.items():
        with contextlib.suppress(ValueError):
            if any(chunk.first >= next_rows.get(chunk.stream, chunk.first + 1) for chunk in chunks(decode(body))):
                return number - 1
    return max(bodies, default=0)


def _frame(opening: str, number: int, body: bytes) -> bytes:
    head = _RECORD.pack(bytes.fromhex(opening), number, len(body))
    return head + _CRC.pack(zlib.crc32(body, zlib.crc32(head))) + body


def _intact_records(content: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Yield (opening, number, body) of each record with a right CRC."""
    for block in (content[at : at + _BLOCK] for at in range(0, len(content), _BLOCK)):
        at = 0
        while at + _HEADER_SIZE <= len(block):
            opening, number, length = _RECORD.unpack_from(block, at)
            if not length:
                break
            body = block[at + _HEADER_SIZE : at + _HEADER_SIZE + length]
            # A damaged record hides those behind it only if its length is damaged.
            if block.startswith(_frame(opening.hex(), number, body), at):
                yield opening.hex(), number, body
            at += _HEADER_SIZE + length


# --- reading beside the process that writes ---

_COPIED = ("streams", "categories", "source_positions", "counters", "clock_segments")
# A chunk may have come into the database since the journal was read.
_CHUNKS = """
    CREATE TEMP VIEW chunks AS SELECT * FROM main.chunks
    UNION ALL SELECT * FROM temp.journal_chunks AS added
    WHERE NOT EXISTS (
        SELECT 1 FROM main.chunks AS old WHERE old.stream = added.stream AND old.first_row = added.first_row)
"""


class JournalView:
    """View of the journal for a process that only reads: its queries include the commits that the database lacks.

    The journal changes the small tables in place, so the view has copies of them, which it makes anew when the journal
    or the database has changed. Chunks are only added: the view joins those of the journal to those of the database.
    `is_complete` is False if a record is missing.
    """

    def __init__(self, folder: Path, db: sqlite3.Connection) -> None:
        self._folder, self._db = folder, db
        self._seen: tuple[bytes, int] | None = None
        self._is_installed, self.is_complete = False, True

    def refresh(self) -> None:
        """Bring the view up to date. Raises StorageError, sqlite3.Error."""
        content = read_file(self._folder)
        # Read in this order: a commit that leaves the journal meanwhile is in the database.
        seen = content, int(self._db.execute("PRAGMA data_version").fetchone()[0])
        if seen == self._seen:
            return
        self._db.execute("BEGIN")
        try:
            records = pending(self._db, content)
            if records.bodies or self._is_installed:
                self._copy_tables()
            applied = records.included
            for body in records.bodies.values():
                # A record that is missing or wrong: the next opening reports it.
                with contextlib.suppress(ValueError):
                    apply(self._db, decode(body))
                    applied += 1
            self.is_complete = applied == max(records.bodies, default=applied)
        finally:
            self._db.execute("COMMIT")
        self._seen = seen

    def _copy_tables(self) -> None:
        if not self._is_installed:
            sql = "SELECT sql FROM main.sqlite_master WHERE name = ?"
            for table in (*_COPIED, "chunks"):
                definition = self._db.execute(sql, (table,)).fetchone()[0]
                name = "journal_chunks" if table == "chunks" else table
                self._db.execute(definition.replace(f"TABLE {table}", f"TEMP TABLE {name}", 1))
            for table in _COPIED:
                self._db.execute(f"DROP VIEW checked_{table}")
                self._db.execute(f"CREATE TEMP VIEW checked_{table} AS SELECT * FROM temp.{table}")
            self._db.execute(_CHUNKS)
            names = list(schema.columns_of(self._db, "journal_chunks"))
            self._db.execute(
                "CREATE TEMP TRIGGER add_chunk INSTEAD OF INSERT ON chunks BEGIN INSERT INTO journal_chunks "
                f"({', '.join(names)}) VALUES ({', '.join(f'new.{name}' for name in names)}); END"
            )
            self._is_installed = True
        self._db.execute("DELETE FROM temp.journal_chunks")
        for table in _COPIED:
            self._db.execute(f"DELETE FROM temp.{table}")
            self._db.execute(f"INSERT INTO temp.{table} SELECT * FROM main.{table}")
