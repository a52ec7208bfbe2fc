"""Samples of joined models: an exported set, evaluated through its joins, gives the bits that the device computed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.device import config
from outstation.device.batch_parts.joined_streams import JoinedStream
from outstation.device.config.samples import SamplesConfig
from outstation.device.samples import requests
from outstation.device.samples.rounding import EXACT_DIGITS
from outstation.device.store.rows import Rows
from outstation.fleet import config as fleet_config
from outstation.fleet.audit.audit import audit
from outstation.fleet.cli.group import fleet
from outstation.fleet.collector import encryption_keys
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.dataset import data_files
from outstation.fleet.dataset.gather import Gathered, Recording
from outstation.fleet.dataset.joined import JoinedRows
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.fleet.labelling import given_labels
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle import bundle
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.ml.performance.labels import Label
from outstation.protocol.transport import sample_content
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.wire.privacy import least_count
from outstation.protocol.wire.privacy.field_privacy import FieldPrivacy
from outstation.workbench.authoring import pack
from outstation.workbench.cli.model.group import model as model_command
from outstation.workbench.evaluation import examples
from outstation.workbench.testing.messages import FLEET
from scripts.kit.bundles import KEY, WINDOW, WINDOWED, Recipe, waves, write_joined_spec
from tests.kit.devices import DEVICE, T0
from tests.kit.sampled_devices import LATER, SampledDevice
from tests.kit.shadow_devices import Recorder

CONSENT = SamplesConfig(consent="Mira Lang, 2026-11-28: exact readings", digits=EXACT_DIGITS, windows=3)
WEATHER_STEP_US, TIME = 310_000, "2026-11-25T12:00:00.000000Z"
STEP = 4


@pytest.fixture
def home(tmp_path: Path) -> Path:
    init_fleet(tmp_path / "home", FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    pack.write_bundle(pack.pack(write_joined_spec(folder), KEY), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def device(tmp_path: Path, home: Path, packed: Path) -> Iterator[SampledDevice]:
    loaded = bundle.read(packed, [KEY.public])
    air = config.StreamConfig(fields=[config.FieldConfig(name=name) for name in ("other", "air")])
    made = SampledDevice(
        tmp_path / "store",
        Recipe("classify", "joined_int8", fields=WINDOWED),
        LoadedBundle(loaded, None, None, runtime.load_model(loaded.manifest, loaded.model_bytes)),
        joined_streams={"weather": JoinedStream("weather", air, 10.0)},
    )
    consent(made, home)
    yield made
    made.store.close()


def consent(device: SampledDevice, home: Path, config: SamplesConfig = CONSENT) -> None:
    key = encryption_keys.load_public(home)
    assert key is not None
    device.consent(config, key)


def feed_air(device: SampledDevice, times_us: NDArray[np.int64], values: NDArray[np.float32]) -> None:
    with device.store.transaction() as tx:
        tx.append("weather", Rows(T0 + times_us, (np.zeros(len(values), "<f4"), values)), "synced")


def run_in_pieces(device: SampledDevice, seed: int) -> dict[int, bytes]:
    """Feed rows and weather in pieces; return the outputs of each result by row, as bits.

    Every sixth row of weather has no value, and some come late: long after rows of a later time.
    """
    random, rows, weather = np.random.default_rng(seed), waves(900, seed), waves(60, seed + 1)[:, 0].copy()
    weather[5::6] = np.nan
    times = np.arange(60) * WEATHER_STEP_US
    times[[12, 20, 21]] -= 2 * WEATHER_STEP_US
    observed: list[tuple[Any, InferenceResult]] = []
    device.task.attach(Recorder(observed))
    at = air = 0
    while at < len(rows) or air < len(weather):
        if random.random() < 0.6:
            count = int(random.integers(1, 120))
            if len(rows[at : at + count]):
                device.feed(rows[at : at + count])
            at += count
        else:
            count = int(random.integers(1, 5))
            if len(piece := weather[air : air + count]):
                feed_air(device, times[air : air + count], piece)
            air += count
        device.run_all()
    return {
        int(row): bits(result, index)
        for batch, result in observed
        for index, row in enumerate(result.cut.starts + WINDOW - 1 + batch.first)
    }


def bits(result: InferenceResult, index: int) -> bytes:
    score, extra = result.scores.score, result.scores.extra_columns
    assert score is not None
    return np.array([score[index], *(extra[name][index] for name in sorted(extra))], np.float64).tobytes()


def sample(device: SampledDevice, home: Path, rows: list[int], later_s: float = 0.0) -> FleetStore:
    """Ask for samples around results, and store all messages of the device in the fleet."""
    assert device.task.samples is not None
    with device.store.transaction() as tx:
        requests.add(tx, "tiny", [device.task.samples.request("requested", row, 1) for row in rows])
    for tick in range(2):
        device.send(replace(LATER, boot_s=LATER.boot_s + later_s + 3 * tick))
    store = FleetStore(fleet_config.load(home).fleet.db)
    store.enrol("pi-07", DEVICE.public, replace=False, now=TIME)
    store.ingest([Arrival(message) for message in device.messages()], [], TIME)
    return store


def export(home: Path, out: Path, *arguments: str) -> dict[str, Any]:
    command = ["dataset", "export", "--task", "tiny", "--out", str(out), "--json", "--dir", str(home), *arguments]
    done = CliRunner().invoke(fleet, command)
    assert done.exit_code == 0, f"{done.output}{done.exception}"
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def predict(device: SampledDevice, out: Path) -> dict[int, bytes]:
    """Return the outputs of each window of an exported set, by the row of the device's stream."""
    inference = Inference(device.active.bundle.manifest, device.active.model)
    dataset = examples.read(out / "by-device", inference, ["recording"], {"weather": out / "joined-weather"})
    starts, last = examples.cut_windows(dataset, inference)
    result, recordings = examples.predict(inference, dataset, starts), dataset.columns["recording"]
    first = {name: int(np.flatnonzero(recordings == name)[0]) for name in set(recordings.tolist())}
    rows = [int(name.rpartition("/")[2]) + at - first[name] for at, name in zip(last, recordings[last], strict=True)]
    return {row: bits(result, index) for index, row in enumerate(rows)}


