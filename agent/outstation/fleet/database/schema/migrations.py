"""Migrations of the fleet database, in SQL that SQLite runs and `translation` translates for PostgreSQL.

`messages` is the evidence: every message exactly as it arrived. The tables of `message_tables` follow from the same
messages, and `fleet db rebuild` corrects them from it. Times are RFC 3339 text; names ending in `_us` are microseconds.
"""

from __future__ import annotations

import msgspec

from outstation.fleet.database.schema.message_tables import RESULTS, ROWID, TABLES
from outstation.fleet.database.schema.results_dated import create_view
from outstation.integrations.notify.queue import TABLES as NOTIFY_TABLES

_COLLECTION = (
    # keys_version: grows with each change of `keys`, so that one read tells a running collector of it.
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    "INSERT INTO meta VALUES ('keys_version', 0)",
    # state: of the last `state` message; NULL before the first.
    "CREATE TABLE devices (device TEXT PRIMARY KEY, enrolled TEXT NOT NULL, state TEXT, last_seen TEXT) WITHOUT ROWID",
    # revoked: when; NULL while the key may sign. A revoked key stays: stored messages verify with it.
    # last_seq: another key replaced this one, which is valid up to this seq of `log` (of any log, where that is NULL).
    # made_by: `device` or `operator`, who can have kept a copy of the private half.
    """CREATE TABLE keys (
        kid TEXT PRIMARY KEY, device TEXT NOT NULL, key TEXT NOT NULL, added TEXT NOT NULL, revoked TEXT, log TEXT,
        last_seq INTEGER, made_by TEXT NOT NULL DEFAULT 'device') WITHOUT ROWID""",
    "CREATE INDEX keys_by_device ON keys (device)",
    # With a rowid: rows of a kilobyte in an index b-tree would make every look-up read them. The index finds the newest
    # health message of each log.
    """CREATE TABLE messages (
        device TEXT NOT NULL, log TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, topic TEXT NOT NULL,
        payload BLOB NOT NULL, jws TEXT NOT NULL, received TEXT NOT NULL, PRIMARY KEY (device, log, seq))""",
    "CREATE INDEX health_messages ON messages (device, log, seq) WHERE kind = 'health'",
    # The n-th statement about what `fleet db prune` removed of a device, signed with a collector's key. state: JSON,
    # from which an audit continues; NULL but for the newest one.
    """CREATE TABLE retention (
        device TEXT NOT NULL, n INTEGER NOT NULL, time TEXT NOT NULL, payload BLOB NOT NULL, jws TEXT NOT NULL,
        state BLOB, PRIMARY KEY (device, n))""",
    # Messages up to `through` were pruned: one that arrives again is a duplicate.
    """CREATE TABLE pruned_logs (
        device TEXT NOT NULL, log TEXT NOT NULL, through INTEGER NOT NULL, PRIMARY KEY (device, log)) WITHOUT ROWID""",
    # device: '' where the name in the topic is not enrolled, so that strangers cannot grow the table.
    """CREATE TABLE refusals (
        device TEXT NOT NULL, reason TEXT NOT NULL, count INTEGER NOT NULL, first TEXT NOT NULL, last TEXT NOT NULL,
        PRIMARY KEY (device, reason)) WITHOUT ROWID""",
    # The first few refused messages of each device and reason, as they arrived.
    """CREATE TABLE refusal_samples (
        device TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL,
        jws TEXT NOT NULL, received TEXT NOT NULL)""",
)

_INDEXES = (
    "CREATE INDEX results_by_row ON results (device, task, row)",
    # Notifications read the alerts that are new to them, in order of rowid.
    f"CREATE INDEX alerts_by_arrival ON alerts (source{ROWID})",
    # Few incidents are raised.
    "CREATE INDEX incidents_raised ON incidents (raised, device, log, id, source) WHERE state = 'raised'",
    "CREATE INDEX incidents_by_time ON incidents (raised, device, log, id, source, task, alert)",
    "CREATE INDEX incidents_by_ref ON incidents (ref)",
    # With all that the collector counts every few minutes.
    """CREATE INDEX incidents_drift ON incidents (task, device, subject, raised, state, log, raised_seq)
        WHERE alert = 'drift' AND source = 'device'""",
    "CREATE INDEX metrics_by_task ON metrics (device, task)",
    # A rollout reads the shadows that are new to it, in order of rowid.
    f"CREATE INDEX shadows_by_rollout ON shadows (rollout{ROWID})",
    "CREATE INDEX rollout_devices_by_rollout ON rollout_devices (rollout, device)",
    "CREATE INDEX anchors_trusted ON anchors (device, log, boot, boot_us) WHERE trusted",
    "CREATE INDEX boots_trusted ON boots (device, log, boot) WHERE trusted",
)

