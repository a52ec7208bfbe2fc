"""Tables, pragmas and the longer statements of the device store."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from agent.device.store import meta, outbox, task_keys

_FIRST_TABLES = (
    # log, boot, boot_id, seq, digest, time floor.
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # fields: JSON of names and types, as the chunks are packed.
    """CREATE TABLE streams (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, fields TEXT NOT NULL, next_row INTEGER NOT NULL)""",
    # rows first_row … first_row + n - 1; clock: 0 synced, 1 restored, 2 unsynced.
    """CREATE TABLE chunks (
        id INTEGER PRIMARY KEY, stream INTEGER NOT NULL REFERENCES streams, first_row INTEGER NOT NULL,
        n INTEGER NOT NULL, first_t INTEGER NOT NULL, time_bytes INTEGER NOT NULL, data BLOB NOT NULL,
        crc INTEGER NOT NULL, boot INTEGER NOT NULL, clock INTEGER NOT NULL)""",
    "CREATE UNIQUE INDEX chunk_rows ON chunks (stream, first_row)",
    # Chunks that cannot be read back, out of every task's way, for somebody to look at.
    """CREATE TABLE damaged (
        stream INTEGER NOT NULL, first_row INTEGER NOT NULL, n INTEGER NOT NULL, data BLOB NOT NULL)""",
    """CREATE TABLE categories (
        stream TEXT NOT NULL, field TEXT NOT NULL, code INTEGER NOT NULL, value TEXT NOT NULL,
        PRIMARY KEY (stream, field, code)) WITHOUT ROWID""",
    # row: the last one the task consumed; first: where it began.
    "CREATE TABLE cursors (task TEXT PRIMARY KEY, row INTEGER NOT NULL, first INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE state (task TEXT NOT NULL, name TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (task, name))",
    """CREATE TABLE outbox (
        seq INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL, jws TEXT NOT NULL, time TEXT NOT NULL)""",
    # How far a source got with an item (a file, a named client), committed with its rows.
    """CREATE TABLE marks (
        source TEXT NOT NULL, item TEXT NOT NULL, position INTEGER NOT NULL,
        PRIMARY KEY (source, item)) WITHOUT ROWID""",
    "CREATE TABLE counters (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID",
    # The newest alerts, for `outstation status`.
    "CREATE TABLE alerts (body TEXT NOT NULL)",
)


def first_tables(db: sqlite3.Connection) -> None:
    # One by one: sqlite3's executescript commits first, and would leave half of them after a crash.
    for statement in _FIRST_TABLES:
        db.execute(statement)


_SEGMENTS = (
    # In force from boot time first_us to last_us, as far as was seen; quality: 0 synced, 1 restored, 2 unsynced.
    """CREATE TABLE segments (
        boot INTEGER NOT NULL, segment INTEGER NOT NULL, offset_us INTEGER NOT NULL, first_us INTEGER NOT NULL,
        last_us INTEGER NOT NULL, quality INTEGER NOT NULL, error_us INTEGER, announced INTEGER NOT NULL,
        PRIMARY KEY (boot, segment)) WITHOUT ROWID""",
    # segment: 0 where the producer gave the times; boot_us: boot time of the commit.
    "ALTER TABLE chunks ADD COLUMN segment INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE chunks ADD COLUMN boot_us INTEGER NOT NULL DEFAULT 0",
)


def segments(db: sqlite3.Connection) -> None:
    for statement in _SEGMENTS:
        db.execute(statement)


_COMMANDS = (
    # The highest counter of each operator key, by its kid.
    "CREATE TABLE commands (kid TEXT PRIMARY KEY, counter INTEGER NOT NULL) WITHOUT ROWID",
    # body: JSON, NULL while it is obeyed; sent: 1 once a broker has confirmed it.
    """CREATE TABLE answers (
        number INTEGER PRIMARY KEY AUTOINCREMENT, kid TEXT NOT NULL, id TEXT NOT NULL, name TEXT NOT NULL,
        args TEXT NOT NULL, counter INTEGER NOT NULL, correlation BLOB, body TEXT, sent INTEGER NOT NULL DEFAULT 0,
        UNIQUE (kid, id))""",
)


def commands(db: sqlite3.Connection) -> None:
    for statement in _COMMANDS:
        db.execute(statement)


def message_crcs(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE outbox ADD COLUMN crc INTEGER NOT NULL DEFAULT 0")
    seqs = [row[0] for row in db.execute("SELECT seq FROM outbox").fetchall()]
    for seq in seqs:
        row = db.execute(f"SELECT {outbox.MESSAGE_COLUMNS} FROM outbox WHERE seq = ?", (seq,)).fetchone()
        db.execute("UPDATE outbox SET crc = ? WHERE seq = ?", (outbox.message_crc(*row[:-1]), seq))
    # What waits is counted as it comes and goes from now on.
    size = "coalesce(sum(length(payload) + length(jws) + length(topic)), 0)"
    db.execute(f"INSERT OR IGNORE INTO meta SELECT 'waiting', count(*) || ' ' || {size} FROM outbox")
    # Messages that are not what was written, out of everyone's way, for somebody to look at.
    columns = "seq INTEGER NOT NULL, topic BLOB, payload BLOB, jws BLOB, time BLOB, crc INTEGER"
    db.execute(f"CREATE TABLE damaged_messages ({columns})")


# Few words: what describes all tables must fit into the first page, of which the watermark keeps a copy.
_LABELS = (
    # Of one batch of `task`: rows of its first and last result, time of the last, uptime, and all packed by `labelled`.
    """CREATE TABLE results (task TEXT, first INT, last INT, n INT, t INT, at INT, data BLOB,
        PRIMARY KEY (task, first)) WITHOUT ROWID""",
    # number: in the order they came; below 0, and without a row, those whose result is not there yet.
    """CREATE TABLE labels (task TEXT, number INT, row INT, data BLOB,
        PRIMARY KEY (task, number)) WITHOUT ROWID""",
    "CREATE UNIQUE INDEX label_rows ON labels (task, row)",
)


def labels(db: sqlite3.Connection) -> None:
    for statement in _LABELS:
        db.execute(statement)


def marks_in_order(db: sqlite3.Connection) -> None:
    # used: the larger, the later it was set; NULL before there was such a column.
    db.execute("ALTER TABLE marks ADD COLUMN used INT")


def meta_crcs(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE meta ADD COLUMN crc INT")
    for key, value in db.execute("SELECT key, value FROM meta").fetchall():
        db.execute("UPDATE meta SET crc = ? WHERE key = ?", (meta.row_crc(key, value), key))


# In this order; `recovery.migrate` applies them, and the store remembers their names.
MIGRATIONS = (first_tables, segments, commands, message_crcs, labels, marks_in_order, meta_crcs)


# (name=value, the value that must be read back if safety depends on it).
Pragmas = Sequence[tuple[str, str | None]]


def pragmas(max_pages: int, wal_bytes: int, synchronous: str = "FULL") -> Pragmas:
    """Return the pragmas of a writing connection, in order."""
    levels = {"OFF": "0", "NORMAL": "1", "FULL": "2"}
    return [
        ("journal_mode=WAL", "wal"),
        # NORMAL lost acknowledged rows in 28 of 50 simulated power cuts, FULL in none.
        (f"synchronous={synchronous}", levels[synchronous]),
        # Debian builds SQLite to overwrite deleted rows: four times the writes on flash.
        ("secure_delete=OFF", None),
        ("temp_store=MEMORY", None),
        ("cache_size=-2000", None),
        ("mmap_size=0", None),
        # Transactions see to that themselves, before they begin.
        ("wal_autocheckpoint=0", None),
        (f"journal_size_limit={wal_bytes}", None),
        (f"max_page_count={max_pages}", None),
        ("foreign_keys=ON", None),
        ("trusted_schema=OFF", None),
    ]


# Starts at the chunk that holds the row after `after`, by the index: the backlog's length does not matter.
# CAST: one flipped bit on the disk makes the blob a text that cannot be read.
SELECT_CHUNKS = """
    SELECT first_row, n, first_t, time_bytes, CAST(data AS BLOB), crc, boot, segment, clock FROM chunks
    WHERE stream = (SELECT id FROM streams WHERE name = :stream)
      AND first_row + n > :after + 1
      AND first_row >= coalesce(
        (SELECT max(first_row) FROM chunks
         WHERE stream = (SELECT id FROM streams WHERE name = :stream) AND first_row <= :after + 1), 0)
    ORDER BY stream, first_row
