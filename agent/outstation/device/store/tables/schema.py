"""Database schema of the device store: tables, migrations, pragmas, and the longer statements."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from functools import cache

# crc: of a message, a chunk or a meta value; else of the row, as `row_crc` writes and checks it.
# Few words: the description of all tables must fit into the database's first page, of which the watermark has a copy.
_TABLES = (
    # log, boot, boot_id, seq, digest, time floor …
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, crc INT) WITHOUT ROWID",
    # fields: JSON of names and types, as the chunks are packed. latest_t: of rows that came with a time.
    """CREATE TABLE streams (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, fields TEXT NOT NULL, next_row INT NOT NULL, latest_t INT,
        crc INT)""",
    # Rows first_row … first_row + n - 1. clock: 0 synced, 1 restored, 2 unsynced. segment: 0 if the producer gave the
    # times. boot_us: boot time of the commit.
    """CREATE TABLE chunks (
        id INTEGER PRIMARY KEY, stream INT NOT NULL REFERENCES streams, first_row INT NOT NULL, n INT NOT NULL,
        first_t INT NOT NULL, time_bytes INT NOT NULL, data BLOB NOT NULL, crc INT NOT NULL, boot INT NOT NULL,
        clock INT NOT NULL, segment INT NOT NULL, boot_us INT NOT NULL)""",
    "CREATE UNIQUE INDEX chunk_rows ON chunks (stream, first_row)",
    # Chunks that cannot be read back, moved out of every task's way for inspection.
    "CREATE TABLE quarantined_rows (stream INT, first_row INT, n INT, data BLOB, crc INT)",
    # last_row: no later row has the code.
    """CREATE TABLE categories (stream TEXT, field TEXT, code INT, value TEXT NOT NULL, last_row INT NOT NULL, crc INT,
        PRIMARY KEY (stream, field, code)) WITHOUT ROWID""",
    # row: the last one the task consumed; first_row: the first one.
    "CREATE TABLE cursors (task TEXT PRIMARY KEY, row INT NOT NULL, first_row INT NOT NULL, crc INT) WITHOUT ROWID",
    "CREATE TABLE task_state (task TEXT, name TEXT, value BLOB NOT NULL, crc INT, PRIMARY KEY (task, name))",
    """CREATE TABLE outbox (seq INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL, jws TEXT NOT NULL,
        time TEXT NOT NULL, crc INT NOT NULL)""",
    # Messages whose CRC does not match, moved out of the outbox for inspection.
    "CREATE TABLE quarantined_messages (seq INT, topic BLOB, payload BLOB, jws BLOB, time BLOB, crc INT)",
    # How far a source has read an item (a file, a named client), committed with its rows; last_used: order of updates.
    """CREATE TABLE source_positions (source TEXT, item TEXT, position INT NOT NULL, last_used INT NOT NULL, crc INT,
        PRIMARY KEY (source, item)) WITHOUT ROWID""",
    "CREATE TABLE counters (name TEXT PRIMARY KEY, n INT NOT NULL, crc INT) WITHOUT ROWID",
    # The newest alerts, for `outstation status`.
    "CREATE TABLE alerts (body TEXT NOT NULL, crc INT)",
    # Seen in force from boot time first_us to last_us; quality as `clock` of chunks.
    """CREATE TABLE clock_segments (boot INT, segment INT, offset_us INT NOT NULL, first_us INT NOT NULL,
        last_us INT NOT NULL, quality INT NOT NULL, error_us INT, announced INT NOT NULL, crc INT,
        PRIMARY KEY (boot, segment)) WITHOUT ROWID""",
    # The highest counter of each operator key.
    "CREATE TABLE command_counters (kid TEXT PRIMARY KEY, counter INT NOT NULL, crc INT) WITHOUT ROWID",
    # body: JSON, NULL while the command runs; sent: 1 once a broker has confirmed it.
    """CREATE TABLE command_answers (
        number INTEGER PRIMARY KEY AUTOINCREMENT, kid TEXT, id TEXT, name TEXT NOT NULL, args TEXT NOT NULL,
        counter INT NOT NULL, correlation BLOB, reply_key TEXT, body TEXT, sent INT NOT NULL DEFAULT 0, crc INT,
        UNIQUE (kid, id))""",
    # Predictions of one batch, packed: rows of the first and the last, time of the last, uptime.
    """CREATE TABLE predictions (task TEXT, first_row INT, last_row INT, n INT, last_t INT, uptime_s INT, data BLOB,
        crc INT, PRIMARY KEY (task, first_row)) WITHOUT ROWID""",
    # number: in order of arrival; negative, and without a row, while the prediction is missing.
    """CREATE TABLE labels (task TEXT, number INT, row INT, data BLOB, crc INT,
        PRIMARY KEY (task, number)) WITHOUT ROWID""",
)


def create_tables(db: sqlite3.Connection) -> None:
    # One by one: sqlite3's executescript commits first, and would leave half of them after a crash.
    for statement in _TABLES:
        db.execute(statement)


def index_label_rows(db: sqlite3.Connection) -> None:
    """Index labels by row: a second label of a prediction replaces the first without a scan of all labels."""
    db.execute("CREATE UNIQUE INDEX label_rows ON labels (task, row)")


# Applied in this order by `recovery.migrate`, which records their names in the store: never rename or reorder them.
# From the release of 0.1.0 on none of them changes, and each change of the tables is a new step.
MIGRATIONS = (create_tables, index_label_rows)
STEPS = tuple(step.__name__ for step in MIGRATIONS)
MIGRATION_SET = "outstation-device"


def applied_steps(db: sqlite3.Connection) -> tuple[str, ...]:
    """Return the names of the applied steps, in order, from the table of sqlite-utils. Raises sqlite3.Error."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = '_sqlite_migrations'").fetchone() is None:
        return ()
    sql = "SELECT name FROM _sqlite_migrations WHERE migration_set = ? ORDER BY rowid"
    return tuple(str(name) for (name,) in db.execute(sql, (MIGRATION_SET,)).fetchall())


