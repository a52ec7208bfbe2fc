"""Labels at the collector: joined with the newest log, the last label of a row wins, metrics become rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from outstation.fleet.bundle_history import BundleLabelSchema
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.labelling.labelled_results import LabelledResult
from outstation.fleet.database.store import FleetStore
from outstation.fleet.labelling import given_labels
from outstation.fleet.labelling.given_labels import LabelOutcome
from outstation.ml.performance.labels import Label, LabelSchema
from outstation.workbench.testing.messages import MODEL, MessageSender, SignedMessage, new_key

NOW = "2026-11-24T22:20:00.000000Z"
SENDER = MessageSender(key=new_key(7), log="5f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c11")
RESULTS = SENDER.results(60, rows_at=(1, 60))
ANEW = MessageSender(key=new_key(7), log="6a0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c12")
AGAIN = ANEW.results(60, rows_at=(1, 60))
NEW_LOG = ANEW.append("audit", event="new log", summary="", evidence={"old": SENDER.log, "through": 2**20})
METRICS = [
    {"metric": "accuracy", "value": 0.9, "low": 0.8, "high": 0.95, "n": 100},
    {"metric": "accuracy", "slice": "site=a", "value": 0.5, "low": 0.3, "high": 0.7, "n": 20, "state": "worse"},
    {"metric": "r2", "value": None, "low": None, "high": None, "n": 100},
]


@pytest.fixture
def store(fresh: Callable[[], FleetStore]) -> Iterator[FleetStore]:
    opened = fresh()
    opened.enrol(SENDER.device, SENDER.key.public, replace=False, now=NOW)
    opened.ingest([Arrival(SENDER.verify(RESULTS))], [], NOW)
    yield opened
    opened.close()


def take(store: FleetStore, *given: Label) -> LabelOutcome:
    with store.transaction() as db:
        return given_labels.add(db, SENDER.device, SENDER.task, given, NOW, "eva")


def ask(store: FleetStore, sql: str) -> list[Any]:
    with store.snapshot() as db:
        return db.execute(sql).fetchall()


def named(store: FleetStore) -> dict[int, str]:
    return dict(ask(store, "SELECT row, label FROM results"))


def test_labels_are_joined_with_what_was_collected(store: FleetStore) -> None:
    result = named(store)
    right = [Label(row, None, label) for row, label in result.items()][:50]
    outcome = take(store, *right, Label(60, None, "PEN"), Label(59, None, "PEN"))
    accuracy = next(item for item in outcome.metrics if item.metric == "accuracy")
    wrong = sum(result[row] != "PEN" for row in (59, 60))
    assert (outcome.accepted, outcome.rejected) == (52, {})
    assert accuracy.value == pytest.approx(1 - wrong / 52, abs=1e-5)
    sql = "SELECT value, n, source, seq FROM metrics WHERE metric = 'accuracy'"
    assert ask(store, sql) == [(accuracy.value, 52, "collector", 0)]


def test_metrics_of_an_earlier_file_are_replaced_and_all_labels_count(store: FleetStore) -> None:
    result = named(store)
    take(store, *(Label(row, None, result[row]) for row in range(1, 21)))
    outcome = take(store, *(Label(row, None, result[row]) for row in range(21, 41)))
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
    # The result of row 7 has exactly this time.
    assert ask(store, "SELECT row FROM labels") == [(7,)]


def test_a_row_without_a_result_is_rejected(store: FleetStore) -> None:
    assert take(store, Label(61, None, "PEN")).rejected == {0: "row 61 has no result here"}


def test_labels_from_the_model_are_not_ground_truth(store: FleetStore) -> None:
    outcome = take(store, *(Label(row, None, "PEN", "model") for row in range(1, 11)))
    assert outcome.metrics == []
    assert outcome.sources == {"model": 10}


def test_rows_count_anew_in_a_new_log_and_labels_are_of_that_one(store: FleetStore) -> None:
    take(store, Label(1, None, "PEN"))
    store.ingest([Arrival(ANEW.verify(AGAIN)), Arrival(ANEW.verify(NEW_LOG))], [], NOW)
    outcome = take(store, Label(2, None, "PEN"))
    assert outcome.sources == {"human": 1}
    assert ask(store, "SELECT log, row FROM labels ORDER BY log") == [(SENDER.log, 1), (ANEW.log, 2)]


def test_without_results_nothing_can_be_joined(store: FleetStore) -> None:
    with pytest.raises(ValueError, match="no results of task 'other'"), store.transaction() as db:
        given_labels.add(db, SENDER.device, "other", [Label(1, None, "PEN")], NOW, "eva")


def test_metrics_of_a_message_become_rows_once(store: FleetStore) -> None:
    sent = SENDER.append("quality", task=SENDER.task, metrics=METRICS, window={"n": 100})
    for _ in range(2):
        store.ingest([Arrival(SENDER.verify(sent))], [], NOW)
    sql = "SELECT metric, slice, value, low, high, n, state, source, log, seq FROM metrics ORDER BY seq, metric, slice"
    place = ("device", SENDER.log, sent.seq)
    assert ask(store, sql) == [
        ("accuracy", "", 0.9, 0.8, 0.95, 100, None, *place),
        ("accuracy", "site=a", 0.5, 0.3, 0.7, 20, "worse", *place),
        ("r2", "", None, None, None, 100, None, *place),
    ]


def test_metrics_of_the_device_are_not_replaced_by_labels_at_the_collector(store: FleetStore) -> None:
    sent = SENDER.append("quality", task=SENDER.task, metrics=METRICS[:1])
    store.ingest([Arrival(SENDER.verify(sent))], [], NOW)
    take(store, Label(1, None, "PEN"))
    assert ask(store, "SELECT source FROM metrics WHERE metric = 'accuracy' ORDER BY source") == [
        ("collector",),
        ("device",),
    ]


def test_a_misspelt_class_is_rejected_with_those_the_model_named_here(store: FleetStore) -> None:
    outcome = take(store, Label(1, None, "PENN"), Label(2, None, "pen"), Label(3, None, "PEN"))
    assert (outcome.accepted, set(outcome.rejected)) == (1, {0, 1})
    assert outcome.rejected[0].startswith("this is no label of this model; it knows ABD, FEL, PEN, as inferred ")
    assert ask(store, "SELECT label FROM labels") == [("PEN",)]


@pytest.mark.attack("devices")
def test_each_distinct_text_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = LabelSchema("classify", ("PEN", "ABD"))
    parse = Mock(side_effect=classes.parse)
    monkeypatch.setattr(LabelSchema, "parse", parse)
    schema = BundleLabelSchema(classes, True)
    results = [LabelledResult("PEN", "human", text, 0.9, None, 1) for text in ("PEN", "ABD", "made up", None)] * 50
    accuracy = next(each for each in given_labels.compute_label_metrics(schema, results) if each.metric == "accuracy")
    assert (accuracy.n, accuracy.value) == (100, 0.5)
    assert sorted(call.args[0] for call in parse.call_args_list) == ["", "ABD", "PEN", "made up"]


MANY = ["-", *(f"c{i:02}" for i in range(17))]


@pytest.mark.parametrize(
    ("predicted", "given", "classes"),
    [
        (["-", "hot", "wet"], ["hot|wet", "-", "wet"], ["hot", "wet"]),
        (["-", "hot|wet", "wet"], ["hot|wet", "-", "wet"], ["hot", "wet"]),
        (["-"], ["-"], []),
        (MANY, MANY, MANY),
    ],
    ids=["one each", "several", "no label", "too many for several"],
)
def test_results_without_a_label_are_of_a_model_that_may_give_several(
    fresh: Callable[[], FleetStore], predicted: list[str], given: list[str], classes: list[str]
) -> None:
    sender, rows = MessageSender(), list(range(1, len(predicted) + 1))
    columns = {"row": rows, "t": rows, "label": predicted, "score": [0.9] * len(rows)}
    results = sender.results(len(rows), rows_at=(1, len(rows)), columns=columns)
    with contextlib.closing(fresh()) as store:
        store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
        store.ingest([Arrival(sender.verify(results))], [], NOW)
        with store.transaction() as db:
            texts = [Label(row, None, text) for row, text in zip(rows, given, strict=True)]
            outcome = given_labels.add(db, sender.device, sender.task, texts, NOW, "eva")
    assert (outcome.accepted, outcome.rejected) == (len(rows), {})
    assert [each.slice for each in outcome.metrics if each.metric == "f1"] == [f"class={name}" for name in classes]


def activated(sender: MessageSender, kind: str, **more: Any) -> SignedMessage:
    to = {"name": MODEL["name"], "version": MODEL["version"], "digest": MODEL["digest"]}
    evidence = {"task": sender.task, "from": None, "to": to, "why": "configured", "kind": kind, **more}
    return sender.append("audit", event="activated", summary="", evidence=evidence)


def test_a_class_the_model_never_predicted_is_accepted_if_it_was_declared(store: FleetStore) -> None:
    output = activated(SENDER, "classify", labels=["PEN", "ABD", "FEL", "HOP"])
    store.ingest([Arrival(SENDER.verify(output))], [], NOW)
    outcome = take(store, Label(1, None, "HOP"), Label(2, None, "HOPP"))
    assert (outcome.accepted, outcome.rejected) == (
        1,
        {1: "this is no label of this model; it knows PEN, ABD, FEL, HOP"},
    )


def numbers(tmp_path: Path, *output: SignedMessage, sender: MessageSender) -> FleetStore:
    """Return a store with results 1 to 60 of a model that predicts a tenth of the row number."""
    columns = {"row": list(range(1, 61)), "t": list(range(1, 61)), "value": [row / 10 for row in range(1, 61)]}
    sent = sender.results(60, rows_at=(1, 60), columns=columns)
    store = FleetStore(tmp_path / "numbers.db")
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    store.ingest([Arrival(sender.verify(item)) for item in (*output, sent)], [], NOW)
    return store


def anomalies(word: bool) -> list[Label]:
    texts = ("anomaly", "normal") if word else ("1", "0")
    return [Label(row, None, texts[row <= 40]) for row in range(1, 61)]


def test_words_for_anomalies_are_labels_of_an_anomaly_model(tmp_path: Path) -> None:
    with contextlib.closing(numbers(tmp_path, sender=MessageSender(key=new_key(7), log=SENDER.log))) as store:
        outcome = take(store, *anomalies(word=True))
        assert (outcome.accepted, outcome.rejected) == (60, {})
        assert [(item.metric, item.value) for item in outcome.metrics] == [("auc", 1.0)]


@pytest.mark.parametrize("word", [True, False])
def test_an_anomaly_model_is_evaluated_at_its_declared_threshold(tmp_path: Path, word: bool) -> None:
    sender = MessageSender(key=new_key(7), log=SENDER.log)
    with contextlib.closing(numbers(tmp_path, activated(sender, "anomaly", threshold=3.95), sender=sender)) as store:
        result = {item.metric: item.value for item in take(store, *anomalies(word)).metrics}
    assert result == {"accuracy": pytest.approx(59 / 60, abs=1e-5), "auc": 1.0, "f1": pytest.approx(40 / 41, abs=1e-5)}


def test_labels_of_a_model_that_gives_numbers_are_numbers(tmp_path: Path) -> None:
    with contextlib.closing(numbers(tmp_path, sender=MessageSender(key=new_key(7), log=SENDER.log))) as store:
        outcome = take(store, *(Label(row, None, f"{row / 10 + 1}") for row in range(1, 61)), Label(1, None, "1e160"))
        assert set(outcome.rejected) == {60}
        assert {item.metric: item.value for item in outcome.metrics}["mae"] == pytest.approx(1.0)


def test_results_of_different_bundles_are_not_mixed(store: FleetStore) -> None:
    newer = SENDER.results(60, rows_at=(61, 120), model={**MODEL, "version": "9.9.9", "digest": "sha256:99"})
    store.ingest([Arrival(SENDER.verify(newer))], [], NOW)
    result = named(store)
    wrong = {"PEN": "ABD", "ABD": "FEL", "FEL": "PEN"}
    old = take(store, *(Label(row, None, wrong[result[row]]) for row in range(1, 61)))
    assert old.model is not None
    assert (old.model.digest, old.other_bundle_labels, old.metrics[0].value) == (MODEL["digest"], 0, 0.0)
    both = take(store, *(Label(row, None, result[row]) for row in range(61, 101)))
    assert both.model is not None
    assert (both.model.to_dict(), both.other_bundle_labels) == (
        {"name": MODEL["name"], "version": "9.9.9", "digest": "sha256:99"},
        60,
    )
    assert (both.metrics[0].value, both.metrics[0].n) == (1.0, 40)


def test_a_device_that_publishes_some_results_gives_a_biased_sample(store: FleetStore) -> None:
    assert take(store, Label(1, None, "PEN")).sparse_warning is None
    columns = {"row": [70, 90], "t": [70, 90], "label": ["PEN", "ABD"], "score": [0.4, 0.5]}
    store.ingest([Arrival(SENDER.verify(SENDER.results(60, rows_at=(61, 120), columns=columns)))], [], NOW)
    outcome = take(store, Label(70, None, "PEN"))
    assert outcome.sparse_warning is not None
    assert outcome.sparse_warning.startswith("the device publishes 62 of 120 results of this bundle")
