"""Tables and migrations of the fleet database, in SQL that SQLite runs and `postgresql_schema` translates.

`messages` is the evidence: every message exactly as it arrived. `results`, `result_details`, `result_messages`,
`result_provenance`, `drift_windows`, `quality_messages`, `metrics`, `alerts`, `incidents`, `shadows`,
`learned_references`, `rollout_devices`, `samples` and the tables of clocks are projections of the same messages, and
`fleet db rebuild` corrects them from it. Times are RFC 3339 text; `t` and names ending in `_us` are microseconds.
"""

from __future__ import annotations

import msgspec

from outstation.fleet.database.timestamps import RESULTS_DATED_VIEW
from outstation.integrations.notify.queue import TABLES as NOTIFY_TABLES

# PostgreSQL numbers the rows of a table only if a column does so; SQLite always has `rowid`.
ROWID = "/* rowid */"

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
    # last_seq: the highest that arrived; `gaps` has the ranges that are missing below it. since, latest: when the first
    # and the last new message arrived. live: no other log took its place. The newest log of a device is its first live
    # one.
    f"""CREATE TABLE logs (
        device TEXT NOT NULL, log TEXT NOT NULL, last_seq INTEGER NOT NULL, since TEXT NOT NULL, latest TEXT NOT NULL,
        live BOOLEAN NOT NULL{ROWID}, PRIMARY KEY (device, log))""",
    # `successor` (or with '' the next log) takes the place of `log`, which ended at last_seq, unless a new message
    # arrives in it after `until`. source: `device` if it says so, `operator` for `fleet log accept` and a new key.
    """CREATE TABLE log_successors (
        device TEXT NOT NULL, log TEXT NOT NULL, successor TEXT NOT NULL, last_seq INTEGER NOT NULL,
        until TEXT NOT NULL, source TEXT NOT NULL, PRIMARY KEY (device, log, successor, source)) WITHOUT ROWID""",
    # last_seq: a later log of the device states that this log ended there; gaps up to it are declared.
    """CREATE TABLE log_ends (
        device TEXT NOT NULL, log TEXT NOT NULL, last_seq INTEGER NOT NULL, PRIMARY KEY (device, log)) WITHOUT ROWID""",
    # declared: a signed audit message states that these were evicted, so they never arrive.
    """CREATE TABLE gaps (
        device TEXT NOT NULL, log TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
        declared BOOLEAN NOT NULL, PRIMARY KEY (device, log, first)) WITHOUT ROWID""",
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

