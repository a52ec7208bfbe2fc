"""Labels at the collector: joined with the newest log, the last of a row wins; metrics of messages become rows."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.drift.truth import Label
from agent.fleet import labels
from agent.fleet.ingest import Arrival
from agent.fleet.labels import Outcome
from agent.fleet.store import FleetStore
from tests.senders import Sender, new_key

NOW = "2026-11-24T22:20:00.000000Z"
SENDER = Sender(key=new_key(7), log="5f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c11")
RESULTS = SENDER.results(60, rows_at=(1, 60))
ANEW = Sender(key=new_key(7), log="6a0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c12")
AGAIN = ANEW.results(60, rows_at=(1, 60))
METRICS = [
    {"metric": "accuracy", "value": 0.9, "low": 0.8, "high": 0.95, "n": 100},
    {"metric": "accuracy", "slice": "site=a", "value": 0.5, "low": 0.3, "high": 0.7, "n": 20, "state": "worse"},
    {"metric": "r2", "value": None, "low": None, "high": None, "n": 100},
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FleetStore]:
    opened = FleetStore(tmp_path / "fleet.db")
    opened.enrol(SENDER.device, SENDER.key.public, replace=False, now=NOW)
    opened.ingest([Arrival(SENDER.open(RESULTS))], [], NOW)
    yield opened
    opened.close()


def take(store: FleetStore, *given: Label) -> Outcome:
    with store.transaction() as db:
        return labels.take(db, SENDER.device, SENDER.task, given, NOW)


def ask(store: FleetStore, sql: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        return db.execute(sql).fetchall()


def named(store: FleetStore) -> dict[int, str]:
    return dict(ask(store, "SELECT row, label FROM results"))


def test_labels_are_joined_with_what_was_collected(store: FleetStore) -> None:
    found = named(store)
    right = [Label(row, None, label) for row, label in found.items()][:50]
    outcome = take(store, *right, Label(60, None, "PEN"), Label(59, None, "PEN"))
    accuracy = next(one for one in outcome.metrics if one.metric == "accuracy")
    wrong = sum(found[row] != "PEN" for row in (59, 60))
    assert (outcome.accepted, outcome.rejected) == (52, {})
    assert accuracy.value == pytest.approx(1 - wrong / 52, abs=1e-5)
    sql = "SELECT value, n, source, seq FROM metrics WHERE metric = 'accuracy'"
    assert ask(store, sql) == [(accuracy.value, 52, "collector", 0)]


def test_metrics_of_an_earlier_file_are_replaced_and_all_labels_count(store: FleetStore) -> None:
    found = named(store)
    take(store, *(Label(row, None, found[row]) for row in range(1, 21)))
    outcome = take(store, *(Label(row, None, found[row]) for row in range(21, 41)))
    assert ask(store, "SELECT n FROM metrics WHERE metric = 'accuracy'") == [(40,)]
    assert outcome.sources == {"human": 40}


def test_the_last_label_of_a_row_wins_and_is_counted(store: FleetStore) -> None:
    outcome = take(store, Label(1, None, "PEN"), Label(1, None, "ABD"), Label(1, None, "ABD"))
    assert (outcome.accepted, outcome.replaced) == (3, 1)
    assert ask(store, "SELECT label FROM labels") == [("ABD",)]


def test_a_time_means_the_nearest_result(store: FleetStore) -> None:
    t = 1_764_022_680_000_000
    outcome = take(store, Label(None, t + 7, "PEN"), Label(None, t + 10_000_000, "PEN"))
    assert (outcome.accepted, set(outcome.rejected)) == (1, {1})
    # The result of row 7 has that time to the microsecond.
    assert ask(store, "SELECT row FROM labels") == [(7,)]


def test_a_row_without_a_result_is_rejected(store: FleetStore) -> None:
    assert take(store, Label(61, None, "PEN")).rejected == {0: "row 61 has no result here"}


def test_the_models_own_answers_are_no_labels_of_its_quality(store: FleetStore) -> None:
    outcome = take(store, *(Label(row, None, "nonsense", "model") for row in range(1, 11)))
    assert outcome.metrics == []
    assert outcome.sources == {"model": 10}


def test_rows_count_anew_in_a_new_log_and_labels_are_of_that_one(store: FleetStore) -> None:
    take(store, Label(1, None, "PEN"))
    store.ingest([Arrival(ANEW.open(AGAIN))], [], NOW)
    outcome = take(store, Label(2, None, "PEN"))
    assert outcome.sources == {"human": 1}
    assert ask(store, "SELECT log, row FROM labels ORDER BY log") == [(SENDER.log, 1), (ANEW.log, 2)]


def test_without_results_nothing_can_be_joined(store: FleetStore) -> None:
    with pytest.raises(ValueError, match="no results of task 'other'"), store.transaction() as db:
        labels.take(db, SENDER.device, "other", [Label(1, None, "PEN")], NOW)


def test_metrics_of_a_message_become_rows_once(store: FleetStore) -> None:
    sent = SENDER.logged("quality", task=SENDER.task, metrics=METRICS, window={"n": 100})
    for _ in range(2):
        store.ingest([Arrival(SENDER.open(sent))], [], NOW)
    sql = "SELECT metric, slice, value, low, high, n, state, source, log, seq FROM metrics ORDER BY rowid"
    place = ("device", SENDER.log, sent.seq)
    assert ask(store, sql) == [
        ("accuracy", "", 0.9, 0.8, 0.95, 100, None, *place),
        ("accuracy", "site=a", 0.5, 0.3, 0.7, 20, "worse", *place),
        ("r2", "", None, None, None, 100, None, *place),
    ]


def test_what_a_device_said_is_not_replaced_by_labels_that_come_here(store: FleetStore) -> None:
    sent = SENDER.logged("quality", task=SENDER.task, metrics=METRICS[:1])
    store.ingest([Arrival(SENDER.open(sent))], [], NOW)
    take(store, Label(1, None, "PEN"))
    assert ask(store, "SELECT source FROM metrics WHERE metric = 'accuracy' ORDER BY source") == [
        ("collector",),
        ("device",),
    ]
