"""A simulated device with a model of three outputs, and its collector: results, labels, quality and drift of each."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from outstation.device import newest
from outstation.device.cli.data import results
from outstation.device.intake import label_intake as intake
from outstation.device.pipeline import label_metrics, labelled_output
from outstation.device.store import predictions
from outstation.device.store.predictions import output_key
from outstation.fleet.cli import drift_report
from outstation.fleet.dashboard.pages import device as page
from outstation.fleet.database.dashboard import results as result_statements
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift.survey import summarize_drift
from outstation.fleet.labelling import given_labels
from outstation.ml.performance.labels import Label
from outstation.protocol.wire.messages import QualityPayload
from tests.kit import multi_output_device
from tests.kit.devices import DEVICE, NOW, Device

FLAGS, WEAR, STATE = "flags", "wear", ""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """Return a device whose air became restless, so that wear drifts, with labels of each output."""
    folder = tmp_path_factory.mktemp("device")
    made = multi_output_device.make_device(folder / "store", multi_output_device.pack_bundle(folder))
    for seed in range(6):
        multi_output_device.feed(made, seed, 800)
    for seed in range(6, 10):
        multi_output_device.feed(made, seed, 800, restless_air)
    for output in (STATE, WEAR, FLAGS):
        label_newest(made, output)
    label_metrics.tick(made.task, made.store, made.author, NOW, 86_400.0)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def collected(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetStore]:
    store = FleetStore(tmp_path_factory.mktemp("fleet") / "fleet.db")
    store.enrol("pi-07", DEVICE.public, replace=False, now="2026-11-28T12:00:00Z")
    arrived = [Arrival(message) for message in device.messages()]
    assert set(store.ingest(arrived, [], "2026-11-28T12:00:00Z")) == {"new"}
    yield store
    store.close()


def restless_air(count: int, seed: int) -> NDArray[np.float32]:
    return np.resize(np.array([-4, 0, 4], "<f4"), count)


def newest_labels(device: Device, output: str) -> list[tuple[int, str]]:
    """Return row and label of 100 results: classes as predicted but for every fourth, numbers 0.5 too high."""
    schema = device.task.bundle.manifest.label_schemas[output]
    [batch, *_] = device.store.query(predictions.load_newest_predictions, output_key("tiny", output), 1)
    codes = 4 if schema.kind == "several" else len(schema.labels)
    texts: list[str] = []
    for i in range(100):
        if batch.value is not None:
            texts.append(str(float(batch.value[i]) + 0.5))
        elif batch.predicted_class is not None:
            texts.append(schema.format_class((int(batch.predicted_class[i]) + (i % 4 == 0)) % codes))
    return list(zip(batch.row[:100].tolist(), texts, strict=True))


def label_newest(device: Device, output: str) -> None:
    rows, texts = zip(*newest_labels(device, output), strict=True)
    columns = {"row": [*rows], "label": [*texts], "output": [output] * len(rows)}
    with device.store.transaction() as tx:
        target = labelled_output.build_label_targets([device.task])["tiny"]
        assert intake.store_labels(tx, target, intake.parse_columns("tiny", columns), NOW) == {}


def test_each_result_has_the_answers_of_all_outputs_on_the_device_and_at_the_collector(
    device: Device, collected: FleetStore
) -> None:
    [shown] = newest.read_results(device.store, "tiny", 1).rows
    assert shown["label_flags"] in ("hot", "wet", "hot|wet", "-")
    assert isinstance(shown["value_wear"], float)
    notes = results._to_cells(shown)[-1]
    assert f"label_flags {shown['label_flags']}" in notes
    with collected.snapshot() as db:
        [row] = result_statements.load_newest(db, "pi-07", "tiny", 1)
        stored = json.loads(result_statements.load_outputs(db, "pi-07", [row])[row[0]])
    assert (stored["label_flags"], stored["value_wear"]) == (shown["label_flags"], shown["value_wear"])


def test_the_collector_has_the_quality_of_each_output(collected: FleetStore) -> None:
    assert collected.newest_metric("pi-07", "accuracy") == 0.75
    assert collected.newest_metric("pi-07", "accuracy", FLAGS) == 0.75
    assert collected.newest_metric("pi-07", "mae", WEAR) == pytest.approx(0.5, abs=1e-4)
    with collected.snapshot() as db:
        [(log,)] = db.execute("SELECT DISTINCT log FROM quality_messages").fetchall()
        shown = page._load_quality(db, "pi-07", log, "tiny")
    assert [entry["output"] for entry in shown] == [STATE, FLAGS, WEAR]


@pytest.mark.parametrize("output", [STATE, FLAGS])
def test_labels_at_the_collector_give_the_metrics_of_the_device(
    device: Device, collected: FleetStore, output: str
) -> None:
    message = next(
        message.body
        for message in device.messages()
        if isinstance(message.body, QualityPayload) and message.body.output == output
    )
    given = [Label(row, None, text, output=output) for row, text in newest_labels(device, output)]
    with collected.transaction() as db:
        outcome = given_labels.add(db, "pi-07", "tiny", given, "2026-11-28T13:00:00Z", "eva")
    metrics = (outcome.further[output] if output else outcome).metrics
    assert outcome.rejected == {}
    assert len(metrics) >= 3
    for computed, sent in zip(metrics, message.metrics, strict=True):
        assert (computed.metric, computed.slice, computed.n) == (sent.metric, sent.slice, sent.n)
        # Scores and values are rounded in messages.
        expected = [sent.value, sent.low, sent.high]
        assert [computed.value, computed.low, computed.high] == pytest.approx(expected, abs=0.01)
    assert collected.newest_metric("pi-07", metrics[0].metric, output) is not None


def test_fleet_drift_names_the_output_that_drifts_and_those_that_do_not(collected: FleetStore) -> None:
    survey = summarize_drift(collected, task="tiny", since=None, now_us=NOW.wall_us)
    document = drift_report.build_document(survey, None, {})
    [group] = document["tasks"]
    assert group["outputs"] == {FLAGS: {"ok": ["pi-07"]}, WEAR: {"drift": ["pi-07"]}}
    assert "output.wear" in {onset["field"] for onset in group["onsets"]}
    lines = list(drift_report.format_lines(document))
    assert "  output wear: drift on pi-07" in lines
    assert "  output flags: ok" in lines