"""

INSERT_CHUNK = """
    INSERT INTO chunks (stream, first_row, n, first_t, time_bytes, data, crc, boot, clock, segment, boot_us)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

# In table meta, with the name of the stream: the last row that was deleted because it was used, or declared.
TRIMMED_THROUGH = "trimmed "

FIRST_DAMAGED_RANGE = """
    SELECT first_row, first_row + n - 1 FROM damaged
    WHERE stream = (SELECT id FROM streams WHERE name = :stream) AND first_row + n > :first AND first_row <= :last
    ORDER BY first_row LIMIT 1
"""

_NEXT_USE = "(SELECT coalesce(max(used), 0) + 1 FROM marks WHERE source = :source)"
UPDATE_SOURCE_POSITION = (
    f"UPDATE marks SET position = :position, used = {_NEXT_USE} WHERE source = :source AND item = :item"
)
INSERT_SOURCE_POSITION = (
    f"INSERT INTO marks (source, item, position, used) VALUES (:source, :item, :position, {_NEXT_USE})"
)
PRUNE_SOURCE_POSITIONS = """
    DELETE FROM marks WHERE source = :source AND item IN (
        SELECT item FROM marks WHERE source = :source ORDER BY used DESC LIMIT -1 OFFSET :most)
"""

# Kinds of alerts that are kept while they are open, in `state` under this and their id. The others, such as a row that
# cannot be read, are never cleared.
OPEN_ALERT_KINDS = ("drift", "fault", "model", "quality")
SELECT_OPEN_ALERTS = (
    f"SELECT CAST(value AS BLOB) FROM state WHERE task = ? AND substr(name, 1, {len(task_keys.OPEN_ALERT_PREFIX)}) = ?"
)

