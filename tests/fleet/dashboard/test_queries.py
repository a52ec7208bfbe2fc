"""Statements of the dashboard: each reads a few rows by an index, in both databases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType

import msgspec
import pytest

from outstation.fleet.dashboard.pages.device import _load_quality
from outstation.fleet.dashboard.state import feed
from outstation.fleet.database import log_succession
from outstation.fleet.database.dashboard import accounts, devices, history, messages, results
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from outstation.workbench.testing.messages import MessageSender
from tests.kit.dashboards import enrolled, health

NOW = "2026-11-24T22:20:00.000000Z"
# Tables that grow with the messages.
LARGE = {"messages", "results", "drift_windows", "alerts", "metrics", "quality_messages", "rollout_devices", "anchors"}


def statements() -> Iterator[tuple[str, str]]:
    modules: list[ModuleType] = [accounts, devices, feed, history, messages, results, log_succession]
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, str) and name.strip("_").isupper() and re.search(r"\bSELECT\b", value):
                yield f"{module.__name__.rpartition('.')[2]}.{name}", value


STATEMENTS = dict(statements())


@pytest.mark.parametrize("name", STATEMENTS)
def test_no_statement_scans_a_large_table(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = FleetStore(tmp_path_factory.mktemp("db") / "fleet.db")
    sql = STATEMENTS[name]
    with store.snapshot() as db:
        plan = [str(row[3]) for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", (None,) * sql.count("?"))]
    store.close()
    scans = [step for step in plan if (table := re.match(r"SCAN (\w+)", step)) and table[1] in LARGE]
    assert scans == [], plan


def test_a_time_is_located_among_rows_without_reading_them_all(store: FleetStore) -> None:
    sender = enrolled(store, "pi-01", 1)
    store.ingest([Arrival(sender.verify(sender.results(3000, rows_at=(1, 3000))))], [], NOW)
    with store.snapshot() as db:
        begin = db.execute("SELECT min(t) FROM results").fetchone()[0] - 1
        rows_read, sampled = results.load_series(db, "pi-01", "exercise", begin + 100, begin + 110, 800)
        assert [row[0] for row in rows_read] == [*range(100, 111)]
        assert not sampled
        rows_read, sampled = results.load_series(db, "pi-01", "exercise", -(2**63), begin + 10**15, 100)
        assert sampled
        assert 100 <= len(rows_read) <= 101
        assert (rows_read[0][0], rows_read[-1][0]) == (1, 3000) or rows_read[-1][0] > 2960
        late = results.load_series(db, "pi-01", "exercise", begin + 5000, begin + 10**15, 100)
        assert late == ([], False)
        assert results.load_series(db, "pi-01", "other", 0, begin, 10) == ([], False)


def test_after_a_card_was_replaced_the_results_of_the_new_log_are_shown(store: FleetStore) -> None:
    old = enrolled(store, "pi-01", 1)
    new = MessageSender(device="pi-01", key=old.key, log="6f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c22")
    store.ingest([Arrival(old.verify(old.results(500, rows_at=(1, 500))))], [], NOW)
    store.ingest([Arrival(new.verify(new.results(30, rows_at=(1, 30))))], [], NOW)
    with store.transaction() as db:
        db.execute("UPDATE logs SET live = (log = ?)", (new.log,))
        newest = results.load_newest(db, "pi-01", "exercise", 5)
        assert [(row[0], row[5]) for row in newest] == [(n, new.log) for n in range(30, 25, -1)]
        each = results.load_last_of_each(db, [("pi-01", "exercise"), ("pi-01", "other")])
        assert each == [newest[0], None]
        for points in (10, 100):
            series, sampled = results.load_series(db, "pi-01", "exercise", -(2**63), 2**62, points)
            assert {row[5] for row in series} == {new.log}
            assert sampled is (points == 10)
        db.execute("UPDATE logs SET live = FALSE")
        assert {row[5] for row in results.load_newest(db, "pi-01", "exercise", 5)} == {new.log}


def test_the_newest_metrics_of_each_output_are_shown_however_old(store: FleetStore) -> None:
    sender = enrolled(store, "pi-01", 1)

    def evaluate(output: str, value: float, part: str = "") -> Arrival:
        metric = {"metric": "accuracy", "value": value, "low": None, "high": None, "n": 100, "slice": part}
        members = {"output": output} if output else {}
        return Arrival(sender.verify(sender.append("quality", task=sender.task, metrics=[metric], **members)))

    arrivals = [evaluate("wear", 0.1), evaluate("wear", 0.2), evaluate("wear", 0.3, "room=1")]
    store.ingest([*arrivals, *(evaluate("", 0.9) for _ in range(80))], [], NOW)
    with store.snapshot() as db:
        shown = history.load_quality(db, "pi-01", sender.log, sender.task, 60)
        assert [(row["output"], row["seq"]) for row in shown] == [("", 83), ("wear", 2)]
        assert [row["output"] for row in history.load_quality(db, "pi-01", sender.log, sender.task, 1)] == [""]
        assert history.load_quality(db, "pi-01", sender.log, "other", 60) == []
        page = _load_quality(db, "pi-01", sender.log, sender.task)
        assert [row["metrics"][0]["value"] for row in page] == [0.9, 0.2]


def test_refused_sign_ins_are_bounded_in_number_and_age(store: FleetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "MAX_REFUSALS", 5)
    with store.transaction() as db:
        accounts.add_action(db, ("2026-01-01", "ada", "admin", "account", "ada", "done", "192.0.2.1"))
        for n in range(10, 30):
            row = (f"2026-11-{n}", "", "", "sign in", f"name-{n}", "refused", "192.0.2.1")
            accounts.add_sign_in(db, row, f"2026-11-{n}", "2026-10")
            accounts.add_sign_in(db, row, f"2026-11-{n - 1}", "2026-10")
        stored = [(row["object"], row["outcome"]) for row in accounts.load_actions(db, 100)]
        assert stored == [*((f"name-{n}", "refused 2 times") for n in range(29, 24, -1)), ("ada", "done")]
        last = ("2026-12-30", "", "", "sign in", "name-29", "refused", "192.0.2.1")
        accounts.add_sign_in(db, last, "2026-12-29", "2026-11-29")
        assert [row["time"] for row in accounts.load_actions(db, 100)] == ["2026-12-30", "2026-11-29", "2026-01-01"]


def test_sign_ins_of_an_account_are_bounded_and_decisions_stay(
    store: FleetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "MAX_SIGN_INS", 4)
    with store.transaction() as db:
        accounts.add_sign_in(db, ("2026-11-01", "", "", "sign in", "ada", "refused", "192.0.2.1"), "2026-10-31", "2026")
        accounts.add_sign_in(
            db, ("2026-11-01", "eva", "viewer", "sign in", "eva", "done", "192.0.2.1"), "2026-10-31", "2026"
        )
        for n in range(10, 20):
            accounts.add_action(db, (f"2026-11-{n}", "ada", "admin", "abort roll-out", "r", "done", "192.0.2.1"))
            for action in ("sign in", "sign out"):
                row = (f"2026-11-{n}", "ada", "admin", action, "ada", "done", "192.0.2.1")
                accounts.add_sign_in(db, row, f"2026-11-{n}", "2026-10")
                accounts.add_sign_in(db, row, f"2026-11-{n - 1}", "2026-10")
        stored = [(row["name"], row["action"], row["outcome"]) for row in accounts.load_actions(db, 100)]
    assert stored.count(("ada", "abort roll-out", "done")) == 10
    assert stored.count(("ada", "sign in", "done 2 times")) == stored.count(("ada", "sign out", "done 2 times")) == 2
    assert ("", "sign in", "refused") in stored
    assert ("eva", "sign in", "done") in stored
    assert len(stored) == 16


def test_the_state_of_a_device_is_the_same_in_both_databases(store: FleetStore) -> None:
    from outstation.fleet.dashboard.state.fleet_state import FleetState

    sender, state = enrolled(store, "pi-01", 1), FleetState()
    sent = [sender.results(), sender.drift("drift"), health(sender, waiting=5), sender.alert()]
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], "2026-11-24T22:20:00.000000Z")
    with store.snapshot() as db:
        assert state.refresh(db) == {"pi-01"}
        assert state.refresh(db) == set()
    device = state.devices["pi-01"]
    assert (device.backlog, device.drift, device.severity, device.through) == (5, "drift", "warning", 4)
    assert [task.name for task in device.tasks] == ["exercise"]
    later = [sender.alert(state="cleared"), health(sender, waiting=0)]
    store.ingest([Arrival(sender.verify(item)) for item in later], [], "2026-11-24T22:21:00.000000Z")
    with store.snapshot() as db:
        assert state.refresh(db) == {"pi-01"}
    assert (state.devices["pi-01"].backlog, state.devices["pi-01"].alerts) == (0, [])
    seen_us = clock.parse_rfc3339("2026-11-24T22:21:00.000000Z")
    shown = msgspec.structs.replace(state.devices["pi-01"], state="online")
    assert [shown.status(seen_us + s * 10**6) for s in (210, 211)] == ["online", "silent"]
    hourly = [health(sender, interval_s=3600)]
    store.ingest([Arrival(sender.verify(item)) for item in hourly], [], "2026-11-24T22:21:01.000000Z")
    with store.snapshot() as db:
        state.refresh(db)
    shown = msgspec.structs.replace(state.devices["pi-01"], state="online")
    assert [shown.status(seen_us + s * 10**6) for s in (10_831, 10_832)] == ["online", "silent"]
    with store.transaction() as db:
        db.execute("UPDATE keys SET revoked = '2026-11-25T00:00:00Z'")
        db.execute("UPDATE meta SET value = value + 1 WHERE name = 'keys_version'")
    with store.snapshot() as db:
        assert state.refresh(db) == {"pi-01"}
    assert state.devices["pi-01"].status(0) == "revoked"
