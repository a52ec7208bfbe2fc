"""Labels of several outputs at the collector: each quality message counts for its own output."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outstation.evidence.gather.accuracy import AccuracyCollector, select_headline
from outstation.fleet.database.dashboard import history
from outstation.fleet.database.evidence import EvidenceQueries
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.labelling import candidates
from outstation.fleet.database.labelling import verdicts as verdict_tables
from outstation.fleet.database.store import FleetStore
from outstation.fleet.labelling import feedback_loops, given_labels
from outstation.fleet.labelling.given_labels import LabelOutcome
from outstation.ml.performance.labels import Label
from outstation.protocol.wire.messages import QualityPayload
from outstation.workbench.testing.messages import MODEL as MODEL_OF_RESULTS
from outstation.workbench.testing.messages import MessageSender, SignedMessage
from tests.kit.dashboards import enrolled

NOW = "2026-11-28T12:00:00Z"
MODEL = {"name": "exercise", "version": "1.0", "digest": "sha256:01"}


def metric(name: str, value: float) -> dict[str, Any]:
    return {"metric": name, "value": value, "low": value - 0.01, "high": value + 0.01, "n": 100, "slice": ""}


@pytest.fixture
def sender(store: FleetStore) -> MessageSender:
    return enrolled(store, "pi-07", 7)


def send(store: FleetStore, sender: MessageSender) -> list[QualityPayload]:
    """Send the metrics of three outputs of one model, and return the messages."""
    sent = [sender.results()]
    for output, name, value in (("", "accuracy", 0.9), ("wear", "mae", 0.25), ("flags", "accuracy", 0.4)):
        members = {"output": output} if output else {}
        sent.append(sender.append("quality", task=sender.task, model=MODEL, metrics=[metric(name, value)], **members))
    verified = [sender.verify(item) for item in sent]
    assert set(store.ingest([Arrival(item) for item in verified], [], NOW)) == {"new"}
    return [item.body for item in verified if isinstance(item.body, QualityPayload)]


def test_the_metrics_of_one_output_are_not_those_of_another(store: FleetStore, sender: MessageSender) -> None:
    send(store, sender)
    assert store.newest_metric("pi-07", "accuracy") == 0.9
    assert store.newest_metric("pi-07", "accuracy", "flags") == 0.4
    assert store.newest_metric("pi-07", "mae", "wear") == 0.25
    assert store.newest_metric("pi-07", "mae") is None


def test_the_evidence_lists_the_accuracy_of_each_output(store: FleetStore, sender: MessageSender) -> None:
    collector = AccuracyCollector({"pi-07": sender.log})
    for body in send(store, sender):
        collector.add(body)
    headlines = {entry.output: select_headline(entry) for entry in collector.build_entries([], {})}
    assert {name: (each.metric, each.value) for name, each in headlines.items() if each is not None} == {
        "": ("accuracy", 0.9),
        "wear": ("mae", 0.25),
        "flags": ("accuracy", 0.4),
    }


LABEL_NAMES = ("PEN", "ABD", "FEL")
FURTHER = {"kind": "classify", "labels": ["new", "worn", "broken"], "threshold": None}


def results(sender: MessageSender, n: int = 40) -> SignedMessage:
    """Return results of a model with the further outputs wear (classes), flags (anomalies) and heat (numbers)."""
    columns = {
        "row": [*range(1, n + 1)],
        "t": [1_764_022_680_000_000 + row for row in range(n)],
        "label": ["PEN"] * n,
        "score": [0.9] * n,
        "label_wear": ["worn" if row % 2 else "new" for row in range(n)],
        "score_wear": [0.8] * n,
        "label_flags": ["normal"] * n,
        "value_flags": [0.25 if row % 2 else 0.75 for row in range(n)],
        "value_heat": [float(row) for row in range(n)],
    }
    return sender.results(n, rows_at=(1, n), columns=columns)


def activated(sender: MessageSender, **outputs: Any) -> SignedMessage:
    to = {name: MODEL_OF_RESULTS[name] for name in ("name", "version", "digest")}
    evidence = {"task": sender.task, "from": None, "to": to, "why": "configured", **FURTHER, "labels": LABEL_NAMES}
    return sender.append("audit", event="activated", summary="", evidence={**evidence, "outputs": outputs})


def ingest(store: FleetStore, sender: MessageSender, *sent: SignedMessage) -> None:
    assert set(store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW)) == {"new"}


def add(store: FleetStore, sender: MessageSender, *given: Label) -> LabelOutcome:
    with store.transaction() as db:
        return given_labels.add(db, "pi-07", sender.task, given, NOW, "ada")


def ask(store: FleetStore, sql: str) -> list[Any]:
    with store.snapshot() as db:
        return db.execute(sql).fetchall()


def test_each_output_of_a_row_has_its_label_and_its_metrics(store: FleetStore, sender: MessageSender) -> None:
    ingest(store, sender, results(sender))
    given = [Label(row, None, "PEN") for row in (1, 2)]
    given += [Label(row, None, "worn", output="wear") for row in range(1, 41)]
    given += [Label(row, None, str(row), output="heat") for row in range(1, 41)]
    outcome = add(store, sender, *given)
    assert (outcome.rejected, outcome.accepted, outcome.sources) == ({}, 82, {"human": 2})
    values = {
        name: {each.metric: each.value for each in evaluated.metrics} for name, evaluated in outcome.further.items()
    }
    assert (values["wear"]["accuracy"], values["heat"]["mae"]) == (0.5, 1.0)
    assert ask(store, "SELECT output, n FROM metrics WHERE metric IN ('accuracy', 'mae') ORDER BY output") == [
        ("", 2),
        ("heat", 40),
        ("wear", 40),
    ]
    again = add(store, sender, Label(1, None, "new", output="wear"), Label(1, None, "PEN", output=""))
    assert again.replaced == 1
    assert ask(store, "SELECT output, label FROM labels WHERE row = 1 ORDER BY output") == [
        ("", "PEN"),
        ("heat", "1"),
        ("wear", "new"),
    ]


def test_labels_that_the_further_output_does_not_know_are_rejected(store: FleetStore, sender: MessageSender) -> None:
    ingest(store, sender, results(sender))
    outcome = add(
        store,
        sender,
        Label(1, None, "broken", output="wear"),
        Label(1, None, "hot", output="heat"),
        Label(1, None, "worn", output="tear"),
        Label(1, None, "PEN", output="wear"),
        Label(1, None, "worn"),
    )
    assert outcome.accepted == 0
    assert "it knows new, worn, as inferred from its results" in outcome.rejected[0]
    assert "no finite number" in outcome.rejected[1]
    assert "has no further output 'tear'" in outcome.rejected[2]
    assert ask(store, "SELECT count(*) FROM labels") == ask(store, "SELECT count(*) FROM metrics") == [(0,)]


def test_a_device_declares_the_labels_of_its_further_outputs(store: FleetStore, sender: MessageSender) -> None:
    flags = {"kind": "anomaly", "labels": [], "threshold": 0.5}
    ingest(store, sender, activated(sender, wear=FURTHER, flags=flags), results(sender))
    given = [Label(row, None, "anomaly" if row % 2 else "normal", output="flags") for row in range(1, 41)]
    outcome = add(store, sender, *given, Label(1, None, "broken", output="wear"), Label(1, None, "1", output="heat"))
    # Not declared, although a column of the results has its name.
    assert {*outcome.rejected} == {41}
    metrics = {each.metric: each.value for each in outcome.further["flags"].metrics}
    assert metrics["auc"] == 1.0
    assert ask(store, "SELECT label FROM labels WHERE output = 'wear'") == [("broken",)]


def test_what_people_see_of_first_outputs_ignores_labels_of_others(store: FleetStore, sender: MessageSender) -> None:
    ingest(store, sender, results(sender))
    add(store, sender, *(Label(row, None, "worn", output="wear") for row in range(1, 41)))
    key = ("pi-07", sender.task, sender.log)
    with store.snapshot() as db:
        assert candidates.load_labelled_rows(db, key, 1) == set()
        assert candidates.count_classes(db, key) == {}
        assert verdict_tables.compare_with_scores(db) == []
        assert {each["output"] for each in history.load_collector_metrics(db, "pi-07", sender.task)} == {"wear"}
        queries = EvidenceQueries(store, db)
        entries = AccuracyCollector({}).build_entries(queries.load_collector_metrics(), queries.count_labels())
    assert {entry.output: entry.labels for entry in entries} == {"wear": {"human": 40}}


def test_answers_of_the_model_as_labels_of_a_further_output_are_a_loop(
    store: FleetStore, sender: MessageSender
) -> None:
    ingest(store, sender, results(sender))
    add(store, sender, *(Label(row, None, "worn", "model", output="wear") for row in range(1, 41)))
    with store.snapshot() as db:
        [loop] = feedback_loops.find(db)
    assert (loop["kind"], loop["output"], loop["n"]) == ("own_answers", "wear", 40)


def test_a_command_for_the_device_names_the_outputs() -> None:
    given = [Label(1, None, "PEN"), Label(1, None, "0.5", output="wear")]
    [(_, _, columns)] = given_labels.split_labels(given)
    assert json.loads(columns)["output"] == ["", "wear"]
    [(_, _, columns)] = given_labels.split_labels(given[:1])
    assert "output" not in json.loads(columns)
