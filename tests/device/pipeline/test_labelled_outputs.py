"""Labels of further outputs: each is stored and evaluated with its own output, from intake to the signed message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from outstation.device import prometheus_metrics, status
from outstation.device.batch_parts.batch_part import Batch
from outstation.device.batch_parts.label_part import LabelPart
from outstation.device.bundles import history
from outstation.device.capacity.space import SpaceManager
from outstation.device.config.config import Config
from outstation.device.config.device import BufferConfig, DeviceConfig
from outstation.device.intake import label_intake as intake
from outstation.device.pipeline import label_metrics, labelled_output
from outstation.device.store import label_store, predictions
from outstation.device.store.message_log import PendingMessage
from outstation.device.store.predictions import output_key
from outstation.foundation.clock import ClockReading
from outstation.foundation.config.quantities import Duration
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.performance.labels import parse_label
from outstation.protocol.alerts import kinds
from outstation.protocol.wire.messages import AlertPayload, AuditPayload, DriftPayload, QualityPayload
from scripts.kit.bundles import waves
from tests.kit import multi_output_device
from tests.kit.devices import NOW, Device

KEEP_S = 7 * 86_400.0


def send(device: Device, *columns: Any, by: str = "") -> dict[int, str]:
    """Send labels, each (row, label, output); return position → reason of those that were rejected."""
    target = labelled_output.build_label_targets([device.task])["tiny"]
    rows, texts, names = zip(*columns, strict=True)
    batch = intake.parse_columns("tiny", {"row": [*rows], "label": [*texts], "output": [*names]})
    with device.store.transaction() as tx:
        return intake.store_labels(tx, target, replace(batch, by=by), NOW)


def answers(device: Device, output: str) -> dict[int, Any]:
    """Return row → predicted class, or value, of the stored predictions of an output."""
    key = output_key("tiny", output)
    known: dict[int, Any] = {}
    for stored in device.store.query(predictions.load_newest_predictions, key, 100):
        column: Any = stored.value if stored.value is not None else stored.predicted_class
        known |= dict(zip(stored.row.tolist(), column.tolist(), strict=True))
    return known


def truth_of(device: Device, output: str, change: Callable[[Any], Any] = lambda answer: answer) -> list[Any]:
    """Return a label for each result of an output: its answer, changed."""
    schema = device.task.bundle.manifest.label_schemas[output]
    is_class = bool(schema.class_names)
    return [
        (row, schema.format_class(int(change(answer))) if is_class else float(change(answer)), output or None)
        for row, answer in sorted(answers(device, output).items())
    ]


def tick(device: Device, now: ClockReading = NOW) -> int:
    return label_metrics.tick(device.task, device.store, device.author, now, KEEP_S)


def quality(device: Device) -> dict[str, QualityPayload]:
    """Return the newest quality message of each output."""
    bodies = [message.body for message in device.messages()]
    return {body.output: body for body in bodies if isinstance(body, QualityPayload)}


def test_labels_of_three_outputs_give_the_metrics_of_each(outputs_device: Device) -> None:
    multi_output_device.feed(outputs_device, 1, 1200)
    labels = [
        *truth_of(outputs_device, ""),
        *truth_of(outputs_device, "wear", lambda value: value + 0.5),
        *truth_of(outputs_device, "flags"),
    ]
    assert send(outputs_device, *labels) == {}
    tick(outputs_device)
    by_output = quality(outputs_device)
    assert by_output.keys() == {"", "wear", "flags"}
    numbers = {
        name: {metric.metric: metric for metric in body.metrics if not metric.slice} for name, body in by_output.items()
    }
    assert numbers[""]["accuracy"].value == 1
    assert numbers["flags"]["accuracy"].value == 1
    assert numbers["wear"]["mae"].value == pytest.approx(0.5, abs=1e-4)
    assert "accuracy" not in numbers["wear"]
    assert by_output["flags"].labels["classes"].keys() <= {"hot", "wet", "other"}


def test_status_and_prometheus_show_the_quality_of_each_output(
    outputs_device: Device, packed: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, content in packed.files.items():
        (folder / name).write_bytes(content)
    multi_output_device.feed(outputs_device, 1, 1200)
    send(outputs_device, *truth_of(outputs_device, "wear", lambda value: value - 2), *truth_of(outputs_device, "")[:7])
    tick(outputs_device)
    tasks = {"tiny": replace(outputs_device.task.config, bundle=str(folder))}
    conf = Config(DeviceConfig("pi-07", "acme"), streams={"watch": outputs_device.stream}, tasks=tasks)
    task = status.build_task_document(conf, outputs_device.store, "tiny")
    assert task["labels"]["truth"] == 7
    assert task["outputs"].keys() == {"flags", "wear"}
    assert task["outputs"]["flags"] == {"labels": dict.fromkeys(task["labels"], 0), "quality": None}
    assert task["outputs"]["wear"]["labels"]["truth"] == len(answers(outputs_device, "wear"))
    [mae] = [each for each in task["outputs"]["wear"]["quality"]["metrics"] if each["metric"] == "mae"]
    assert mae["value"] == pytest.approx(2, abs=1e-4)
    families = {family.name: family.samples for family in prometheus_metrics._build_task_families({"tasks": [task]})}
    assert ({"task": "tiny", "output": "wear", "metric": "mae"}, mae["low"]) in families["outstation_task_quality_low"]
    assert ({"task": "tiny", "kind": "truth"}, 7) in families["outstation_task_labels"]


def test_labels_of_an_output_that_are_wrong_ever_more_often_raise_an_alert_that_names_it(
    outputs_device: Device,
) -> None:
    for seed in range(3):
        multi_output_device.feed(outputs_device, seed, 1200)
    labels = truth_of(outputs_device, "wear", lambda value: value + 0.1)
    early, late = labels[: len(labels) // 2], labels[len(labels) // 2 :]
    send(outputs_device, *early, *((row, value + 5, output) for row, value, output in late))
    send(outputs_device, *truth_of(outputs_device, ""))
    assert tick(outputs_device) >= 1
    [alert] = [message.body for message in outputs_device.messages() if isinstance(message.body, AlertPayload)]
    assert (alert.alert, alert.subject, alert.id) == ("quality", "wear/decay", "tiny/quality/wear/decay/1")
    assert alert.summary.startswith("output wear: the error grew")
    assert alert.evidence["output"] == "wear"
    assert kinds.find_kind("quality", alert.subject, alert.id, "tiny", from_collector=False) is kinds.DECAY


@pytest.mark.parametrize(
    ("label", "output", "why"),
    [
        ("1.5", "weer", "no further output 'weer'; did you mean 'wear'"),
        ("hot", "wear", "no finite number"),
        ("1.5", "flags", "knows any of hot|wet"),
        ("hot", None, "it knows "),
        ("hot", 7, "is no name of an output"),
        ("hot", "../flags", "is no name of an output"),
    ],
)
def test_a_label_that_its_output_cannot_have_is_refused(
    outputs_device: Device, label: str, output: Any, why: str
) -> None:
    multi_output_device.feed(outputs_device, 1, 200)
    row = min(answers(outputs_device, ""))
    [reason] = send(outputs_device, (row, label, output)).values()
    assert why in reason
    assert outputs_device.store.query(label_store.count_labels, "tiny") == label_store.LabelCounts()


def test_a_label_that_arrives_before_its_result_joins_that_of_its_output(outputs_device: Device) -> None:
    outputs_device.feed(waves(200))
    assert send(outputs_device, (96, "3.25", "wear"), (96, "hot|wet", "flags")) == {}
    assert outputs_device.store.query(label_store.count_labels, output_key("tiny", "wear")).waiting == 1
    with outputs_device.store.transaction() as tx:
        air = multi_output_device.still_air(20, 1)
        tx.append("weather", multi_output_device.air_rows(air), "synced")
    outputs_device.run_all()
    tick(outputs_device)
    for output, text in (("wear", "3.25"), ("flags", "hot|wet")):
        stored = outputs_device.store.query(label_store.load_label_texts, output_key("tiny", output), 1)
        assert stored == {96: (text, "human")}


def test_a_flood_of_early_labels_of_one_output_counts_against_the_limit_of_the_task(
    outputs_device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outstation.device.store.label_store.MAX_OPEN_EARLY_LABELS", 3)
    outputs_device.feed(waves(200))
    refused = send(outputs_device, *((row, "1", "wear") for row in range(100, 103)), (104, "hot", "flags"))
    assert list(refused) == [3]
    assert send(outputs_device, (104, "hot", "flags"), by="ada") == {}


def drop_wear(device: Device) -> None:
    """Run a bundle without the output `wear`."""
    manifest = device.task.bundle.manifest
    further = {"flags": manifest.further["flags"]}
    bundle = replace(device.task.bundle, manifest=replace(manifest, outputs=further), digest="sha256:next")
    device.assemble(None if device.task.drift is None else device.task.drift.to_restored(), bundle)


def test_early_labels_of_an_output_that_the_bundle_dropped_give_up_their_places(
    outputs_device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outstation.device.store.label_store.MAX_OPEN_EARLY_LABELS", 3)
    outputs_device.feed(waves(200))
    assert send(outputs_device, *((row, "1", "wear") for row in (100, 104, 108))) == {}
    assert send(outputs_device, (96, "hot", "flags")) == {
        0: "3 labels already wait for their results; run the task first"
    }
    drop_wear(outputs_device)
    tick(outputs_device)
    wear = output_key("tiny", "wear")
    assert outputs_device.store.query(label_store.count_labels, wear) == label_store.LabelCounts()
    assert outputs_device.store.counters()[f"labels unmatched.{wear}"] == 3
    assert send(outputs_device, (96, "hot", "flags")) == {}


def test_an_early_label_of_a_dropped_output_joins_the_result_that_is_there(outputs_device: Device) -> None:
    outputs_device.feed(waves(200))
    assert send(outputs_device, (96, "3.25", "wear")) == {}
    with outputs_device.store.transaction() as tx:
        tx.append("weather", multi_output_device.air_rows(multi_output_device.still_air(20, 1)), "synced")
    outputs_device.run_all()
    drop_wear(outputs_device)
    tick(outputs_device)
    stored = outputs_device.store.query(label_store.load_label_texts, output_key("tiny", "wear"), 1)
    assert stored == {96: ("3.25", "human")}


def test_early_labels_expire_where_no_result_is_stored(outputs_device: Device) -> None:
    outputs_device.feed(waves(200))
    assert send(outputs_device, (96, "3.25", "wear")) == {}
    tick(outputs_device, ClockReading(NOW.wall_us, NOW.boot_s + KEEP_S - 1, "synced"))
    assert outputs_device.store.query(label_store.count_labels, output_key("tiny", "wear")).waiting == 1
    tick(outputs_device, ClockReading(NOW.wall_us, NOW.boot_s + KEEP_S + 2, "synced"))
    assert outputs_device.store.query(label_store.count_labels, output_key("tiny", "wear")).waiting == 0


def test_labels_of_the_first_output_may_take_the_whole_capacity(
    outputs_device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    multi_output_device.feed(outputs_device, 1, 1200)
    assert send(outputs_device, *truth_of(outputs_device, "")) == {}
    count = outputs_device.store.query(label_store.count_labels, "tiny").truth
    monkeypatch.setattr("outstation.device.store.label_store.MAX_LABELS", count)
    monkeypatch.setattr("outstation.device.store.label_store._MIN_OUTPUT_LABELS", 1)
    tasks = {"tiny": outputs_device.task.config}
    conf = Config(DeviceConfig("pi-07", "acme"), streams={"watch": outputs_device.stream}, tasks=tasks)
    SpaceManager(conf, outputs_device.store, outputs_device.author, lambda _: None, set).tick(NOW)
    assert outputs_device.store.query(label_store.count_labels, "tiny").truth == count > 200


def test_old_predictions_and_labels_of_every_output_are_deleted(outputs_device: Device) -> None:
    multi_output_device.feed(outputs_device, 1, 400)
    send(outputs_device, *truth_of(outputs_device, "wear"))
    conf = Config(
        DeviceConfig("pi-07", "acme"),
        buffer=BufferConfig(keep_results=Duration(60)),
        streams={"watch": outputs_device.stream},
        tasks={"tiny": outputs_device.task.config},
    )
    space = SpaceManager(conf, outputs_device.store, outputs_device.author, lambda _: None, set)
    later = ClockReading(NOW.wall_us + 10**9, NOW.boot_s + 1000, "synced")
    space.tick(later)
    assert [answers(outputs_device, name) for name in ("", "wear", "flags")] == [{}, {}, {}]
    assert outputs_device.store.query(predictions.list_stored_outputs, "tiny") == ["", "wear"], "labels stay"


@pytest.mark.parametrize("min_count", [1, 100_000])
def test_alerts_about_an_output_clear_once_the_bundle_has_no_such_output(
    outputs_device: Device, min_count: int
) -> None:
    # With the higher count all metrics are withheld.
    outputs_device.author = replace(outputs_device.author, min_count=min_count)
    for seed in range(3):
        multi_output_device.feed(outputs_device, seed, 1200)
    labels = truth_of(outputs_device, "wear")
    half = len(labels) // 2
    send(outputs_device, *labels[:half], *((row, value + 5, output) for row, value, output in labels[half:]))
    tick(outputs_device)
    assert [alert["subject"] for alert in outputs_device.store.open_alerts("tiny")] == ["wear/decay"]
    assert ("wear" in quality(outputs_device)) == (min_count == 1)
    drop_wear(outputs_device)
    assert tick(outputs_device) == 1
    assert outputs_device.store.open_alerts("tiny") == []
    assert tick(outputs_device) == 0


def test_a_label_names_its_output() -> None:
    assert parse_label(3, None, "1.5", output="wear").output == "wear"
    assert parse_label(3, None, "1.5").output == ""


def test_an_activation_describes_the_labels_of_each_output(outputs_device: Device) -> None:
    with outputs_device.store.transaction() as tx:
        history.record_activation(
            tx, outputs_device.author, "tiny", outputs_device.task.bundle, None, "configured", NOW
        )
    body = outputs_device.messages()[-1].body
    assert isinstance(body, AuditPayload)
    assert body.evidence["outputs"] == {
        "flags": {"kind": "several", "labels": ["hot", "wet"], "threshold": None},
        "wear": {"kind": "regress", "labels": [], "threshold": None},
    }


@pytest.fixture
def erring(tmp_path: Path, packed: Bundle) -> Iterator[Device]:
    made = multi_output_device.make_device(tmp_path / "erring", multi_output_device.with_held_out_errors(packed))
    yield made
    made.store.close()


def expected_mae(device: Device) -> float:
    return device.drift.monitor.shipped.error_references["wear"].mean


def test_labels_of_a_number_give_the_error_to_expect_and_the_true_one_of_the_same_results(erring: Device) -> None:
    multi_output_device.feed(erring, 1, 1200)
    usual = expected_mae(erring)
    send(erring, *truth_of(erring, "wear", lambda value: value + usual), *truth_of(erring, ""))
    tick(erring)
    body = quality(erring)["wear"]
    [mae] = [metric for metric in body.metrics if metric.metric == "mae" and not metric.slice]
    assert body.estimate is not None
    assert (body.estimate["method"], body.estimate["outside"], mae.n) == ("dle", False, body.window["n"])
    assert body.estimate["mae_low"] < mae.value < body.estimate["mae_high"]
    assert quality(erring)[""].estimate is None, "its scores have no held-out labels"


def test_an_error_to_expect_that_labels_contradict_says_so(erring: Device) -> None:
    multi_output_device.feed(erring, 1, 1200)
    usual = expected_mae(erring)
    send(erring, *truth_of(erring, "wear", lambda value: 1.2 * value + 5 * usual))
    tick(erring)
    estimate = quality(erring)["wear"].estimate
    assert estimate is not None
    assert estimate["outside"] is True
    multi_output_device.feed(erring, 2, 1200)
    drift = [message.body for message in erring.messages() if isinstance(message.body, DriftPayload)]
    first, last = (body.output["further"]["wear"]["estimate"] for body in (drift[0], drift[-1]))
    assert "outside" not in first
    assert last["outside"] is True


def test_no_error_is_expected_of_results_that_an_earlier_version_stored(
    erring: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LabelPart.compute

    def forget(part: LabelPart, batch: Batch, results: InferenceResult) -> Iterable[PendingMessage]:
        batch.error_bins = {}
        return real(part, batch, results)

    monkeypatch.setattr(LabelPart, "compute", forget)
    multi_output_device.feed(erring, 1, 600)
    monkeypatch.undo()
    multi_output_device.feed(erring, 2, 600)
    send(erring, *truth_of(erring, "wear", lambda value: value + 1))
    tick(erring)
    assert quality(erring)["wear"].estimate is None