_PROJECTIONS = (
    """CREATE TABLE results (
        device TEXT NOT NULL, task TEXT NOT NULL, row INTEGER NOT NULL, t INTEGER NOT NULL, label TEXT, score REAL,
        value REAL, log TEXT NOT NULL, seq INTEGER NOT NULL)""",
    "CREATE INDEX results_by_row ON results (device, task, row)",
    # What few results have. missing: share of the input that was missing beyond the bundle's limit, else 0 or NULL.
    # outputs: JSON object of the columns value_NAME, score_LABEL and label_NAME, NULL without them.
    """CREATE TABLE result_details (
        device TEXT NOT NULL, log TEXT NOT NULL, seq INTEGER NOT NULL, row INTEGER NOT NULL, missing REAL, outputs TEXT,
        PRIMARY KEY (device, log, seq, row)) WITHOUT ROWID""",
    # A results message, also one that lists none of its n results. incomplete: how many of them missed too much input.
    # faults: JSON array of the fields with a sensor fault meanwhile, NULL without one.
    """CREATE TABLE result_messages (
        device TEXT NOT NULL, log TEXT NOT NULL, seq INTEGER NOT NULL, rows_first INTEGER NOT NULL,
        rows_last INTEGER NOT NULL, n INTEGER NOT NULL, incomplete INTEGER NOT NULL, faults TEXT,
        provenance TEXT NOT NULL,
        PRIMARY KEY (device, log, seq)) WITHOUT ROWID""",
    # Bundle (model, version, digest) and maker (agent, runtime, config) of results, once for all messages that share
    # them; provenance: digest of the columns after it.
    """CREATE TABLE result_provenance (
        device TEXT NOT NULL, provenance TEXT NOT NULL, task TEXT NOT NULL, stream TEXT NOT NULL, model TEXT NOT NULL,
        version TEXT NOT NULL, digest TEXT NOT NULL, agent TEXT, runtime TEXT, config TEXT,
        PRIMARY KEY (device, provenance)) WITHOUT ROWID""",
    # A drift window, or a run of quiet ones. window: index of the first; window_count: how many; first and last: rows
    # of the stream; reference, features, output, joint, estimate, windows: JSON; windows: columns of a run, or NULL.
    """CREATE TABLE drift_windows (
        device TEXT NOT NULL, task TEXT NOT NULL, "window" INTEGER NOT NULL, window_count INTEGER NOT NULL,
        first INTEGER NOT NULL,
        last INTEGER NOT NULL, "from" TEXT NOT NULL, "to" TEXT NOT NULL, n INTEGER NOT NULL, state TEXT NOT NULL,
        model TEXT NOT NULL, version TEXT NOT NULL, reference TEXT NOT NULL, features TEXT NOT NULL,
        output TEXT NOT NULL, joint TEXT, estimate TEXT, windows TEXT, log TEXT NOT NULL, seq INTEGER NOT NULL,
        PRIMARY KEY (device, log, seq))""",
    # source: `device`, or `collector` for its own alerts; `seq` is then that of the message concerned, or a time.
    f"""CREATE TABLE alerts (
        device TEXT NOT NULL, task TEXT, alert TEXT NOT NULL, subject TEXT NOT NULL, state TEXT NOT NULL,
        severity TEXT NOT NULL, summary TEXT NOT NULL, time TEXT NOT NULL, id TEXT NOT NULL, source TEXT NOT NULL,
        log TEXT NOT NULL, seq INTEGER NOT NULL, revision INTEGER NOT NULL{ROWID},
        PRIMARY KEY (device, log, seq, source))""",
    # Notifications read the alerts that are new to them, in order of rowid.
    f"CREATE INDEX alerts_by_arrival ON alerts (source{ROWID})",
    # All messages of table alerts with one key, whatever their order of arrival. ref: names it in commands. seq, state,
    # updated, last_summary: of the newest message. task to revision: of the newest that raised it, raised: time of the
    # newest that began it; raised_seq, began_seq: of these, or minus the seq of the oldest message where none did so.
    """CREATE TABLE incidents (
        device TEXT NOT NULL, log TEXT NOT NULL, id TEXT NOT NULL, source TEXT NOT NULL, ref TEXT NOT NULL,
        seq INTEGER NOT NULL, state TEXT NOT NULL, updated TEXT NOT NULL, last_summary TEXT NOT NULL,
        raised_seq INTEGER NOT NULL, task TEXT, alert TEXT NOT NULL, subject TEXT NOT NULL, severity TEXT NOT NULL,
        summary TEXT NOT NULL, revision INTEGER NOT NULL, began_seq INTEGER NOT NULL, raised TEXT NOT NULL,
        PRIMARY KEY (device, log, id, source)) WITHOUT ROWID""",
    # Few incidents are raised.
    "CREATE INDEX incidents_raised ON incidents (raised, device, log, id, source) WHERE state = 'raised'",
    "CREATE INDEX incidents_by_time ON incidents (raised, device, log, id, source, task, alert)",
    "CREATE INDEX incidents_by_ref ON incidents (ref)",
    # With all that the collector counts every few minutes.
    """CREATE INDEX incidents_drift ON incidents (task, device, subject, raised, state, log, raised_seq)
        WHERE alert = 'drift' AND source = 'device'""",
    # body: the payload, as text.
    """CREATE TABLE quality_messages (
        device TEXT NOT NULL, task TEXT NOT NULL, time TEXT NOT NULL, body TEXT NOT NULL, log TEXT NOT NULL,
        seq INTEGER NOT NULL, PRIMARY KEY (device, log, seq))""",
    # One metric of a quality message, or with seq 0 of labels at the collector: source `collector` of table labels,
    # `verdicts` of table verdicts. slice: '' for all.
    """CREATE TABLE metrics (
        device TEXT NOT NULL, task TEXT NOT NULL, time TEXT NOT NULL, metric TEXT NOT NULL, slice TEXT NOT NULL,
        value REAL, low REAL, high REAL, n INTEGER NOT NULL, state TEXT, source TEXT NOT NULL, log TEXT NOT NULL,
        seq INTEGER NOT NULL)""",
    "CREATE INDEX metrics_by_task ON metrics (device, task)",
    # model, other: digests of the active bundle, whose results count, and of the shadow; body: the payload, as text.
    f"""CREATE TABLE shadows (
        device TEXT NOT NULL, task TEXT NOT NULL, rollout TEXT NOT NULL, model TEXT NOT NULL, other TEXT NOT NULL,
        time TEXT NOT NULL, rows_first INTEGER NOT NULL, rows_last INTEGER NOT NULL, batches INTEGER NOT NULL,
        n INTEGER NOT NULL, errors INTEGER NOT NULL, body TEXT NOT NULL, log TEXT NOT NULL,
        seq INTEGER NOT NULL{ROWID}, PRIMARY KEY (device, log, seq))""",
    # A rollout reads the shadows that are new to it, in order of rowid.
    f"CREATE INDEX shadows_by_rollout ON shadows (rollout{ROWID})",
    # A reference that a device learned (event `learned`), with rows, mean and sd of each field as JSON, or accepted.
    """CREATE TABLE learned_references (
        device TEXT NOT NULL, task TEXT NOT NULL, event TEXT NOT NULL, site TEXT NOT NULL, fields TEXT NOT NULL,
        time TEXT NOT NULL, log TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (device, log, seq))""",
    # One phase change that a device reported in an audit message; numbers: JSON.
    """CREATE TABLE rollout_devices (
        device TEXT NOT NULL, task TEXT NOT NULL, rollout TEXT NOT NULL, digest TEXT NOT NULL, strategy TEXT NOT NULL,
        phase TEXT NOT NULL, reason TEXT NOT NULL, summary TEXT NOT NULL, numbers TEXT NOT NULL, time TEXT NOT NULL,
        log TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (device, log, seq))""",
    # Readings around the result at `row`, as the device sealed them: no collector stores them in the clear. reason:
    # alert, uncertain or requested; subject: id of the alert, or ''; sealed: empty where withheld.
    """CREATE TABLE samples (
        device TEXT NOT NULL, task TEXT NOT NULL, stream TEXT NOT NULL, reason TEXT NOT NULL, subject TEXT NOT NULL,
        row INTEGER NOT NULL, rows_first INTEGER NOT NULL, rows_last INTEGER NOT NULL, digits INTEGER NOT NULL,
        model TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL, time TEXT NOT NULL, sealed BLOB NOT NULL,
        log TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (device, log, seq))""",
    "CREATE INDEX rollout_devices_by_rollout ON rollout_devices (rollout, device)",
)

