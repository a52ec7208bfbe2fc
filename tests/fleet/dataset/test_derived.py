"""Derived features of a set: bit for bit what the device's model read, and never from rows that came later."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from outstation.device.config.samples import SamplesConfig
from outstation.device.samples import requests
from outstation.device.samples.rounding import EXACT_DIGITS, protect_column
from outstation.device.store.rows import Rows
from outstation.fleet import config as fleet_config
from outstation.fleet.cli.group import fleet
from outstation.fleet.collector import encryption_keys
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.dataset import derived
from outstation.fleet.dataset.gather import Gathered, Recording
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle import bundle
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.model_windows import ModelWindows
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.wire.privacy import field_privacy
from outstation.workbench.authoring import pack
from outstation.workbench.testing.messages import FLEET
from scripts.kit.bundles import KEY, readings
from tests.kit.devices import DEVICE, STEP_US, T0
from tests.kit.feature_sets import COLUMNS, FEATURES, RECIPE, write_feature_spec
from tests.kit.sampled_devices import SampledDevice

EXACT = SamplesConfig(consent="Mira Lang, 2026-11-28: exact readings", digits=EXACT_DIGITS, windows=45)
LONG_US, BACK_US = 700_000, -35_000
NOW = "2026-11-25T12:00:00.000000Z"


def feed_at(device: SampledDevice, t: NDArray[np.int64], values: NDArray[np.float32]) -> None:
    columns = (np.zeros(len(t), "<f4"), *np.ascontiguousarray(values.T))
    with device.store.transaction() as tx:
        tx.append("watch", Rows(t, columns), "synced")


def disturbed_rows(seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return rows with gaps, late rows (a time before the last one), rows sent twice, and missing values."""
    random = np.random.default_rng(seed)
    steps = random.choice([STEP_US, 0, LONG_US, BACK_US], 300, p=[0.88, 0.06, 0.03, 0.03])
    values = readings(300, seed)[:, :2].copy()
    values[1:][steps[1:] == 0] = values[:-1][steps[1:] == 0]
    values[random.random(values.shape) < 0.05] = np.nan
    return T0 + np.cumsum(steps), values