def is_newer(steps: Sequence[str]) -> bool:
    """Return True if a newer version applied `steps`."""
    return set(steps) > set(STEPS)


@cache
def columns(steps: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Return the columns of each table after these migrations, each with its place in the primary key, or 0."""
    with contextlib.closing(_make(steps)) as db:
        tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {table: columns_of(db, table) for (table,) in tables.fetchall()}


def columns_of(db: sqlite3.Connection, table: str) -> dict[str, int]:
    """Return the columns of a table, each with its place in the primary key, or 0; {} if there is no such table."""
    return dict(db.execute("SELECT name, pk FROM pragma_table_info(?)", (table,)).fetchall())


def find_damage(db: sqlite3.Connection, steps: tuple[str, ...]) -> str | None:
    """Return a sentence about the first table that is not described as the applied steps make it, or None.

    Raises sqlite3.Error.
    """
    if not steps or steps != STEPS[: len(steps)]:
        return "its list of migrations is not what was written"
    stored, made, newest = _descriptions(db), _known_descriptions(steps), _known_descriptions(STEPS)
    for name in newest:
        if stored.get(name) != made.get(name):
            return f"the description of {name} is not what was written"
    return None


@cache
def _known_descriptions(steps: tuple[str, ...]) -> dict[str, str]:
    with contextlib.closing(_make(steps)) as db:
        return _descriptions(db)


def _make(steps: Sequence[str]) -> sqlite3.Connection:
    """Make the tables of these migrations in memory."""
    db = sqlite3.connect(":memory:")
    for step in MIGRATIONS:
        if step.__name__ in steps:
            step(db)
    return db


def _descriptions(db: sqlite3.Connection) -> dict[str, str]:
    rows = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE '%sqlite_%'")
    return {str(name): str(sql) for name, sql in rows}


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
        # `QuotaEnforcer` checkpoints before a transaction begins.
        ("wal_autocheckpoint=0", None),
        (f"journal_size_limit={wal_bytes}", None),
        (f"max_page_count={max_pages}", None),
        ("foreign_keys=ON", None),
        ("trusted_schema=OFF", None),
    ]


# Starts at the chunk that holds the row after `after`, by the index: the backlog's length does not matter.
# ORDER BY with LIMIT uses the index also where `chunks` is a view (journal.py); min and max do not.
# CAST: one flipped bit on the disk makes the blob a text that cannot be read.
_AFTER = """
    WHERE stream = (SELECT id FROM checked_streams WHERE name = :stream)
      AND first_row + n > :after + 1
      AND first_row >= coalesce(
        (SELECT first_row FROM chunks
         WHERE stream = (SELECT id FROM checked_streams WHERE name = :stream) AND first_row <= :after + 1
         ORDER BY first_row DESC LIMIT 1), 0)
"""
SELECT_CHUNKS = f"""
    SELECT first_row, n, first_t, time_bytes, CAST(data AS BLOB), crc, stream, boot, clock, segment, boot_us FROM chunks
    {_AFTER} ORDER BY stream, first_row
"""
# Offsets of 4 bytes are 0 to 2³² - 1 µs; those of 8 bytes may lead anywhere. Reads no blob.
SELECT_ROW_NEAR_TIME = f"""
    SELECT max(first_row, :after + 1) FROM chunks
    {_AFTER} AND (time_bytes <> 4 OR (first_t < :end AND first_t + 4294967295 >= :begin))
    ORDER BY stream, first_row LIMIT 1
"""

INSERT_CHUNK = """
    INSERT INTO chunks (stream, first_row, n, first_t, time_bytes, data, crc, boot, clock, segment, boot_us)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

UPDATE_NEXT_ROW = "UPDATE streams SET next_row = ? WHERE id = ?"
UPDATE_LATEST_TIME = "UPDATE streams SET latest_t = ? WHERE name = ?"
REPLACE_CATEGORY = "INSERT OR REPLACE INTO categories (stream, field, code, value, last_row) VALUES (?, ?, ?, ?, ?)"
INCREMENT_COUNTER = "INSERT INTO counters (name, n) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n"
EXTEND_SEGMENT = """
    UPDATE clock_segments SET first_us = ?, last_us = ?, quality = ?, error_us = ? WHERE boot = ? AND segment = ?
"""

# Oldest used chunks by the index, then by time: reads `limit` of them, however many there are.
# Whether a stored row, or one of this transaction, may have the code.
SELECT_CATEGORIES = """
    SELECT value, code, coalesce(last_row >= coalesce(
        (SELECT min(first_row) FROM chunks WHERE stream = (SELECT id FROM checked_streams WHERE name = :stream)),
        (SELECT next_row FROM checked_streams WHERE name = :stream)), 1), last_row
    FROM checked_categories WHERE stream = :stream AND field = :field ORDER BY code
"""
SELECT_OLDEST_CHUNKS = """
    SELECT id, first_row, last_row, size FROM (
        SELECT id, first_row, first_row + n - 1 AS last_row, length(data) AS size, first_t, boot, boot_us
        FROM chunks
        WHERE stream = (SELECT id FROM checked_streams WHERE name = :stream) AND first_row + n - 1 <= :used
        ORDER BY first_row LIMIT :limit)
    WHERE first_t < :before AND (boot <> :boot OR boot_us <= :received_by)
"""

# Name in table meta, followed by the stream's name: the last row that was deleted after use, or declared as evicted.
TRIMMED_THROUGH = "trimmed "

_OVERLAP = """
    WHERE stream = (SELECT id FROM checked_streams WHERE name = :stream)
      AND first_row + n > :first AND first_row <= :last
"""
FIRST_QUARANTINED_RANGE = f"""
    SELECT first_row, first_row + n - 1 FROM checked_quarantined_rows {_OVERLAP} ORDER BY first_row LIMIT 1
"""
SELECT_CHUNK_SIZES = f"SELECT length(data) FROM chunks {_OVERLAP}"
COPY_TO_QUARANTINE = f"""
    INSERT INTO quarantined_rows (stream, first_row, n, data) SELECT stream, first_row, n, data FROM chunks {_OVERLAP}
"""
DELETE_CHUNKS = f"DELETE FROM chunks {_OVERLAP}"

_NEXT_USE = "(SELECT coalesce(max(last_used), 0) + 1 FROM source_positions WHERE source = :source)"
UPDATE_SOURCE_POSITION = f"""
    UPDATE source_positions SET position = :position, last_used = {_NEXT_USE} WHERE source = :source AND item = :item
"""
INSERT_SOURCE_POSITION = f"""
    INSERT INTO source_positions (source, item, position, last_used) VALUES (:source, :item, :position, {_NEXT_USE})
"""
PRUNE_SOURCE_POSITIONS = """
    DELETE FROM source_positions WHERE source = :source AND item IN (
        SELECT item FROM source_positions WHERE source = :source ORDER BY last_used DESC LIMIT -1 OFFSET :max_items)
"""

# Kinds of alerts that are stored while they are open. The others, such as a row that cannot be read, are never cleared.
OPEN_ALERT_KINDS = ("drift", "fault", "result", "model", "quality")
SELECT_OPEN_ALERTS = "SELECT value FROM checked_task_state WHERE task = ? AND instr(name, ?) = 1"
SELECT_OLD_ALERTS = """
    SELECT rowid, length(body) FROM alerts WHERE rowid <= (SELECT max(rowid) FROM alerts) - 50 ORDER BY rowid LIMIT 200
"""