@pytest.mark.parametrize(("data_format", "seed"), [("csv", 1), ("parquet", 2)])
def test_a_set_gives_the_bits_that_the_device_computed(
    device: SampledDevice, home: Path, packed: Path, tmp_path: Path, seed: int, data_format: str
) -> None:
    computed = run_in_pieces(device, seed)
    chosen = sorted(computed)[6:-6:9]
    store = sample(device, home, chosen)
    assert len(device.samples()) == len(chosen)
    assert audit(store).passed
    with store.transaction() as db:
        given_labels.add(
            db, "pi-07", "tiny", [Label(row, None, "left" if row % 8 else "rest", "human") for row in chosen], TIME, "m"
        )
    store.close()
    card = export(home, tmp_path / "set", "--format", data_format)
    assert card["inputs"]["weather"]["fields"] == ["air"]
    predicted = predict(device, tmp_path / "set")
    assert {row: predicted[row] for row in chosen} == {row: computed[row] for row in chosen}
    # Of other windows of a sample, a late row may be missing or there.
    same = [predicted[row] == computed[row] for row in predicted]
    assert len(same) > 2 * len(chosen)
    assert np.mean(same) > 0.8
    command = ["evaluate", str(packed), str(tmp_path / "set" / "by-device"), "--no-latency", "--json"]
    done = CliRunner().invoke(model_command, [*command, "--join", f"weather={tmp_path / 'set' / 'joined-weather'}"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["data"]["windows"] == len(chosen)
    checked = CliRunner().invoke(fleet, ["dataset", "check", str(tmp_path / "set")])
    assert checked.exit_code == 0, checked.output


def test_labels_of_further_outputs_have_a_column_that_the_evaluation_reads(
    device: SampledDevice, home: Path, packed: Path, tmp_path: Path
) -> None:
    chosen = sorted(run_in_pieces(device, 3))[6:-6:9]
    sample(device, home, chosen).close()
    wear = tmp_path / "wear.csv"
    wear.write_text(
        "row,label,output\n" + "".join(f"{row},{row / 10},\n" for row in chosen) + f"{chosen[0]},hot|wet,flags\n"
    )
    done = CliRunner().invoke(
        fleet, ["label", "pi-07", "tiny", str(wear), "--output", "wear", "--dir", str(home), "--json"]
    )
    assert done.exit_code == 0, done.output
    known = json.loads(done.stdout)
    assert (known["sources"], known["metrics"]) == ({}, [])
    assert {name: each["sources"] for name, each in known["outputs"].items()} == {
        "flags": {"human": 1},
        "wear": {"human": len(chosen)},
    }
    assert "mae" in {metric["metric"] for metric in known["outputs"]["wear"]["metrics"]}
    card = export(home, tmp_path / "set", "--format", "csv", "--only-labelled")
    assert card["labels"]["labelled"] == 0
    assert {name: each["labels"]["labelled"] for name, each in card["outputs"].items()} == {
        "flags": 1,
        "wear": len(chosen),
    }
    text = (tmp_path / "set" / "DATA_CARD.md").read_text()
    assert "## Labels of output wear by person" in text
    assert "Give labels" not in text
    with (tmp_path / "set" / "data.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert {row["label"] for row in rows} == {""}
    assert sorted(float(row["label_wear"]) for row in rows if row["label_wear"]) == [row / 10 for row in chosen]
    assert [row["label_flags"] for row in rows if row["label_flags"]] == ["hot|wet"]
    command = [
        "evaluate",
        str(packed),
        str(tmp_path / "set" / "by-device"),
        "--no-latency",
        "--json",
        "--output",
        "wear",
    ]
    done = CliRunner().invoke(model_command, [*command, "--join", f"weather={tmp_path / 'set' / 'joined-weather'}"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["data"]["windows"] == len(chosen)
    checked = CliRunner().invoke(fleet, ["dataset", "check", str(tmp_path / "set")])
    assert checked.exit_code == 0, checked.output


def test_fewer_joined_rows_than_the_least_count_are_never_sent(device: SampledDevice, home: Path) -> None:
    feed_air(device, np.arange(30) * WEATHER_STEP_US, np.arange(30, dtype=np.float32))
    device.feed(waves(600))
    device.run_all()
    device.author.min_count = 15
    sample(device, home, [32, 560]).close()
    [sent] = device.samples()
    # Of the first result there are only few rows before; of the other, earlier ones are added.
    assert (sent.row, sent.joined["weather"].n, device.status()["dropped"]) == (560, 15, {"few": 1})
    limited = least_count.apply("samples", {"n": 40, "sealed": "AA", "joined": {"weather": {"n": 3}}}, 5)
    assert limited == {"n": 40, "sealed": "AA", "joined": {}}


def test_rules_of_a_joined_stream_hold_for_its_rows(device: SampledDevice, home: Path, tmp_path: Path) -> None:
    feed_air(device, np.arange(30) * WEATHER_STEP_US, np.linspace(1, 2, 30, dtype=np.float32))
    device.feed(waves(600))
    device.run_all()
    device.author.privacy = {"tiny": FieldPrivacy(frozenset({"air", *WINDOWED}), steps={"air": 0.5})}
    sample(device, home, [300]).close()
    device.author.privacy = {"tiny": FieldPrivacy(frozenset({"air", *WINDOWED}), private=frozenset({"air"}))}
    store = sample(device, home, [500], later_s=60.0)
    store.close()
    rounded, private = device.samples()
    assert (rounded.joined["weather"].stream, private.joined) == ("weather", {})
    card = export(home, tmp_path / "set")
    assert card["inputs"]["weather"]["recordings_without"] == 1
    air = {line.split(",")[1] for line in export_csv(home, tmp_path / "csv")}
    assert air <= {"1.0", "1.5", "2.0"}


def export_csv(home: Path, out: Path) -> list[str]:
    export(home, out, "--format", "csv")
    [file] = (out / "joined-weather").iterdir()
    return file.read_text().splitlines()[1:]


def test_deleted_joined_rows_are_counted(device: SampledDevice, home: Path) -> None:
    feed_air(device, np.arange(10) * WEATHER_STEP_US, np.ones(10, np.float32))
    feed_air(device, np.arange(10, 30) * WEATHER_STEP_US, np.ones(20, np.float32))
    device.feed(waves(600))
    device.run_all()
    with device.store.transaction() as tx:
        tx.trim_rows("weather", 10, 2**62, 10)
    sample(device, home, [100, 560]).close()
    assert [(sent.row, sent.joined["weather"].rows) for sent in device.samples()] == [(560, (16, 19))]
    assert device.status()["dropped"] == {"gone": 1}


def test_a_sample_above_the_limit_loses_the_joined_rows_of_the_windows_it_loses(
    device: SampledDevice, home: Path
) -> None:
    consent(device, home, replace(CONSENT, windows=100, max_message=4096))
    feed_air(device, np.arange(60) * WEATHER_STEP_US, waves(60)[:, 0].copy())
    device.feed(waves(1200))
    device.run_all()
    sample(device, home, [600]).close()
    [sent] = device.samples()
    assert sent.n < 200 * STEP
    assert sent.joined["weather"].n <= sent.n * 10_000 // WEATHER_STEP_US + 4


def test_rows_too_late_for_a_result_contradict_its_sample() -> None:
    def rows(numbers: list[int], t: list[int], seen: tuple[int, int]) -> JoinedRows:
        values = np.array(numbers, np.float64)[:, None]
        return JoinedRows("weather", np.array(numbers), np.array(t), values, np.array([seen]))

    first = rows([1, 2, 3], [10, 20, 30], (35, 3))
    # Row 4 is of the time 31, but came after the first result, of the time 35.
    late = rows([3, 4, 5], [30, 31, 40], (45, 5))
    on_time = rows([2, 3, 5], [20, 30, 40], (45, 5))
    assert first.contradicts(late)
    assert late.contradicts(first)
    assert not first.contradicts(on_time)
    merged = first.merge(on_time)
    assert merged.numbers.tolist() == [1, 2, 3, 5]
    assert merged.values[:, 0].tolist() == [1, 2, 3, 5]
    assert merged.contradicts(late)
    other = rows([3], [29], (29, 3))
    assert first.contradicts(other)


def test_logs_of_a_device_take_no_file_of_a_device_of_a_similar_name() -> None:
    def recording(device: str, log: str) -> Recording:
        rows = JoinedRows("weather", np.array([1]), np.array([0]), np.ones((1, 1)), np.array([[0, 1]]))
        return Recording(device, log, 1, np.zeros(1, np.int64), np.ones((1, 1)), [], joined={"weather": rows})

    every = [recording("pi", "a"), recording("pi", "b"), recording("pi-1", "c"), recording("pi-2", "d")]
    parts = data_files.split_by_device(Gathered(["x"], every, inputs={"weather": ["air"]}))
    assert sorted(part.recordings for part in parts.values()) == [[0], [1], [2], [3]]
    assert (parts["pi-1"].recordings, parts["pi-2"].recordings) == ([2], [3])


@pytest.mark.parametrize("damage", ["swapped", "short", "numbers", "times"])
def test_joined_rows_that_do_not_fit_their_message_are_counted(
    device: SampledDevice, home: Path, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed_air(device, np.arange(30) * WEATHER_STEP_US, np.ones(30, np.float32))
    device.feed(waves(600))
    device.run_all()
    encode = sample_content.encode

    def damaged(*arguments: Any) -> bytes:
        consent_text, fields, t, columns, numbers = arguments
        if numbers is None:
            return encode(*arguments)
        if damage == "swapped":
            return encode(consent_text, fields, t, columns)
        if damage == "short":
            return encode(consent_text, fields, t[1:], [column[1:] for column in columns], numbers[1:])
        if damage == "times":
            # In a file of the set, it would stand in place of the times.
            return encode(consent_text, ["t"], t, columns, numbers)
        return encode(consent_text, fields, t, columns, numbers + 1)

    monkeypatch.setattr(sample_content, "encode", damaged)
    sample(device, home, [300]).close()
    monkeypatch.undo()
    done = CliRunner().invoke(
        fleet, ["dataset", "export", "--task", "tiny", "--out", str(tmp_path / "set"), "--dir", str(home)]
    )
    assert done.exit_code == 1
    assert "1 malformed content left out" in str(done.exception)