@pytest.fixture
def home(tmp_path: Path) -> Path:
    init_fleet(tmp_path / "home", FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    return tmp_path / "home"


@pytest.fixture
def device(tmp_path: Path, home: Path) -> Iterator[SampledDevice]:
    (tmp_path / "spec").mkdir()
    pack.write_bundle(pack.pack(write_feature_spec(tmp_path / "spec"), KEY), tmp_path / "bundle")
    loaded = bundle.read(tmp_path / "bundle", [KEY.public])
    model = runtime.load_model(loaded.manifest, loaded.model_bytes)
    made = SampledDevice(tmp_path / "store", RECIPE, LoadedBundle(loaded, None, None, model))
    key = encryption_keys.load_public(home)
    assert key is not None
    made.consent(EXACT, key)
    yield made
    made.store.close()


def run_in_pieces(device: SampledDevice, seed: int, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.float32]:
    """Feed disturbed rows in pieces, with restarts; return the model's input (n, 4) of each row."""
    inputs: list[NDArray[np.float32]] = []
    prepare = Inference.prepare

    def record(self: Inference, *arguments: Any, **more: Any) -> ModelWindows:
        windows = prepare(self, *arguments, **more)
        inputs.append(np.array(windows.numbers, np.float32))
        return windows

    monkeypatch.setattr(Inference, "prepare", record)
    random, (t, values), at = np.random.default_rng(seed), disturbed_rows(seed), 0
    samples = device.task.samples
    while at < len(t):
        end = at + int(random.integers(1, 60))
        feed_at(device, t[at:end], values[at:end])
        device.run_all()
        if random.random() < 0.3:
            device.restart()
            device.assemble_samples(samples)
        at = end
    device.consent(EXACT, encryption_keys.load_public(device.folder.parent / "home"))  # type: ignore[arg-type]
    return np.concatenate(inputs)


def send_samples(device: SampledDevice, home: Path, rows: list[int]) -> None:
    assert device.task.samples is not None
    with device.store.transaction() as tx:
        requests.add(tx, "tiny", [device.task.samples.request("requested", row, 1) for row in rows])
    device.send()
    store = FleetStore(fleet_config.load(home).fleet.db)
    store.enrol("pi-07", DEVICE.public, replace=False, now=NOW)
    store.ingest([Arrival(message) for message in device.messages()], [], NOW)
    store.close()


def export(home: Path, out: Path, features: Path, *arguments: str) -> dict[str, Any]:
    command = ["dataset", "export", "--task", "tiny", "--out", str(out), "--features", str(features), "--json"]
    done = CliRunner().invoke(fleet, [*command, "--dir", str(home), *arguments])
    assert done.exit_code == 0, f"{done.output}{done.exception}"
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def read_rows(folder: Path, data_format: str) -> Iterator[tuple[int, int, list[float]]]:
    """Yield the begin of the recording, the number of the row, and the model's features; NaN where one is empty."""
    if data_format == "csv":
        lines = [*csv.DictReader((folder / "data.csv").read_text().splitlines())]
        rows = [(line["recording"], [float(line[name] or "nan") for name in COLUMNS]) for line in lines]
    else:
        table = pq.read_table(folder / "data.parquet").to_pydict()
        columns = [[float("nan") if v is None else v for v in table[name]] for name in COLUMNS]
        rows = [(name, [*row]) for name, *row in zip(table["recording"], *columns, strict=True)]
    last, number = "", 0
    for recording, features in rows:
        begin = int(recording.rpartition("/")[2])
        number = number + 1 if recording == last else begin
        last = recording
        yield begin, number, features


@pytest.mark.parametrize("data_format", ["csv", "parquet"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_set_has_the_bits_of_the_models_input(
    device: SampledDevice, home: Path, tmp_path: Path, seed: int, data_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = run_in_pieces(device, seed, monkeypatch)
    assert len(inputs) == 300
    send_samples(device, home, [30, 140, 240])
    card = export(home, tmp_path / "set", tmp_path / "spec" / "motion.toml", "--format", data_format)
    assert (card["features"]["name"], card["features"]["version"]) == ("motion", "1.0.0")
    compared = 0
    for begin, number, features in read_rows(tmp_path / "set", data_format):
        exported, read = np.array(features, np.float32), inputs[number - 1]
        # A missing value is the mean to the model: 0, as this bundle has no mean.
        is_empty = np.isnan(exported)
        assert exported[~is_empty].tobytes() == read[~is_empty].tobytes(), number
        # Only at the begin of a recording inside the stream may the device have known more.
        if begin == 1 or number - begin >= 4:
            assert not read[is_empty].any(), number
        compared += 1
    assert compared > 200
    assert card["features"]["history_left_out"]["day_sin"] == 0


def test_a_set_names_its_feature_set_and_is_checked_with_it(
    device: SampledDevice, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_pieces(device, 3, monkeypatch)
    send_samples(device, home, [100])
    file, folder = tmp_path / "spec" / "motion.toml", tmp_path / "set"
    card = export(home, folder, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["features"]["digest"] == card["features"]["digest"]
    assert "features.json" in [entry["path"] for entry in manifest["files"]]
    assert "## Derived features" in (folder / "DATA_CARD.md").read_text()
    for old, new, why in (
        ('"a", "b"]', '"a", "b", "z"]', "fields: the samples have no 'z', they have a, b"),
        ('name = "b_step"', 'name = "label"', "'label' is a column of the set already"),
    ):
        file.write_text(FEATURES.replace(old, new))
        command = ["dataset", "export", "--task", "tiny", "--out", str(tmp_path / "x"), "--dir", str(home)]
        done = CliRunner().invoke(fleet, [*command, "--features", str(file)])
        assert done.exit_code != 0
        assert why in str(done.exception)
        assert str(file) in str(done.exception)
        assert not (tmp_path / "x").exists()


@given(seed=st.integers(0, 10_000), first=st.sampled_from([1, 7]), count=st.integers(1, 59))
def test_later_rows_change_no_earlier_feature(
    tmp_path_factory: pytest.TempPathFactory, seed: int, first: int, count: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "motion.toml"
    file.write_text(FEATURES)
    t, values = disturbed_rows(seed)
    whole, part = (
        derived.compute(file, Gathered(["a", "b"], [Recording("d", "l", first, t[:n], values[:n].astype(float), [])]))
        for n in (60, count)
    )
    np.testing.assert_array_equal(whole.values[0][:count], part.values[0])


@given(st.lists(st.floats(width=32, allow_infinity=False, allow_nan=False), min_size=1, max_size=50))
def test_nine_digits_hold_every_number_that_a_model_reads(numbers: list[float]) -> None:
    column = np.array(numbers, np.float64)
    sent = protect_column("a", column, EXACT_DIGITS, field_privacy.OPEN, 0)
    assert sent is not None
    texts = json.loads(json.dumps(sent))
    assert np.array(texts, np.float32).tobytes() == column.astype(np.float32).tobytes()