_CLOCKS = (
    # trusted: a time service synchronised wall_us, which is not ahead of the collector's clock.
    """CREATE TABLE anchors (
        device TEXT NOT NULL, log TEXT NOT NULL, seq INTEGER NOT NULL, boot INTEGER NOT NULL, segment INTEGER NOT NULL,
        boot_us INTEGER NOT NULL, wall_us INTEGER NOT NULL, quality TEXT NOT NULL, error_us INTEGER,
        step_us INTEGER NOT NULL, trusted BOOLEAN NOT NULL, PRIMARY KEY (device, log, seq)) WITHOUT ROWID""",
    "CREATE INDEX anchors_trusted ON anchors (device, log, boot, boot_us) WHERE trusted",
    # offset_us: wall clock minus boot time, at its first anchor, `seq`. synced: 1 if one of its anchors is trusted, 0
    # if a time service synchronised it but no anchor is trusted, NULL if it was never synchronised.
    """CREATE TABLE segments (
        device TEXT NOT NULL, log TEXT NOT NULL, boot INTEGER NOT NULL, segment INTEGER NOT NULL, seq INTEGER NOT NULL,
        offset_us INTEGER NOT NULL, synced INTEGER, PRIMARY KEY (device, log, boot, segment)) WITHOUT ROWID""",
    # last_us: the latest known boot time. disagreement_us: by how much its trusted anchors contradict each other.
    # start_us, start_error_us: wall clock at boot time 0, for a boot without a trusted anchor between two with one.
    """CREATE TABLE boots (
        device TEXT NOT NULL, log TEXT NOT NULL, boot INTEGER NOT NULL, last_us INTEGER NOT NULL,
        trusted BOOLEAN NOT NULL DEFAULT FALSE, disagreement_us INTEGER NOT NULL DEFAULT 0, start_us INTEGER,
        start_error_us INTEGER, PRIMARY KEY (device, log, boot)) WITHOUT ROWID""",
    "CREATE INDEX boots_trusted ON boots (device, log, boot) WHERE trusted",
    # Clock of the results from row `first` of a message on. segment: 0 for the producer's own time; where `implied`,
    # that of the last anchor before the message, NULL until it arrives. quality: 0 synced, 1 restored, 2 unsynced.
    """CREATE TABLE stamps (
        device TEXT NOT NULL, log TEXT NOT NULL, seq INTEGER NOT NULL, first INTEGER NOT NULL, boot INTEGER NOT NULL,
        segment INTEGER, quality INTEGER NOT NULL, implied BOOLEAN NOT NULL,
        PRIMARY KEY (device, log, seq, first)) WITHOUT ROWID""",
    RESULTS_DATED_VIEW,
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


MIGRATIONS = (
    Migration("create_tables", (*_COLLECTION, *_PROJECTIONS, *_CLOCKS, *_OPERATORS, *_DASHBOARD, *NOTIFY_TABLES)),
    # Rows have some kilobytes: a query for times alone must not read them.
    Migration(
        "index_drift_windows_by_time",
        ('CREATE INDEX drift_windows_by_time ON drift_windows (task, device, "to", "from", state, window_count)',),
    ),
    # output: name of a further output of the model; '' for the first one.
    Migration("name_output_of_metrics", ("ALTER TABLE metrics ADD COLUMN output TEXT NOT NULL DEFAULT ''",)),
    # The dashboard shows the newest metrics of each output: no query for them must read all rows.
    Migration(
        "index_metrics_by_output",
        (
            "CREATE INDEX metrics_by_output ON metrics (device, log, task, output, seq) "
            "WHERE source = 'device' AND slice = ''",
        ),
    ),
    # SQLite adds no column to a key. output: the further output that a label is about, '' for the first one.
    Migration(
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
)
