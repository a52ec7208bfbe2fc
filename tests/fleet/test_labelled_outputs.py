"""Labels of several outputs at the collector: each quality message counts for its own output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.fleet.database.ingest import Arrival
from agent.fleet.database.store import FleetStore
from agent.fleet.evidence.gather.accuracy import AccuracyCollector, select_headline
from agent.fleet.labelling import labels
from agent.performance.labels import Label
from agent.testing.messages import MessageSender
from agent.wire.messages import QualityPayload
from tests.kit.dashboards import enrolled

NOW = "2026-11-28T12:00:00Z"
MODEL = {"name": "exercise", "version": "1.0", "digest": "sha256:01"}


def metric(name: str, value: float) -> dict[str, Any]:
    return {"metric": name, "value": value, "low": value - 0.01, "high": value + 0.01, "n": 100, "slice": ""}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FleetStore]:
    opened = FleetStore(tmp_path / "fleet.db")
    yield opened
    opened.close()


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


def test_labels_of_a_further_output_are_for_the_device_alone(store: FleetStore, sender: MessageSender) -> None:
    send(store, sender)
    given = [Label(1, None, "PEN"), Label(1, None, "0.5", output="wear")]
    with store.transaction() as db:
        outcome = labels.add(db, "pi-07", sender.task, given, NOW, "ada")
    assert outcome.accepted == 1
    assert "send it there (--send)" in outcome.rejected[1]
    [(_, _, columns)] = labels.split_labels(given)
    assert json.loads(columns)["output"] == ["", "wear"]
    [(_, _, columns)] = labels.split_labels(given[:1])
    assert "output" not in json.loads(columns)
