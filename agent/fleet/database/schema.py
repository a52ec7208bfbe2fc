"""Tables, pragmas and the longer statements of the collector's database.

`messages` is the evidence, kept exactly as it came; `results`, `drift_windows`, `quality` and `alerts` are the same
messages unfolded into rows to query, and could be made again from it. Times are RFC 3339 text, `t` is epoch µs.
"""

from __future__ import annotations

import contextlib

from sqlite_utils import Database, Migrations

from agent.errors import MessageRefused
from agent.fleet.database import gap_ledger, rollout_tables, timestamps
from agent.fleet.database.gap_ledger import NEW_LOG, LogChanges, parse_log_end
from agent.fleet.database.interface import to_sqlite_dialect
from agent.wire.messages import decode

migrations = Migrations("outstation-fleet")

_FIRST_TABLES = (
    # keys_version: grows with each change of `keys`, so that a running collector sees it for the price of one read.
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    "INSERT INTO meta VALUES ('keys_version', 0)",
    # state: of the last `state` message; NULL before the first.
    "CREATE TABLE devices (device TEXT PRIMARY KEY, enrolled TEXT NOT NULL, state TEXT, last_seen TEXT) WITHOUT ROWID",
    # revoked: when; NULL while the key may sign. A revoked key stays: stored messages verify with it.
    """CREATE TABLE keys (
        kid TEXT PRIMARY KEY, device TEXT NOT NULL, key TEXT NOT NULL, added TEXT NOT NULL, revoked TEXT
    ) WITHOUT ROWID""",
    "CREATE INDEX keys_of_device ON keys (device)",
    # With a rowid: rows of a kilobyte in an index b-tree would make every look-up read them.
    """CREATE TABLE messages (
        device TEXT NOT NULL, log TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, topic TEXT NOT NULL,
        payload BLOB NOT NULL, jws TEXT NOT NULL, received TEXT NOT NULL, PRIMARY KEY (device, log, seq))""",
    # through: the highest seq that came; what is missing below it is in `gaps`.
    """CREATE TABLE logs (
        device TEXT NOT NULL, log TEXT NOT NULL, through INTEGER NOT NULL, since TEXT NOT NULL,
        PRIMARY KEY (device, log))""",
    # declared: 1 where a signed audit message says that the device evicted these, so that they never come.
    """CREATE TABLE gaps (
        device TEXT NOT NULL, log TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
        declared INTEGER NOT NULL, PRIMARY KEY (device, log, first)) WITHOUT ROWID""",
    """CREATE TABLE results (
        device TEXT NOT NULL, task TEXT NOT NULL, row INTEGER NOT NULL, t INTEGER NOT NULL, label TEXT, score REAL,
        value REAL, log TEXT NOT NULL, seq INTEGER NOT NULL)""",
    "CREATE INDEX results_by_row ON results (device, task, row)",
    # window: its index; first and last: rows of the stream; features, output, estimate, reference: JSON.
    """CREATE TABLE drift_windows (
        device TEXT NOT NULL, task TEXT NOT NULL, "window" INTEGER NOT NULL, first INTEGER NOT NULL,
        last INTEGER NOT NULL, "from" TEXT NOT NULL, "to" TEXT NOT NULL, n INTEGER NOT NULL, state TEXT NOT NULL,
        model TEXT NOT NULL, version TEXT NOT NULL, reference TEXT NOT NULL, features TEXT NOT NULL,
        output TEXT NOT NULL, estimate TEXT, log TEXT NOT NULL, seq INTEGER NOT NULL,
        PRIMARY KEY (device, log, seq))""",
    # source: `device`, or `collector` for alerts of its own; seq is then that of the message it is about, or, for
    # refused messages, which have no log, the hour since 1970.
    """CREATE TABLE alerts (
        device TEXT NOT NULL, task TEXT, alert TEXT NOT NULL, subject TEXT NOT NULL, state TEXT NOT NULL,
        severity TEXT NOT NULL, summary TEXT NOT NULL, time TEXT NOT NULL, id TEXT NOT NULL, source TEXT NOT NULL,
        log TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (device, log, seq, source))""",
    # body: the payload, as text.
    """CREATE TABLE quality (
        device TEXT NOT NULL, task TEXT NOT NULL, time TEXT NOT NULL, body TEXT NOT NULL, log TEXT NOT NULL,
        seq INTEGER NOT NULL, PRIMARY KEY (device, log, seq))""",
    # device: '' where the name in the topic is not enrolled, so that strangers cannot grow the table.
    """CREATE TABLE refusals (
        device TEXT NOT NULL, reason TEXT NOT NULL, count INTEGER NOT NULL, first TEXT NOT NULL, last TEXT NOT NULL,
        PRIMARY KEY (device, reason)) WITHOUT ROWID""",
    # The first few of each kind of refusal, as they came.
    """CREATE TABLE refused (
        device TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL,
        jws TEXT NOT NULL, received TEXT NOT NULL)""",
)


