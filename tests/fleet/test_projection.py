"""Projection: messages about rollouts become rows once, in any order; invalid ones stay evidence only."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.projection import result_details
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire.messages import ResultsPayload
from outstation.protocol.wire.runs import MAX_RESULTS
from outstation.workbench.testing.messages import MODEL, NEW_MODEL, MessageSender, SignedMessage, new_key

NOW = "2026-11-24T22:20:00.000000Z"


def add(store: FleetStore, sender: MessageSender, *sent: SignedMessage) -> list[str]:
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    return list(store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW))


def ask(store: FleetStore, sql: str) -> list[Any]:
    with store.snapshot() as db:
        return db.execute(sql).fetchall()


def test_a_shadow_message_is_one_row_with_its_bytes_as_text(store: FleetStore) -> None:
    sender = MessageSender()
    sent = sender.shadow(n=300, errors=1, error="killed by signal 11")
    assert add(store, sender, sent) == ["new"]
    columns = "device, task, rollout, model, other, rows_first, rows_last, batches, n, errors, body, log, seq"
    members = ("pi-07", "exercise", "exercise-1-1", MODEL["digest"], NEW_MODEL["digest"], 1, 300, 5, 300, 1)
    assert ask(store, f"SELECT {columns} FROM shadows") == [(*members, sent.payload.decode(), sender.log, 1)]


def test_a_change_of_a_device_is_one_row(store: FleetStore) -> None:
    sender = MessageSender()
    add(store, sender, sender.rollout("rolled_back", reason="crash", strategy="canary", numbers={"signal": 11}))
    columns = "device, task, rollout, digest, strategy, phase, reason, summary, numbers, seq"
    members = ("pi-07", "exercise", "exercise-1-1", NEW_MODEL["digest"], "canary", "rolled_back", "crash")
    assert ask(store, f"SELECT {columns} FROM rollout_devices") == [
        (*members, "exercise 1.1.0: rolled_back.", '{"signal":11}', 1)
    ]


def test_any_order_and_any_repeats_give_the_same_rows(tmp_path: Path) -> None:
    sender = MessageSender(key=new_key(7), log="5f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c11")
    log = [sender.shadow(), sender.rollout("shadow"), sender.shadow()]
    result: list[list[Any]] = []
    for order in itertools.permutations(log):
        store = FleetStore(tmp_path / f"{len(result)}.db")
        for item in (*order, *order):
            add(store, sender, item)
        result.append([ask(store, f"SELECT * FROM {table} ORDER BY seq") for table in ("shadows", "rollout_devices")])
        store.close()
    assert [len(rows) for rows in result[0]] == [2, 1]
    assert all(item == result[0] for item in result)


def test_two_collectors_that_get_the_same_messages_keep_one_row_of_each(store: FleetStore) -> None:
    sender = MessageSender()
    log = [sender.shadow(), sender.rollout("shadow")]
    add(store, sender, *log)
    with FleetStore(store.location) as other:
        assert add(other, sender, *log) == ["duplicate", "duplicate"]
    assert ask(store, "SELECT count(*) FROM shadows UNION ALL SELECT count(*) FROM rollout_devices") == [(1,), (1,)]


@pytest.mark.parametrize(
    "evidence",
    [
        {},
        {"phase": "conquered"},
        {"digest": "sha256:ab"},
        {"version": ""},
        {"task": ["exercise"]},
        {"version": "1" * 65},
        {"numbers": [1, 2]},
    ],
    ids=str,
)
def test_an_audit_message_without_a_valid_phase_change_adds_no_row(store: FleetStore, evidence: dict[str, Any]) -> None:
    sender = MessageSender()
    sent = sender.rollout("shadow", **evidence) if evidence else sender.append("audit", event="rollout", evidence={})
    assert add(store, sender, sent) == ["new"]
    assert ask(store, "SELECT count(*) FROM rollout_devices") == [(0,)]
    assert ask(store, "SELECT count(*) FROM messages") == [(1,)]


def test_an_event_of_another_kind_makes_no_row(store: FleetStore) -> None:
    sender = MessageSender()
    evidence = json.loads(sender.rollout("shadow").payload)["evidence"]
    add(store, sender, sender.append("audit", event="activated", evidence=evidence))
    assert ask(store, "SELECT count(*) FROM rollout_devices") == [(0,)]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1", "9007199254740993"])
def test_a_tally_with_an_impossible_number_is_refused(number: str) -> None:
    sender = MessageSender()
    sent = sender.shadow()
    with pytest.raises(MessageRefused):
        sender.verify(
            sender.sign_payload(sent.topic, sent.payload.replace(b'"agreeing":96', f'"agreeing":{number}'.encode()))
        )
    assert sender.verify(sender.sign_payload(sent.topic, sent.payload.replace(b'"agreeing":96', b'"agreeing":7')))


MADE = {"agent": "0.1.0", "runtime": "ai-edge-litert 2.3.0", "config": "sha256:01"}


def two_results(sender: MessageSender, **columns: Any) -> SignedMessage:
    listed = {"row": [1, 2], "t": [10, 20], "value": [1.5, 2], **columns}
    return sender.results(2, rows_at=(1, 2), columns=listed, made=MADE, incomplete=1, faults=["ax", "ay"])


def test_every_column_of_results_reaches_the_tables_and_the_view(store: FleetStore) -> None:
    sender = MessageSender()
    add(store, sender, two_results(sender, missing=[0, 0.25], **{"value_hum": [3, None], 'score_"a"|b': [0.25, 1]}))
    expected = [
        (1, 1.5, 0, {"value_hum": 3.0, 'score_"a"|b': 0.25}, ["ax", "ay"]),
        (2, 2.0, 0.25, {"value_hum": None, 'score_"a"|b': 1.0}, ["ax", "ay"]),
    ]
    rows = ask(store, "SELECT row, value, missing, outputs, faults FROM results_dated ORDER BY row")
    assert [(*row[:3], json.loads(row[3]), json.loads(row[4])) for row in rows] == expected
    details = ask(store, "SELECT row, missing, outputs FROM result_details ORDER BY row")
    assert [(row, missing, json.loads(text)) for row, missing, text in details] == [
        (row, missing, outputs) for row, _, missing, outputs, _ in expected
    ]
    made = ("exercise", "1.0.0", "sha256:ab", *MADE.values())
    assert ask(store, "SELECT device, seq, rows_first, rows_last, n, incomplete FROM result_messages") == [
        ("pi-07", 1, 1, 2, 2, 1)
    ]
    members = "model, version, digest, agent, runtime, config"
    assert ask(store, f"SELECT task, stream, {members} FROM result_provenance") == [("exercise", "watch", *made)]
    assert ask(store, f"SELECT DISTINCT n, incomplete, {members} FROM results_dated") == [(2, 1, *made)]


def test_results_without_further_columns_store_no_text(store: FleetStore) -> None:
    sender = MessageSender()
    add(store, sender, sender.results(2))
    assert ask(store, "SELECT count(*) FROM result_details") == [(0,)]
    assert ask(store, "SELECT missing, outputs, faults FROM results_dated") == [(None, None, None)] * 2
    assert ask(store, "SELECT agent, runtime, config FROM result_provenance") == [(None, None, None)]


@pytest.mark.parametrize(
    "column",
    [[1], [1, 2, 3], ["x", "y"], [[1], [2]], {"first": 1}, "12", [1e300, 1]],
    ids=["short", "long", "text", "lists", "object", "string", "too large"],
)
def test_a_further_column_that_is_no_list_of_numbers_stays_evidence_only(store: FleetStore, column: object) -> None:
    sender = MessageSender()
    add(store, sender, two_results(sender, value_bad=column, value_good=[1, 2], other=[1, 2]))
    assert [json.loads(row[0]) for row in ask(store, "SELECT outputs FROM result_details ORDER BY row")] == [
        {"value_good": 1.0},
        {"value_good": 2.0},
    ]


@pytest.mark.parametrize(
    ("labels", "size"), [(1, 4096), (1, 100), (100, 200)], ids=["a long label", "1.6 MB", "many columns"]
)
def test_runs_of_labels_that_would_fill_the_memory_stay_evidence_only(
    store: FleetStore, labels: int, size: int
) -> None:
    count, sender = MAX_RESULTS, MessageSender()
    runs = {f"label_{i:03}": [["x" * size, count]] for i in range(labels)}
    listed = {"row": [[1, 1, count]], "t": [[1, 1, count]], "value_good": [1] * count, **runs}
    message = sender.results(count, rows_at=(1, count), columns=listed)
    assert len(message.payload) < 100_000
    body = sender.verify(message).body
    assert isinstance(body, ResultsPayload)
    tracemalloc.start()
    try:
        assert result_details(body, message.payload) == {}
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    add(store, sender, message)
    assert ask(store, "SELECT count(*) FROM results") == [(count,)]
    assert ask(store, "SELECT count(*) FROM result_details") == [(0,)]


def test_messages_of_one_maker_share_its_row(store: FleetStore) -> None:
    sender, other = MessageSender(), MessageSender("pi-08")
    add(store, sender, *(sender.results(1, made=MADE) for _ in range(3)), sender.results(1, model=NEW_MODEL))
    add(store, sender, sender.results(1, made=MADE))
    add(store, other, other.results(1, made=MADE))
    assert ask(store, "SELECT device, version FROM result_provenance ORDER BY device, version") == [
        ("pi-07", "1.0.0"),
        ("pi-07", "1.1.0"),
        ("pi-08", "1.0.0"),
    ]
    joined = "SELECT count(*) FROM result_messages JOIN result_provenance USING (device, provenance)"
    assert ask(store, joined) == [(6,)]
