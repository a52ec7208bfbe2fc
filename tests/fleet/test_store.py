"""Fleet store: independent of order, idempotent, exact about gaps, safe with two processes."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.fleet.audit.audit import audit
from outstation.fleet.database import sqlite
from outstation.fleet.database.ingest import DEFAULT_MAX_SAMPLES, Arrival, Refusal
from outstation.fleet.database.schema.migrations import MIGRATIONS
from outstation.fleet.database.store import MAX_MISSING_RANGES, FleetStore
from outstation.foundation.errors import MessageRefused, StorageBusy, StorageError, StorageFull, UsageError
from outstation.workbench.testing.messages import MessageSender, SignedMessage, new_key
from tests.kit.fleet_databases import sqlite_of

NOW = "2026-11-24T22:20:00.000000Z"
TABLES = (
    *("devices", "messages", "logs", "gaps", "log_ends", "results", "drift_windows", "alerts", "quality_messages"),
    *("shadows", "samples", "rollout_devices", "learned_references"),
)


@pytest.fixture
def file_store(tmp_path: Path) -> Iterator[FleetStore]:
    with FleetStore(tmp_path / "fleet.db") as opened:
        yield opened


def enrol(store: FleetStore, sender: MessageSender) -> None:
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)


def add(store: FleetStore, sender: MessageSender, *sent: SignedMessage) -> list[str]:
    return list(store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW))


def tables(store: FleetStore) -> dict[str, list[Any]]:
    """Return all content that must not depend on the order of arrival."""
    result = {}
    with store.snapshot() as db:
        for name in TABLES:
            cursor = db.execute(f"SELECT * FROM {name}")
            # PostgreSQL appends the column `rowid`, which is the order of arrival.
            columns = len([column for column in cursor.description if column[0] != "rowid"])
            result[name] = sorted((row[:columns] for row in cursor), key=repr)
    return result


def ask(store: FleetStore, sql: str) -> list[Any]:
    with store.snapshot() as db:
        return db.execute(sql).fetchall()


def of_every_kind(sender: MessageSender) -> list[SignedMessage]:
    """Return a log with each kind, and two evictions: of seq 3, and of 5 and 6."""
    log = [sender.results(), sender.drift(), sender.results(), sender.alert(), sender.quality(), sender.results()]
    log += [sender.evicted((3, 3)), sender.health_with_cursor(), sender.evicted((5, 6)), sender.alert(state="cleared")]
    log += [sender.shadow(), sender.rollout("shadow"), sender.rollout("active", strategy="all"), sender.samples()]
    return [item for item in log if item.seq not in (3, 5, 6)]


SENDER = MessageSender(key=new_key(7), log="5f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c11")
LOG = of_every_kind(SENDER)


@pytest.mark.attack("broker")
@settings(max_examples=25, deadline=None)
@given(order=st.permutations(LOG), repeats=st.lists(st.sampled_from(LOG), max_size=6), cuts=st.sets(st.integers(1, 12)))
def test_any_order_and_any_repeats_in_any_batches_give_the_same_tables(
    fresh: Callable[[], FleetStore], order: list[SignedMessage], repeats: list[SignedMessage], cuts: set[int]
) -> None:
    seen = []
    for sequence, ends in (([*LOG], [len(LOG)]), ([*order, *repeats], [*sorted(cuts), len(order) + len(repeats)])):
        store = fresh()
        enrol(store, SENDER)
        for start, end in zip([0, *ends], ends, strict=False):
            add(store, SENDER, *sequence[start:end])
        seen.append(tables(store))
        store.close()
    assert seen[0] == seen[1]
    assert [row[2:] for row in seen[0]["gaps"]] == [(3, 3, 1), (5, 6, 1)]


@settings(max_examples=40, deadline=None)
@given(arrived=st.sets(st.integers(1, 14)), ends=st.lists(st.integers(0, 20), min_size=1, max_size=2), data=st.data())
def test_gaps_of_an_ended_log_are_declared_in_any_order(
    fresh: Callable[[], FleetStore], arrived: set[int], ends: list[int], data: st.DataObject
) -> None:
    old = MessageSender(key=SENDER.key)
    log = [old.quality() for _ in range(13)] + [old.evicted((3, 3), (12, 13))]
    arrivals = [Arrival(old.verify(log[seq - 1])) for seq in arrived]
    for end in ends:
        new = MessageSender(key=old.key)
        evidence = {"old": old.log, "through": end, "reissued": 0}
        arrivals.append(Arrival(new.verify(new.append("audit", event="new log", summary="", evidence=evidence))))
    order = data.draw(st.permutations(arrivals))
    # Draw before opening the store: a draw may end the test.
    cut = data.draw(st.integers(0, len(order)))
    store = fresh()
    enrol(store, old)
    for part in (order[:cut], order[cut:]):
        store.ingest(part, [], NOW)
    absent = set(range(1, max(arrived, default=0))) - arrived
    declared = absent & ({3, 12, 13} if 14 in arrived else set()) | {seq for seq in absent if seq <= max(ends)}
    gaps = [(gap["from"], gap["to"], gap["declared"]) for gap in store.gaps() if gap["log"] == old.log]
    audited = [(gap["from"], gap["to"]) for gap in audit(store).gaps if gap["log"] == old.log and not gap["declared"]]
    report = store.acknowledgement(old.device, old.log).missing if arrived else []
    store.close()
    assert [gap[:2] for gap in gaps if gap[2]] == ranges(declared)
    assert [gap[:2] for gap in gaps if not gap[2]] == report == audited == ranges(absent - declared)


def test_a_database_of_an_older_version_is_migrated_and_not_read_before(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    FleetStore(path).close()
    newest = [migration.name for migration in MIGRATIONS[2:5]]
    assert newest == ["name_output_of_metrics", "index_metrics_by_output", "name_output_of_labels"]
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE labels")
        db.execute(next(text for text in MIGRATIONS[0].statements if text.startswith("CREATE TABLE labels")))
        db.execute("INSERT INTO labels VALUES ('d', 'exercise', 'log', 7, 'PEN', 'human', '2026', 'eva')")
        db.execute("DROP INDEX metrics_by_output")
        db.execute("ALTER TABLE metrics DROP COLUMN output")
        db.execute("DELETE FROM _sqlite_migrations WHERE name IN (?, ?, ?)", newest)
    with pytest.raises(UsageError, match="created by an older version"):
        FleetStore(path, read_only=True)
    FleetStore(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute(
            "SELECT count(output) FROM metrics INDEXED BY metrics_by_output WHERE device = 'd' AND "
            "source = 'device' AND slice = ''"
        ).fetchone() == (0,)
        assert db.execute("SELECT * FROM labels").fetchall() == [
            ("d", "exercise", "log", 7, "PEN", "human", "2026", "eva", "")
        ]
    FleetStore(path, read_only=True).close()


def ranges(numbers: set[int]) -> list[tuple[int, int]]:
    """Return maximal runs, ascending."""
    runs: list[tuple[int, int]] = []
    for n in sorted(numbers):
        runs = [*runs[:-1], (runs[-1][0], n)] if runs and runs[-1][1] == n - 1 else [*runs, (n, n)]
    return runs


EVICTIONS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)).map(lambda p: (p[0], p[0] + p[1])), max_size=4)


@settings(max_examples=40, deadline=None)
@given(arrived=st.sets(st.integers(1, 40), min_size=1), evicted=EVICTIONS, data=st.data())
def test_gaps_equal_a_brute_force_model(
    fresh: Callable[[], FleetStore], arrived: set[int], evicted: list[tuple[int, int]], data: st.DataObject
) -> None:
    sender = MessageSender(key=SENDER.key)
    log = [sender.quality() for _ in range(40)]
    sent = [log[seq - 1] for seq in arrived] + [sender.evicted(*evicted)]
    order = data.draw(st.permutations(sent))
    store = fresh()
    enrol(store, sender)
    for item in order:
        add(store, sender, item)
    absent = set(range(1, 42)) - arrived - {41}
    declared = absent & {seq for first, last in evicted for seq in range(first, last + 1)}
    gaps = [(gap["from"], gap["to"], gap["declared"]) for gap in store.gaps()]
    report = store.acknowledgement(sender.device, sender.log)
    store.close()
    assert [gap[:2] for gap in gaps if gap[2]] == ranges(declared)
    assert [gap[:2] for gap in gaps if not gap[2]] == ranges(absent - declared)
    assert (report.through, report.missing) == (41, ranges(absent - declared))


def test_a_message_without_results_is_stored(store: FleetStore) -> None:
    sender = MessageSender()
    enrol(store, sender)
    assert add(store, sender, sender.results(0, rows=25, lost="its checksum does not match")) == ["new"]
    assert tables(store)["results"] == []


def test_an_acknowledgement_ends_at_the_hundredth_gap(store: FleetStore) -> None:
    sender = MessageSender()
    enrol(store, sender)
    log = [sender.quality() for _ in range(2 * MAX_MISSING_RANGES + 50)]
    add(store, sender, *log[1::2])
    report = store.acknowledgement(sender.device, sender.log)
    assert report.missing == [(seq, seq) for seq in range(1, 200, 2)]
    assert report.through == 200
    add(store, sender, *log[:100:2])
    assert store.acknowledgement(sender.device, sender.log).through == 250


@pytest.mark.attack("broker")
def test_a_conflicting_payload_raises_an_alert_and_replaces_nothing(store: FleetStore) -> None:
    sender = MessageSender()
    enrol(store, sender)
    twin = MessageSender(key=sender.key, log=sender.log)
    first, other = sender.results(), twin.results(n=2)
    assert add(store, sender, first, other, other) == ["new", "conflict", "conflict"]
    assert [row[5] for row in tables(store)["messages"]] == [first.payload]
    assert len(tables(store)["results"]) == 3
    [alert] = store.alerts()
    assert (alert["alert"], alert["severity"], alert["open"]) == ("security", "critical", True)
    assert "two different messages as seq 1" in alert["summary"]
    assert ask(store, "SELECT reason, payload, jws FROM refusal_samples")[0] == (
        "conflicting payload",
        other.payload,
        other.jws,
    )
    assert [(row["reason"], row["count"]) for row in store.refusals()] == [("conflicting payload", 2)]


def test_refused_messages_are_counted_and_the_first_few_are_samples(store: FleetStore) -> None:
    sender = MessageSender()
    enrol(store, sender)
    flood = [Refusal(f"ghost-{i}", "unknown key", "", "t", b"x", "") for i in range(50)]
    store.ingest([], [*flood, Refusal(sender.device, "unsigned", "", "t", b"\xff", "")], NOW)
    assert [(r["device"], r["reason"], r["count"]) for r in store.refusals()] == [
        ("", "unknown key", 50),
        (sender.device, "unsigned", 1),
    ]
    assert ask(store, "SELECT count(*) FROM refusal_samples") == [(DEFAULT_MAX_SAMPLES + 1,)]


def test_a_value_too_large_for_the_database_rolls_back_its_batch(store: FleetStore) -> None:
    sender = MessageSender()
    enrol(store, sender)
    good = sender.verify(sender.results())
    poison = msgspec.structs.replace(good, body=msgspec.structs.replace(good.body, seq=2**70))
    with pytest.raises(MessageRefused, match="not storable"):
        store.ingest([Arrival(good), Arrival(poison)], [], NOW)
    assert store.count_messages() == 0


def test_alerts_are_open_until_cleared_and_those_of_a_lost_log_are_closed(store: FleetStore) -> None:
    sender = MessageSender()
    enrol(store, sender)
    add(store, sender, sender.alert("a"), sender.alert("b"), sender.alert("a", "cleared"))
    assert [alert["id"] for alert in store.alerts()] == ["b"]
    assert store.devices()[0]["alerts"] == 1
    add(store, sender, sender.alert("a"))
    assert [alert["id"] for alert in store.alerts()] == ["b", "a"]
    reborn = MessageSender(key=sender.key)
    evidence = {"old": sender.log, "through": sender.seq}
    add(store, reborn, reborn.append("audit", event="new log", summary="", evidence=evidence))
    assert store.alerts() == []
    assert len(store.alerts(closed=True)) == 4


def test_enrolling_again_is_quiet_and_another_key_needs_replace(store: FleetStore) -> None:
    sender, other = MessageSender(), new_key()
    assert store.enrol("pi-07", sender.key.public, replace=False, now=NOW)
    assert not store.enrol("pi-07", sender.key.public, replace=False, now=NOW)
    with pytest.raises(UsageError, match="--replace"):
        store.enrol("pi-07", other.public, replace=False, now=NOW)
    with pytest.raises(UsageError, match="belongs to device 'pi-07'"):
        store.enrol("pi-08", sender.key.public, replace=False, now=NOW)
    assert store.enrol("pi-07", other.public, replace=True, now=NOW)
    assert {kid: revoked for kid, _, _, revoked, *_ in store.enrolled_keys()} == {
        sender.key.public.kid: True,
        other.public.kid: False,
    }
    with pytest.raises(UsageError, match="revoked"):
        store.enrol("pi-07", sender.key.public, replace=True, now=NOW)


def test_a_full_disk_and_a_locked_database_store_nothing(file_store: FleetStore) -> None:
    sender = MessageSender()
    enrol(file_store, sender)
    sqlite_of(file_store).connection.execute("PRAGMA max_page_count = 40")
    with pytest.raises(StorageFull):
        add(file_store, sender, *[sender.results(padding=200) for _ in range(500)])
    sqlite_of(file_store).connection.execute("PRAGMA max_page_count = 1000000")
    sqlite_of(file_store).connection.execute("PRAGMA busy_timeout = 10")
    blocker = sqlite3.connect(file_store.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageBusy):
        add(file_store, sender, sender.quality())
    blocker.execute("ROLLBACK")
    blocker.close()
    assert file_store.count_messages() == 0


def test_two_open_stores_take_turns(file_store: FleetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    second = FleetStore(file_store.path)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with sqlite_of(second).lock_exclusively():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    monkeypatch.setattr(sqlite, "LOCK_WAIT_S", 0.05)
    with pytest.raises(StorageBusy, match="another process"):
        enrol(file_store, MessageSender())
    leave.set()
    thread.join()
    enrol(file_store, MessageSender())
    assert [row["device"] for row in file_store.devices()] == ["pi-07"]
    second.close()


def test_a_file_that_is_no_database_is_reported(tmp_path: Path) -> None:
    (tmp_path / "fleet.db").write_bytes(b"no database, but long enough to look at " * 100)
    with pytest.raises(StorageError, match=r"fleet\.db"):
        FleetStore(tmp_path / "fleet.db")
    with pytest.raises(UsageError, match="no database here yet"):
        FleetStore(tmp_path / "none.db", read_only=True)


def test_acknowledging_reads_the_gaps_by_index(file_store: FleetStore) -> None:
    plan = [
        row[3]
        for row in sqlite_of(file_store).connection.execute(
            f"EXPLAIN QUERY PLAN {sqlite.UNDECLARED_GAPS}", ("d", "l", 101)
        )
    ]
    assert plan == ["SEARCH gaps USING PRIMARY KEY (device=? AND log=?)"]


def test_the_document_lists_every_table_and_view(tmp_path: Path) -> None:
    store = FleetStore(tmp_path / "fleet.db")
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "fleet.db")) as db:
        made = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")}
    text = (Path(__file__).parents[2] / "docs" / "reference" / "fleet-database.md").read_text(encoding="utf-8")
    others = text.partition("## Tables of messages")[0]
    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", others, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    listed |= {*re.findall(r"^### `(\w+)`", text, re.MULTILINE)}
    assert listed == {name for name in made if not name.startswith(("_", "sqlite_"))}


# --- the ground moved


def test_a_database_file_that_was_moved_or_replaced_takes_no_message(tmp_path: Path, file_store: FleetStore) -> None:
    sender = MessageSender()
    enrol(file_store, sender)
    assert add(file_store, sender, sender.append("audit", event="first")) == ["new"]
    later = sender.append("audit", event="second")
    (tmp_path / "fleet.db").rename(tmp_path / "moved.db")
    with pytest.raises(StorageError, match=r"fleet\.db: moved or deleted while it was open"):
        add(file_store, sender, later)
    (tmp_path / "fleet.db").touch()
    with pytest.raises(StorageError, match=r"fleet\.db: replaced while it was open"):
        add(file_store, sender, later)
    (tmp_path / "moved.db").replace(tmp_path / "fleet.db")
    assert add(file_store, sender, later) == ["new"]


@pytest.mark.parametrize("count", [1, 39, 40, 41, 120, 121])
def test_rows_inserted_together_are_those_inserted_one_by_one(count: int) -> None:
    texts = [None, "", "wa\0lk", "läuft", "12", "1.5"]
    rows = [("pi", "task", i, -i, texts[i % 6], [None, 0.5, 2.0, -0.0][i % 4], None, "log", i) for i in range(count)]
    with contextlib.closing(sqlite.open_temporary()) as together, contextlib.closing(sqlite.open_temporary()) as single:
        together.bulk_insert("results", rows)
        for row in rows:
            single.execute("INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        stored = "SELECT rowid, *, typeof(label), typeof(score) FROM results ORDER BY rowid"
        assert together.execute(stored).fetchall() == single.execute(stored).fetchall()


@pytest.mark.parametrize(
    ("value", "problem"), [(None, sqlite3.IntegrityError), (2**63, OverflowError), ("\ud800", UnicodeEncodeError)]
)
def test_a_value_that_cannot_be_stored_ends_the_insertion_of_many_rows(value: Any, problem: type[Exception]) -> None:
    rows: list[tuple[Any, ...]] = [("pi", "task", i, i, "walk", 0.5, None, "log", i) for i in range(50)]
    rows[7] = ("pi", "task", value, 0, None, None, None, "log", 1)
    with contextlib.closing(sqlite.open_temporary()) as db, pytest.raises(problem):
        db.bulk_insert("results", rows)


def test_a_statement_for_many_rows_of_any_table_has_at_most_999_values() -> None:
    with contextlib.closing(sqlite.open_temporary()) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        widths = [len(db.execute(f"PRAGMA table_info({name})").fetchall()) for name in names]
    assert max(widths) * sqlite.ROWS_PER_STATEMENT <= 999