@migrations()
def first_tables(db: Database) -> None:
    # One by one: sqlite3's executescript commits first, and would leave half of them after a crash.
    for statement in _FIRST_TABLES:
        db.execute(statement)


@migrations()
def dating_tables(db: Database) -> None:
    for statement in (*timestamps.TABLES, to_sqlite_dialect(timestamps.RESULTS_DATED_VIEW)):
        db.execute(statement)


_BOUNDED_KEYS = (
    # through: another key has followed this one, which counts up to this seq of `log` (of any, where that is NULL).
    "ALTER TABLE keys ADD COLUMN log TEXT",
    "ALTER TABLE keys ADD COLUMN through INTEGER",
)


@migrations()
def bounded_keys(db: Database) -> None:
    for statement in _BOUNDED_KEYS:
        db.execute(statement)


@migrations()
def joint_drift(db: Database) -> None:
    # JSON, or NULL from devices that do not look at how fields move together.
    db.execute("ALTER TABLE drift_windows ADD COLUMN joint TEXT")


_LABELS = (
    # One metric of a `quality` message, or (source `collector`, seq 0) of labels that came here; slice: '' for all.
    """CREATE TABLE metrics (
        device TEXT NOT NULL, task TEXT NOT NULL, time TEXT NOT NULL, metric TEXT NOT NULL, slice TEXT NOT NULL,
        value REAL, low REAL, high REAL, n INTEGER NOT NULL, state TEXT, source TEXT NOT NULL, log TEXT NOT NULL,
        seq INTEGER NOT NULL)""",
    "CREATE INDEX metrics_of_task ON metrics (device, task)",
    # Labels that came here; those that came to a device are in its messages, as metrics only.
    """CREATE TABLE labels (
        device TEXT NOT NULL, task TEXT NOT NULL, log TEXT NOT NULL, row INTEGER NOT NULL, label TEXT NOT NULL,
        source TEXT NOT NULL, received TEXT NOT NULL, PRIMARY KEY (device, task, log, row)) WITHOUT ROWID""",
)


@migrations()
def labels(db: Database) -> None:
    for statement in _LABELS:
        db.execute(statement)


@migrations()
def ends_of_logs(db: Database) -> None:
    # last: a later log says that it had messages up to this seq, and that what is missing of them never comes.
    columns = "device TEXT NOT NULL, log TEXT NOT NULL, last INTEGER NOT NULL, PRIMARY KEY (device, log)"
    db.execute(f"CREATE TABLE ends ({columns}) WITHOUT ROWID")
    told = "SELECT device, payload FROM messages WHERE kind = 'audit' AND instr(payload, ?)"
    for device, payload in db.execute(told, [f'"{NEW_LOG}"'.encode()]).fetchall():
        with contextlib.suppress(MessageRefused, TypeError, AttributeError):
            if end := parse_log_end(decode(payload)):
                gap_ledger.apply(db.conn, {(device, end[0]): LogChanges(end_seq=max(0, end[1]))}, "")


@migrations()
def drift_by_time(db: Database) -> None:
    # Rows of some kilobytes: who asks for times only should not read them.
    db.execute('CREATE INDEX drift_windows_by_time ON drift_windows (task, device, "to", "from", state)')


@migrations()
def rollouts(db: Database) -> None:
    for statement in rollout_tables.TABLES:
        db.execute(statement)
    rollout_tables.project_stored_messages(db.conn)


# Pragmas of every opening; the second is what must be read back, where safety hangs on it.
PRAGMAS: tuple[tuple[str, str | None], ...] = (
    ("journal_mode=WAL", "wal"),
    # NORMAL lost acknowledged rows in 28 of 50 simulated power cuts, FULL in none.
    ("synchronous=FULL", "2"),
    ("busy_timeout=5000", None),
    ("cache_size=-16000", None),
    # A long audit holds checkpoints back; what the log grew to meanwhile is given back.
    ("journal_size_limit=67108864", None),
    ("trusted_schema=OFF", None),
)

ADD_ALERT = "INSERT INTO alerts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"

ADD_REFUSAL = """
    INSERT INTO refusals VALUES (:device, :reason, 1, :now, :now)
    ON CONFLICT (device, reason) DO UPDATE SET count = refusals.count + 1, last = :now
"""

