"""Own models on simulated devices: several inputs, and a Keras model made small by the documented script."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outstation.foundation.errors import UsageError
from outstation.ml.model.bundle import bundle
from outstation.ml.model.inference import features, runtime
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.joins import JoinedRows
from outstation.workbench.authoring import pack, scaffold
from outstation.workbench.testing.simulated_fleet import SimulatedFleet
from scripts.kit.bundles import KEY, LABELS, TABULAR, WINDOW, WINDOWED, readings, waves, write_csv, write_joined_spec
from tests.kit.devices import expand_columns
from tests.kit.stations import ROOT
from tests.kit.tensorflow_python import find_tensorflow

CONFIG = f"""\
[device]
id = "sim"
fleet = "sim"
[streams.watch]
fields = [{{ name = "u" }}, {{ name = "v" }}]
[streams.roof]
fields = [{{ name = "other" }}, {{ name = "air" }}]
[tasks.state]
stream = "watch"
bundle = "bundle"
schedule = "every 10 s"
learn_windows = 20
[tasks.state.inputs.weather]
stream = "roof"
wait = "20 s"
[publishers]
keys = ["{KEY.public.text}"]
[buffer]
commit_every = "2 s"
"""


def read_stream(fleet: SimulatedFleet, device: str, stream: str) -> tuple[Any, Any]:
    """Return times and fields (n, F) of all rows that a device stored."""
    simulated = fleet._simulation.devices[device]
    fields, at, t, values = simulated._conf.streams[stream].fields, 0, [], []
    while (piece := simulated.store.read_rows(stream, fields, at, 100_000)) is not None:
        assert piece.loss_reason is None
        t.append(piece.t)
        values.append(features.stack_columns(piece.rows.columns))
        at = piece.last
    return np.concatenate(t), np.concatenate(values)


def collected_results(fleet: SimulatedFleet, device: str) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(fleet.database)) as db:
        sql = "SELECT payload FROM messages WHERE kind = 'results' AND device = ? ORDER BY seq"
        return [json.loads(payload) for (payload,) in db.execute(sql, [device])]


@pytest.fixture
def recordings(tmp_path: Path) -> dict[str, Path]:
    air = np.column_stack([np.zeros(210), waves(210, seed=8)[:, 0]]).astype(np.float32)
    return {
        "watch": write_csv(tmp_path / "watch.csv", WINDOWED, waves(3000, seed=7), step_s=0.02),
        "roof": write_csv(tmp_path / "roof.csv", ("other", "air"), air, step_s=0.31),
    }


def test_a_model_of_two_inputs_runs_on_simulated_devices_through_outages(
    outstation_fleet: Callable[..., SimulatedFleet], tmp_path: Path, recordings: dict[str, Path]
) -> None:
    pack.write_bundle(pack.pack(write_joined_spec(tmp_path), KEY), tmp_path / "bundle")
    (tmp_path / "outstation.toml").write_text(CONFIG)
    events = [
        {"kind": "power-cut", "devices": ["sim-01"], "at": "25 s", "lasts": "10 s"},
        {"kind": "outage", "devices": ["sim-02"], "at": "20 s", "lasts": "15 s"},
    ]
    fleet = outstation_fleet(
        devices=2, config=tmp_path / "outstation.toml", recordings=recordings, scenario={"events": events},
        bundles={"state": str(tmp_path / "bundle")},
    )  # fmt: skip
    fleet.run("100 s")
    loaded = bundle.read(tmp_path / "bundle", [KEY.public])
    inference = Inference(loaded.manifest, runtime.load_model(loaded.manifest, loaded.model_bytes))
    for device in fleet.devices:
        (t, rows), (air_t, air) = read_stream(fleet, device, "watch"), read_stream(fleet, device, "roof")
        whole = inference.run(rows, t, joined={"weather": JoinedRows(air[:, 1:], air_t)})
        results = collected_results(fleet, device)
        columns = [expand_columns(body["columns"]) for body in results]
        listed = [row for each in columns for row in each["row"]]
        scores = [score for each in columns for score in each["score"]]
        assert len(listed) > 500
        # What a device computes piece by piece, around a power cut, is what a file of its rows gives.
        assert listed == (whole.cut.starts + WINDOW)[: len(listed)].tolist()
        assert scores == np.round(np.asarray(whole.scores.score), 4)[: len(listed)].tolist()
        used = [body["joined"]["weather"] for body in results if body["n"]]
        assert all(each["stream"] == "roof" and each["input"].startswith("hmac-sha256:") for each in used)
        assert used[-1]["rows"][1] > 150


def test_a_joined_stream_without_a_recording_is_named(tmp_path: Path, recordings: dict[str, Path]) -> None:
    pack.write_bundle(pack.pack(write_joined_spec(tmp_path), KEY), tmp_path / "bundle")
    (tmp_path / "outstation.toml").write_text(CONFIG)
    with pytest.raises(UsageError, match="stream 'roof' has no recording; add --recording roof=FILE"):
        SimulatedFleet(
            tmp_path / "fleet", config=tmp_path / "outstation.toml", recordings={"watch": recordings["watch"]},
            bundles={"state": str(tmp_path / "bundle")},
        )  # fmt: skip


TRAIN = """
import sys
import numpy as np
import tensorflow as tf
tf.keras.utils.set_random_seed(1)
data = np.load(sys.argv[1])
scaling = tf.keras.layers.Normalization()
scaling.adapt(data["x"])
layers = [scaling, tf.keras.layers.Dense(64, "relu"), tf.keras.layers.Dense(3, "softmax")]
model = tf.keras.Sequential([tf.keras.Input((4,)), *layers])
model.compile("adam", "sparse_categorical_crossentropy")
model.fit(data["x"], data["y"], epochs=15, verbose=0)
model.save(sys.argv[2])
"""
KERAS_CONFIG = f"""\
[device]
id = "sim"
fleet = "sim"
[streams.pump]
fields = [{", ".join(f'{{ name = "{name}" }}' for name in TABULAR)}]
[tasks.pump]
stream = "pump"
bundle = "pump"
schedule = "every 10 s"
[publishers]
keys = ["{KEY.public.text}"]
[buffer]
commit_every = "2 s"
"""


def labelled_rows(n: int, seed: int) -> tuple[Any, Any]:
    # Far from 0 and 1: only a model that scales them learns.
    return 500 + 40 * readings(n, seed), (np.arange(n) // 7 % 3).astype(np.int64)


@pytest.mark.process
@pytest.mark.timeout(300)
def test_an_own_keras_model_that_the_script_made_small_runs_on_simulated_devices(
    outstation_fleet: Callable[..., SimulatedFleet], tmp_path: Path
) -> None:
    python, small = find_tensorflow(), tmp_path / "small"
    (x, y), (x_test, y_test) = labelled_rows(3000, 1), labelled_rows(1000, 2)
    np.savez(tmp_path / "data.npz", x=x, y=y, x_test=x_test, y_test=y_test)
    data, model = str(tmp_path / "data.npz"), str(tmp_path / "model.keras")
    subprocess.run([python, "-c", TRAIN, data, model], check=True, capture_output=True)
    shrink = [python, str(ROOT / "scripts" / "shrink_keras.py"), model, data, "-o", str(small), "--epochs", "15"]
    subprocess.run(shrink, check=True, capture_output=True)
    figures = {row["name"]: row for row in json.loads((small / "comparison.json").read_text())}
    assert figures["distilled-int8"]["bytes"] < figures["float32"]["bytes"]
    # The documented way: a proposed SPEC, completed with the names of the labels.
    recording = write_csv(tmp_path / "readings.csv", TABULAR, x_test, step_s=0.05)
    draft = scaffold.scaffold_spec(small / "distilled-int8.tflite", tmp_path / "pump.toml", recording)
    text = draft.text.replace('["class 0", "class 1", "class 2"]', json.dumps(LABELS))
    assert json.dumps(LABELS) in text
    (tmp_path / "pump.toml").write_text(text)
    pack.write_bundle(pack.pack(tmp_path / "pump.toml", KEY), tmp_path / "pump")
    (tmp_path / "outstation.toml").write_text(KERAS_CONFIG)
    fleet = outstation_fleet(
        devices=2, config=tmp_path / "outstation.toml", recordings={"pump": recording},
        bundles={"pump": str(tmp_path / "pump")},
    )  # fmt: skip
    fleet.run("90 s")
    for device in fleet.devices:
        columns = [expand_columns(body["columns"]) for body in collected_results(fleet, device)]
        predicted = {row: label for each in columns for row, label in zip(each["row"], each["label"], strict=True)}
        # The sensor may have been on before the device.
        _, stored = read_stream(fleet, device, "pump")
        first = int(np.abs(x_test - stored[0]).sum(axis=1).argmin())
        right = [predicted[row] == LABELS[y_test[first + row - 1]] for row in range(1, 901)]
        assert np.mean(right) == pytest.approx(figures["distilled-int8"]["accuracy"], abs=0.02)
        assert np.mean(right) > 0.95