_OPERATORS = (
    # Ground truth from `fleet labels add`; labels sent to a device are in its messages, as metrics only. source: human,
    # system or model; given_by: who stored it.
    """CREATE TABLE labels (
        device TEXT NOT NULL, task TEXT NOT NULL, log TEXT NOT NULL, row INTEGER NOT NULL, label TEXT NOT NULL,
        source TEXT NOT NULL, received TEXT NOT NULL, given_by TEXT NOT NULL, PRIMARY KEY (device, task, log, row)
    ) WITHOUT ROWID""",
    # Verdict of a person who saw a result; the last one of each person counts. verdict: confirmed or corrected;
    # label: what was true; predicted: the label or the value of the result then. alert: the ID of the alert that it was
    # given about, NULL without one. via: dashboard, cli or homeassistant.
    """CREATE TABLE verdicts (
        device TEXT NOT NULL, task TEXT NOT NULL, log TEXT NOT NULL, row INTEGER NOT NULL, given_by TEXT NOT NULL,
        verdict TEXT NOT NULL, label TEXT NOT NULL, predicted TEXT NOT NULL, alert TEXT, via TEXT NOT NULL,
        note TEXT NOT NULL, given TEXT NOT NULL, PRIMARY KEY (device, task, log, row, given_by)) WITHOUT ROWID""",
    # The label of each result whose verdicts agree; the label of others is unknown.
    """CREATE VIEW agreed_verdicts AS
        SELECT device, task, log, row, min(label) AS label, min(predicted) AS predicted, count(*) AS people,
               max(given) AS given
        FROM verdicts GROUP BY device, task, log, row HAVING min(label) = max(label)""",
    # Verdicts of people on an alert, by the key of its messages in table alerts. verdict: confirmed or false_alarm.
    """CREATE TABLE alert_verdicts (
        source TEXT NOT NULL, device TEXT NOT NULL, log TEXT NOT NULL, id TEXT NOT NULL, given_by TEXT NOT NULL,
        verdict TEXT NOT NULL, via TEXT NOT NULL, note TEXT NOT NULL, given TEXT NOT NULL,
        PRIMARY KEY (source, device, log, id, given_by)) WITHOUT ROWID""",
    # state: running, paused, aborted or finished; step counts from 1; plan: JSON, as it was started.
    """CREATE TABLE rollouts (
        rollout TEXT PRIMARY KEY, task TEXT NOT NULL, bundle TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
        topic TEXT NOT NULL, started TEXT NOT NULL, state TEXT NOT NULL, step INTEGER NOT NULL, plan TEXT NOT NULL
    ) WITHOUT ROWID""",
    # The n-th decision of a rollout. payload: signed with the operator's key; the other columns are a copy of it.
    """CREATE TABLE decisions (
        rollout TEXT NOT NULL, n INTEGER NOT NULL, time TEXT NOT NULL, event TEXT NOT NULL, summary TEXT NOT NULL,
        evidence TEXT NOT NULL, payload BLOB NOT NULL, jws TEXT NOT NULL, PRIMARY KEY (rollout, n))""",
    # What operators say about an alert, by the key of its messages in table alerts. acknowledged_seq: of its newest
    # message at that time; a later one ends the acknowledgement, not the mute.
    """CREATE TABLE alert_handling (
        source TEXT NOT NULL, device TEXT NOT NULL, log TEXT NOT NULL, id TEXT NOT NULL, acknowledged_seq INTEGER,
        acknowledged_by TEXT, acknowledged_at TEXT, acknowledged_note TEXT, muted_until TEXT, muted_by TEXT,
        muted_at TEXT, muted_note TEXT, PRIMARY KEY (source, device, log, id)) WITHOUT ROWID""",
    # Devices that an operator removed: they are listed no longer. What is stored of them stays.
    """CREATE TABLE retired_devices (
        device TEXT PRIMARY KEY, retired TEXT NOT NULL, retired_by TEXT NOT NULL) WITHOUT ROWID""",
    # The desired state of each topic, as it is published.
    """CREATE TABLE desired (
        topic TEXT PRIMARY KEY, counter INTEGER NOT NULL, payload BLOB NOT NULL, jws TEXT NOT NULL) WITHOUT ROWID""",
)