# An alert is open while the last word on its id is `raised`. Only the device's newest log counts: a store that was
# lost cannot clear what it raised. Of what the collector itself raised it clears fleet-wide drift, and what the
# repository wanted; all else stays open: somebody has to look.
ALERTS = """
    WITH newest AS (SELECT device, log FROM logs l WHERE rowid = (SELECT max(rowid) FROM logs WHERE device = l.device)),
    last AS (SELECT device, id, max(seq) AS seq FROM alerts JOIN newest USING (device, log)
             WHERE source = 'device' GROUP BY device, id)
    SELECT a.device, a.task, a.alert, a.subject, a.state, a.severity, a.summary, a.time, a.id, a.log, a.seq,
           a.state = 'raised' AND CASE a.source
               WHEN 'collector' THEN NOT EXISTS (
                   SELECT 1 FROM alerts c WHERE c.device = a.device AND c.log = a.log AND c.seq > a.seq
                   AND c.source = 'collector' AND c.id = a.id AND c.state = 'cleared')
               ELSE l.seq IS NOT NULL END AS open
    FROM alerts a
    LEFT JOIN newest n ON n.device = a.device AND n.log = a.log
    LEFT JOIN last l ON l.device = n.device AND l.id = a.id AND l.seq = a.seq AND a.source = 'device'
"""

# Since when, until when and in how many windows each device was tested.
OBSERVED_PERIODS = """
    SELECT task, device, min("from"), max("to"), count(*) FROM drift_windows
    WHERE state IN ('ok', 'drift') AND "to" BETWEEN ? AND ? GROUP BY task, device
"""

# The last alert of each device and field, whether it is open, and how many there were since a moment.
DRIFT_ALERTS = f"""
    SELECT task, device, subject, time, open, n FROM (
        SELECT task, device, subject, time, open,
               sum(CASE WHEN time >= ? THEN 1 ELSE 0 END) OVER (PARTITION BY task, device, subject) AS n,
               row_number() OVER (PARTITION BY task, device, subject ORDER BY time DESC, seq DESC) AS nth
        FROM ({ALERTS}) raised
        WHERE alert = 'drift' AND state = 'raised' AND device <> '' AND task IS NOT NULL AND time <= ?) counted
    WHERE nth = 1 ORDER BY task, device, subject
"""

OPEN_FLEET_WIDE_ALERTS = f"""
    SELECT task, subject, seq FROM ({ALERTS}) wide WHERE alert = 'drift' AND device = '' AND open
"""

# In the order of their time; what says the same window lies beside each other, whichever log it came in and whatever
# reference of its site it was judged by.
DRIFT_WINDOW_COLUMNS = (
    *("device", "task", "first", "last", "from", "to", "state", "reference", "features", "output", "joint"),
    "estimate",
)
DRIFT_WINDOWS = """
    SELECT device, task, first, last, "from", "to", state, reference, features, output, joint, estimate
    FROM drift_windows
    WHERE (CAST(:task AS TEXT) IS NULL OR task = :task) AND (CAST(:device AS TEXT) IS NULL OR device = :device)
      AND (CAST(:since AS TEXT) IS NULL OR "to" >= :since)
    ORDER BY task, device, "from", first, last, "to", log, seq
"""

DEVICES = f"""
    SELECT d.device, k.key, d.state, d.last_seen,
           (SELECT through FROM logs l WHERE l.device = d.device ORDER BY rowid DESC LIMIT 1) AS through,
           coalesce(o.n, 0) AS alerts,
           (SELECT quality FROM anchors a WHERE a.device = d.device AND a.log = (
               SELECT log FROM logs l WHERE l.device = d.device ORDER BY rowid DESC LIMIT 1)
            ORDER BY a.seq DESC LIMIT 1) AS clock
    FROM devices d
    LEFT JOIN keys k ON k.device = d.device AND k.revoked IS NULL AND k.through IS NULL
    LEFT JOIN (SELECT device, count(*) AS n FROM ({ALERTS}) said WHERE open GROUP BY device) o ON o.device = d.device
    ORDER BY d.device
"""

PROGRESS = """
    SELECT d.device,
           coalesce((SELECT max(row) FROM results r WHERE r.device = d.device), 0) AS rows,
           (SELECT count(*) FROM drift_windows w WHERE w.device = d.device) AS windows,
           (SELECT count(*) FROM results r WHERE r.device = d.device) AS results,
           (SELECT count(*) FROM messages m WHERE m.device = d.device) AS messages,
           (SELECT state FROM drift_windows w WHERE w.device = d.device ORDER BY log, seq DESC LIMIT 1) AS drift
    FROM devices d ORDER BY d.device
"""
