"""Fleet database in PostgreSQL: the same tables as in SQLite, with several concurrent writers."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from outstation.fleet.audit.audit import audit
from outstation.fleet.cli.group import fleet as commands
from outstation.fleet.collector import collector as collecting
from outstation.fleet.collector.acknowledger import WAIT_S, PendingGaps
from outstation.fleet.collector.collector import Collector
from outstation.fleet.collector.subscriptions import topic_filters
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.interface import display_name
from outstation.fleet.database.postgresql_rows import to_psycopg
from outstation.fleet.database.schema.migrations import MIGRATIONS
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import MessageRefused, StorageError, UsageError
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.wire import topics
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage, new_key
from outstation.workbench.testing.patience import wait_until
from tests.fleet.test_collector import Wire
from tests.kit import fleet_rollouts
from tests.kit.evidences import build_story
from tests.kit.fleet_databases import copy_database

NOW = "2026-11-24T22:20:00.000000Z"


@pytest.fixture
def store(postgres_url: str) -> Iterator[FleetStore]:
    with FleetStore(postgres_url) as opened:
        yield opened


def enrolled(store: FleetStore, device: str = "pi-07") -> MessageSender:
    sender = MessageSender(device)
    store.enrol(device, sender.key.public, replace=False, now=NOW)
    return sender


def add(store: FleetStore, sender: MessageSender, *sent: SignedMessage) -> list[str]:
    return list(store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW))


def ask(store: FleetStore, sql: str, *values: Any) -> list[Any]:
    with store.snapshot() as db:
        return db.execute(sql, values).fetchall()


def at_once(*actions: Callable[[], object]) -> list[BaseException]:
    """Run each action in a thread, and return the exceptions raised."""
    raised: list[BaseException] = []
    together = threading.Barrier(len(actions))

    def do(action: Callable[[], object]) -> None:
        together.wait(60)
        try:
            action()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=do, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return raised


# --- tables ---


def test_tables_and_columns_are_those_of_sqlite(store: FleetStore, tmp_path: Path) -> None:
    file = FleetStore(tmp_path / "fleet.db")
    made = ask(
        file, "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name NOT LIKE '\\_%' ESCAPE '\\'"
    )
    names = [name for (name,) in made]
    columns = {name: [row[1] for row in ask(file, f'PRAGMA table_info("{name}")')] for name in names}
    file.close()
    sql = """
        SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = current_schema()
        ORDER BY table_name, ordinal_position"""
    result: dict[str, list[str]] = {}
    for table, column in ask(store, sql):
        result.setdefault(table, []).append(column)
    # In SQLite `rowid` is implicit, and `migrations` is called `_sqlite_migrations`.
    assert result.pop("migrations") == ["number", "applied"]
    assert {name: [item for item in listed if item != "rowid"] for name, listed in result.items()} == columns


def test_processes_that_start_at_once_make_the_tables_once(postgres_url: str) -> None:
    opened: list[FleetStore] = []
    assert at_once(*[lambda: opened.append(FleetStore(postgres_url))] * 6) == []
    assert ask(opened[0], "SELECT count(*) FROM migrations") == [(len(MIGRATIONS),)]
    for item in opened:
        item.close()


def test_a_database_of_an_older_version_is_migrated_and_not_read_before(postgres_url: str) -> None:
    store = FleetStore(postgres_url)
    with store.transaction() as db:
        # The index of a migration goes with its column.
        db.execute("ALTER TABLE metrics DROP COLUMN output")
        db.execute("ALTER TABLE labels DROP COLUMN output")
        db.execute("ALTER TABLE labels ADD PRIMARY KEY (device, task, log, row)")
        db.execute("INSERT INTO labels VALUES ('d', 'exercise', 'log', 7, 'PEN', 'human', '2026', 'eva')")
        db.execute("DELETE FROM migrations WHERE number >= ?", (3,))
    store.close()
    with pytest.raises(UsageError, match="created by an older version"):
        FleetStore(postgres_url, read_only=True)
    FleetStore(postgres_url).close()
    reading = FleetStore(postgres_url, read_only=True)
    assert ask(reading, "SELECT count(output) FROM metrics") == [(0,)]
    assert ask(reading, "SELECT * FROM labels") == [("d", "exercise", "log", 7, "PEN", "human", "2026", "eva", "")]
    reading.close()


def test_a_newer_database_is_refused_and_reading_creates_no_tables(
    postgres_url: str,
) -> None:
    with pytest.raises(UsageError, match="no tables here yet"):
        FleetStore(postgres_url, read_only=True)
    store = FleetStore(postgres_url)
    with store.transaction() as db:
        db.execute("INSERT INTO migrations (number) VALUES (1000)")
    store.close()
    for read_only in (False, True):
        with pytest.raises(UsageError, match="created by a newer version"):
            FleetStore(postgres_url, read_only=read_only)


def test_a_store_that_reads_cannot_write(store: FleetStore, postgres_url: str) -> None:
    reading = FleetStore(postgres_url, read_only=True)
    with pytest.raises(StorageError, match="read-only"):
        enrolled(reading)
    reading.close()


def test_messages_and_results_have_the_requested_partitions(postgres_url: str) -> None:
    store = FleetStore(postgres_url, partitions=4)
    for n in range(40):
        sender = enrolled(store, f"pi-{n:02}")
        add(store, sender, sender.results(), sender.health_with_cursor())
    per_table = "SELECT count(DISTINCT tableoid) FROM"
    assert [ask(store, f"{per_table} {table}") for table in ("messages", "results")] == [[(4,)], [(4,)]]
    assert audit(store).passed
    assert (store.count_messages(), len(store.devices())) == (80, 40)
    store.close()


def test_placeholders_are_those_of_psycopg_and_quoted_text_stays() -> None:
    sql = """SELECT '?', ':x', "to", a::text, '5 %' FROM t WHERE a = ? AND b LIKE :name AND c % 2 = 0"""
    assert to_psycopg(sql) == (
        """SELECT '?', ':x', "to", a::text, '5 %%' FROM t WHERE a = %s AND b LIKE %(name)s AND c %% 2 = 0"""
    )


def test_no_message_shows_the_password() -> None:
    url = "postgresql://me:secret@127.0.0.1:1/fleet?connect_timeout=1&password=secret"
    assert display_name(url) == "postgresql://me@127.0.0.1:1/fleet?connect_timeout=1"
    with pytest.raises(StorageError, match="me@127") as raised:
        FleetStore(url)
    assert "secret" not in str(raised.value)


def test_without_its_library_the_extra_is_named_and_sqlite_works(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["psycopg"] = None
from outstation.foundation.errors import UsageError
from outstation.fleet.database.store import FleetStore
FleetStore({str(tmp_path / "fleet.db")!r}).close()
try:
    FleetStore("postgresql://127.0.0.1/fleet")
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'outstation[postgres]'" in done.stdout


# --- concurrent writers ---


def test_concurrent_writers_of_one_log_leave_its_gaps_correct(postgres_url: str) -> None:
    stores = [FleetStore(postgres_url) for _ in range(3)]
    sender = enrolled(stores[0])
    log = [sender.results() if n % 7 else sender.health() for n in range(300)]
    dice = Random(1)
    stored = [item for item in log if item.seq % 11 or item.seq == len(log)]
    # Each store gets two thirds of the messages in its own order, so each message arrives twice.
    parts = [[item for i, item in enumerate(stored) if i % 3 != n] for n in range(3)]
    for part in parts:
        dice.shuffle(part)

    def store_part(store: FleetStore, part: list[SignedMessage]) -> None:
        for at in range(0, len(part), 7):
            add(store, sender, *part[at : at + 7])

    assert at_once(*(lambda s=s, p=p: store_part(s, p) for s, p in zip(stores, parts, strict=True))) == []
    missing = [(n, n) for n in range(11, 300, 11)]
    known = stores[1].acknowledgement(sender.device, sender.log)
    assert (known.through, known.missing) == (300, missing)
    assert stores[0].count_messages() == len(stored)
    assert [(gap["from"], gap["to"]) for gap in audit(stores[0]).gaps] == missing
    add(stores[2], sender, *(log[n - 1] for n, _ in missing))
    report = audit(stores[0])
    assert (report.passed, report.messages, report.duplicates) == (True, 300, 0)
    for store in stores:
        store.close()


def test_a_log_end_and_its_first_message_may_be_stored_concurrently(postgres_url: str) -> None:
    stores = [FleetStore(postgres_url) for _ in range(2)]
    for n in range(8):
        old = enrolled(stores[0], f"pi-{n}")
        log = [old.quality() for _ in range(9)]
        new = MessageSender(old.device, old.key)
        end = new.append("audit", event="new log", summary="", evidence={"old": old.log, "through": 9, "reissued": 0})
        assert at_once(lambda: add(stores[0], new, end), lambda: add(stores[1], old, log[4], log[8])) == []  # noqa: B023
        gaps = [gap for gap in stores[0].gaps(old.device) if gap["log"] == old.log]
        assert [(gap["from"], gap["to"], gap["declared"]) for gap in gaps] == [(1, 4, True), (6, 8, True)]
    for store in stores:
        store.close()


def test_a_conflicting_transaction_is_retried_and_counted(store: FleetStore, postgres_url: str) -> None:
    import psycopg

    a, b = enrolled(store, "pi-a"), enrolled(store, "pi-b")
    touch = "UPDATE devices SET state = state WHERE device = %s"
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    # PostgreSQL ends one of the two transactions; on a busy machine that may be the other one.
    for attempt in range(1, 11):
        both = [Arrival(a.verify(a.results())), Arrival(b.verify(b.results()))]
        worker = threading.Thread(target=store.ingest, args=(both, [], NOW))
        with contextlib.suppress(psycopg.errors.DeadlockDetected), psycopg.connect(postgres_url) as other:
            other.execute(touch, ("pi-b",))
            worker.start()
            with psycopg.connect(postgres_url, autocommit=True) as look:
                wait_until("a transaction waits", lambda look=look: look.execute(waiting).fetchone() == (1,))  # type: ignore[misc]
            # A deadlock: each transaction waits for a row that the other one holds.
            other.execute(touch, ("pi-a",))
        worker.join(60)
        assert store.count_messages() == 2 * attempt
        if store.retry_count:
            break
    # A retry that gets its row again before the other transaction does ends in the same deadlock.
    assert store.retry_count in (1, 2)


def test_a_key_revoked_meanwhile_signs_nothing_more(store: FleetStore, postgres_url: str) -> None:
    sender = enrolled(store)
    arrival = Arrival(sender.verify(sender.results()))
    other = FleetStore(postgres_url)
    collector = Collector(FLEET, BrokerConfig(), other, new_key(), share="b", group="g")
    other.revoke("pi-07", None, NOW)
    with pytest.raises(MessageRefused, match="revoked key"):
        store.ingest([arrival], [], NOW)
    assert store.count_messages() == 0
    assert collector.verify([sender.results().to_incoming()])[1][0].reason == "revoked key"
    other.close()


def test_two_operators_at_once_enrol_one_key_for_a_device(store: FleetStore, postgres_url: str) -> None:
    other = FleetStore(postgres_url)
    for n in range(5):
        raised = at_once(
            lambda: store.enrol(f"pi-{n}", new_key().public, replace=False, now=NOW),  # noqa: B023
            lambda: other.enrol(f"pi-{n}", new_key().public, replace=False, now=NOW),  # noqa: B023
        )
        assert [type(error) for error in raised] == [UsageError]
    assert len(store.enrolled_keys()) == 5
    other.close()


def test_a_lost_connection_is_reopened_and_its_transaction_is_rolled_back(store: FleetStore, postgres_url: str) -> None:
    import psycopg

    sender = enrolled(store)
    log = [sender.results() for _ in range(2)]
    cut = """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()"""

    def cut_off() -> None:
        with psycopg.connect(postgres_url, autocommit=True) as other:
            other.execute(cut)

    def add_and_lose() -> None:
        with store.transaction() as db:
            db.add_messages([("pi-07", sender.log, 1, "results", "t", b"x", "j", NOW)])
            cut_off()

    with pytest.raises(StorageError):
        add_and_lose()
    assert add(store, sender, log[0]) == ["new"]
    cut_off()
    with pytest.raises(StorageError):
        add(store, sender, log[1])
    assert add(store, sender, *log) == ["duplicate", "new"]
    assert audit(store).passed


def test_text_that_postgresql_cannot_hold_is_refused_alone_and_counted(store: FleetStore) -> None:
    sender = enrolled(store)
    collector = Collector(FLEET, BrokerConfig(), store, new_key(), share="a", group="g")
    wire: Any = Wire(store)
    poison = sender.alert(summary="NUL \0 in it")
    hostile = SignedMessage("outstation/acme/\0/health", b"x", "\0")
    wire.incoming = [item.to_incoming() for item in (sender.results(), poison, sender.results(), hostile)]
    collector.tick(wire, 0.0)
    assert store.count_messages() == 2
    assert [(row["reason"], row["count"]) for row in store.refusals()] == [("topic", 1), ("not storable", 1)]
    assert ask(store, "SELECT topic FROM refusal_samples WHERE reason = 'topic'") == [
        ("outstation/acme/\ufffd/health",)
    ]


def test_a_name_of_several_kilobytes_that_no_index_takes_is_refused_alone(store: FleetStore) -> None:
    sender = enrolled(store)
    noise = "".join(Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=20_000))
    good = sender.verify(sender.results())
    message = msgspec.structs.replace(good, body=msgspec.structs.replace(good.body, log=noise))
    with pytest.raises(MessageRefused, match="not storable"):
        store.ingest([Arrival(message), Arrival(sender.verify(sender.results()))], [], NOW)
    assert store.count_messages() == 0


# --- collectors ---


def test_sqlite_cannot_be_shared(tmp_path: Path) -> None:
    store = FleetStore(tmp_path / "fleet.db")
    with pytest.raises(UsageError, match="SQLite has one writer"):
        Collector(FLEET, BrokerConfig(), store, new_key(), share="a", group="g")
    store.close()


def test_logged_kinds_are_shared_and_retained_kinds_go_to_each_collector() -> None:
    plain, shared = topic_filters("acme"), topic_filters("acme", group="g1")
    assert [item.removeprefix("$share/g1/") for item in shared] == plain
    assert {item for item in shared if not item.startswith("$share/")} == {
        f"{topics.ROOT}/acme/+/keys",
        f"{topics.ROOT}/acme/+/state",
    }
    assert collecting.client_id("acme", None) == "outstation-acme-collector"
    assert collecting.client_id("acme", "b") == "outstation-acme-collector-b"


def test_messages_at_another_collector_are_not_requested_at_once() -> None:
    patience, log = PendingGaps(), ("pi-07", "log")
    assert patience.trim(0.0, log, 10, [(4, 5), (8, 8)]) == (3, [])
    assert patience.due_logs(WAIT_S - 0.1) == []
    assert patience.due_logs(WAIT_S) == [log]
    # Gaps reported a while ago are requested; newer gaps are not.
    assert patience.trim(WAIT_S, log, 20, [(4, 5), (8, 8), (15, 16)]) == (14, [(4, 5), (8, 8)])
    assert patience.trim(2 * WAIT_S, log, 20, [(15, 16)]) == (20, [(15, 16)])
    assert patience.trim(2 * WAIT_S, log, 20, []) == (20, [])
    assert patience.due_logs(100.0) == []


def test_refusals_of_all_collectors_raise_one_alert_of_the_leader(
    store: FleetStore, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outstation.fleet.collector.leader.LEADER_CHECK_S", 0.0)
    enrolled(store)
    stranger = MessageSender(key=new_key(5))
    stores = [store, FleetStore(postgres_url)]
    collectors = [
        Collector(FLEET, BrokerConfig(), item, new_key(), share=name) for item, name in zip(stores, "ab", strict=True)
    ]
    for _ in range(2):
        for item, collector in zip(stores, collectors, strict=True):
            wire: Any = Wire(item)
            wire.incoming = [stranger.results().to_incoming() for _ in range(7)]
            collector.tick(wire, 0.0)
    assert [item.join_collectors() for item in stores] == [2, 2]
    idle: Any = Wire(store)
    collectors[0].tick(idle, 0.0)
    # Seven refusals precede the first read, which cannot tell when they arrived.
    [alert] = store.alerts()
    assert (alert["alert"], alert["subject"]) == ("security", "refused")
    assert "21 messages in the name of pi-07" in alert["summary"]
    stores[1].close()


# --- everything that uses a database ---


def test_a_roll_out_is_decided_followed_and_audited(tmp_path: Path, postgres_url: str) -> None:
    with fleet_rollouts.fleet(tmp_path, where=postgres_url) as six:
        six.start(fleet_rollouts.plan())
        six.in_shadow()
        six.promote()
        six.promote(forced="to see")
        six.abort()
        assert [row[3] for row in six.decided()] == ["started", "promoted", "promoted", "aborted"]
        report = audit(six.store, operators=[fleet_rollouts.OPERATOR.public])
        assert report.passed, report.to_dict()
        assert six.look().devices.count_phases() != {}


def test_evidence_of_the_same_fleet_is_the_same_byte_by_byte(tmp_path: Path, postgres_url: str) -> None:
    story = build_story(tmp_path / "acme")
    copied = FleetStore(postgres_url)
    copy_database(story.store, copied)
    of_file = story.make(tmp_path / "file")
    story.store.close()
    story.store = copied
    of_server = story.make(tmp_path / "server")
    assert of_file.facts.audit == of_server.facts.audit
    assert contents(tmp_path / "file") == contents(tmp_path / "server")
    copied.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_commands_of_a_fleet_work_with_a_url_in_its_config(tmp_path: Path, postgres_url: str) -> None:
    def run(*arguments: object) -> Any:
        result = CliRunner().invoke(commands, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, (result.output, result.exception)
        return json.loads(result.stdout)

    folder = tmp_path / "acme"
    run("init", folder, "--broker", "mqtt://127.0.0.1:1")
    config = folder / "fleet.toml"
    config.write_text(config.read_text().replace('"fleet.db"', f'"{postgres_url}"'), encoding="utf-8")
    sender = MessageSender()
    run("enrol", "pi-07", "--device-key", sender.key.public.text, "--dir", folder, "--bundle-out", folder / "pi.tar.gz")
    store = FleetStore(postgres_url)
    evicted = [
        sender.results(),
        sender.drift(),
        sender.alert(),
        sender.quality(),
        sender.evicted((2, 2)),
        sender.health_with_cursor(),
    ]
    add(store, sender, *[item for item in evicted if item.seq != 2])
    store.close()
    assert run("devices", "--dir", folder)[0]["through"] == 6
    assert [row["summary"] for row in run("alerts", "--dir", folder)] == ["ax: gain loss."]
    assert [row["declared"] for row in run("gaps", "--dir", folder)] == [True]
    assert run("audit", "--db", postgres_url, "--dir", folder)["passed"]
    assert run("drift", "--dir", folder) is not None
    labels = tmp_path / "labels.csv"
    row = ask_once(postgres_url, "SELECT row FROM results ORDER BY row LIMIT 1")
    labels.write_text(f"row,label\n{row},PEN\n", encoding="utf-8")
    assert run("label", "pi-07", "exercise", labels, "--dir", folder)["accepted"] == 1
    assert run("rollout", "status", "--dir", folder) == []
    assert run("evidence", "--out", tmp_path / "evidence", "--dir", folder)["passed"]
    assert run("revoke", "pi-07", "--dir", folder)["revoked"] == [sender.key.public.kid]
    assert not (folder / "fleet.db").exists()


def ask_once(url: str, sql: str) -> Any:
    store = FleetStore(url, read_only=True)
    [(result,)] = ask(store, sql)
    store.close()
    return result


def test_the_queries_of_the_document_run(store: FleetStore) -> None:
    sender = enrolled(store)
    report = {"ax": {"state": "drift", "mean": 0.5, "m2": 8.0, "counts": [3, 4]}}
    columns = {"row": [1], "t": [1], "value": [20], "value_humidity": [0.5]}
    add(store, sender, sender.results(1, columns=columns, rows_at=(1, 1)), sender.drift(features=report))
    text = (Path(__file__).parents[2] / "docs" / "reference" / "fleet-database.md").read_text(encoding="utf-8")
    section = text.partition("## Queries on PostgreSQL")[2].partition("\n## ")[0]
    queries = re.findall(r"^(SELECT.*?;)$", section, re.MULTILINE | re.DOTALL)
    result = [ask(store, query.rstrip(";")) for query in queries]
    assert len(result) == 5
    assert result[1] == [("pi-07", 1, 0.5, (8.0 / 2000) ** 0.5)]
    assert [row[2:] for row in result[2]] == [(0, 3), (1, 4)]
    assert result[3][0][2] == "ax"
    assert result[4] == [("pi-07", 1, 0.5)]