_DASHBOARD = (
    # password: parameters, salt and scrypt hash; NULL for an account that only a proxy may sign in.
    """CREATE TABLE dashboard_users (
        name TEXT PRIMARY KEY, role TEXT NOT NULL, password TEXT, created TEXT NOT NULL, changed TEXT NOT NULL
    ) WITHOUT ROWID""",
    # session: SHA-256 of the secret in the cookie; revoked: when, NULL while it is valid.
    """CREATE TABLE dashboard_sessions (
        session TEXT PRIMARY KEY, name TEXT NOT NULL, created TEXT NOT NULL, expires TEXT NOT NULL,
        address TEXT NOT NULL, revoked TEXT) WITHOUT ROWID""",
    "CREATE INDEX dashboard_sessions_by_name ON dashboard_sessions (name)",
    # Who did what: sign-ins, refused ones too, and every action. object: what it concerned.
    f"""CREATE TABLE dashboard_actions (
        time TEXT NOT NULL, name TEXT NOT NULL, role TEXT NOT NULL, action TEXT NOT NULL, object TEXT NOT NULL,
        outcome TEXT NOT NULL, address TEXT NOT NULL{ROWID})""",
    "CREATE INDEX dashboard_actions_by_time ON dashboard_actions (time)",
    "CREATE INDEX dashboard_actions_by_name ON dashboard_actions (name, time)",
)


class Migration(msgspec.Struct, frozen=True):
    """A step of the schema. From the release of 0.1.0 on none changes, and each change of the tables is a new step."""

    name: str
    statements: tuple[str, ...]


_TABLES = tuple(table.create() for table in TABLES.values())
_CREATE_TABLES = (*(*_COLLECTION, *_TABLES, *_INDEXES, create_view(1), *_OPERATORS, *_DASHBOARD, *NOTIFY_TABLES),)
# Number of a migration → its name and statements, besides those that add the columns of tables.
_MIGRATIONS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("create_tables", _CREATE_TABLES),
    # Rows have some kilobytes: a query for times alone must not read them.
    2: (
        "index_drift_windows_by_time",
        ('CREATE INDEX drift_windows_by_time ON drift_windows (task, device, "to", "from", state, window_count)',),
    ),
    3: ("name_output_of_metrics", ()),
    # The dashboard shows the newest metrics of each output: no query for them must read all rows.
    4: (
        "index_metrics_by_output",
        (
            "CREATE INDEX metrics_by_output ON metrics (device, log, task, output, seq) "
            "WHERE source = 'device' AND slice = ''",
        ),
    ),
    # SQLite adds no column to a key. output: the further output that a label is about, '' for the first one.
    5: (
        "name_output_of_labels",
        (
            "ALTER TABLE labels RENAME TO labels_without_output",
            """CREATE TABLE labels (
                device TEXT NOT NULL, task TEXT NOT NULL, log TEXT NOT NULL, row INTEGER NOT NULL, label TEXT NOT NULL,
                source TEXT NOT NULL, received TEXT NOT NULL, given_by TEXT NOT NULL, output TEXT NOT NULL,
                PRIMARY KEY (device, task, log, row, output)) WITHOUT ROWID""",
            """INSERT INTO labels (device, task, log, row, label, source, received, given_by, output)
                SELECT device, task, log, row, label, source, received, given_by, '' FROM labels_without_output""",
            "DROP TABLE labels_without_output",
        ),
    ),
}
# A view has the columns that its tables had when it was created.
_DROP_VIEW = "DROP VIEW results_dated"


def _build_migrations() -> tuple[Migration, ...]:
    added = max(column.added for table in TABLES.values() for column in table.columns)
    migrations = [Migration(*_MIGRATIONS[1])]
    for number in range(2, max(added, *_MIGRATIONS) + 1):
        name, statements = _MIGRATIONS.get(number, (f"add_columns_{number}", ()))
        columns = [sql for table in TABLES.values() for sql in table.add_columns(number)]
        if RESULTS.add_columns(number):
            columns = [_DROP_VIEW, *columns, create_view(number)]
        migrations.append(Migration(name, (*columns, *statements)))
    return tuple(migrations)


MIGRATIONS = _build_migrations()