SELECT_OLD_ALERTS = """
    SELECT rowid, length(body) FROM alerts WHERE rowid <= (SELECT max(rowid) FROM alerts) - 50 ORDER BY rowid LIMIT 200
"""

SELECT_DAMAGED_SIZES = """
    SELECT length(data) FROM chunks
    WHERE stream = (SELECT id FROM streams WHERE name = :stream) AND first_row + n > :first AND first_row <= :last
"""

COPY_TO_DAMAGED = """
    INSERT INTO damaged SELECT stream, first_row, n, data FROM chunks
    WHERE stream = (SELECT id FROM streams WHERE name = :stream) AND first_row + n > :first AND first_row <= :last
"""

DELETE_DAMAGED_CHUNKS = """
    DELETE FROM chunks
    WHERE stream = (SELECT id FROM streams WHERE name = :stream) AND first_row + n > :first AND first_row <= :last
"""

# Oldest used chunks by the index, then by time: however many are kept, only `limit` of them are looked at.
SELECT_OLDEST_CHUNKS = """
    SELECT id, first_row, last_row, size FROM (
        SELECT id, first_row, first_row + n - 1 AS last_row, length(data) AS size, first_t, boot, boot_us
        FROM chunks
        WHERE stream = (SELECT id FROM streams WHERE name = :stream) AND first_row + n - 1 <= :used
        ORDER BY first_row LIMIT :limit)
    WHERE first_t < :before AND (boot <> :boot OR boot_us = 0 OR boot_us <= :came)
"""
