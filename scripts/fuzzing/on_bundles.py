"""Fuzz targets for bundles, their contents, and config files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outstation.device import config
from outstation.fleet import config as fleet_config
from outstation.foundation.errors import BadBundle, ConfigError, UsageError
from outstation.ml.datasets import training_data as data
from outstation.ml.datasets.recordings import load, load_windows
from outstation.ml.drift.baseline.reference import Reference, draft_reference
from outstation.ml.drift.monitor import DriftMonitor
from outstation.ml.drift.monitor_settings import MonitorSettings
from outstation.ml.drift.state import DriftState
from outstation.ml.model.bundle import bundle, golden_vectors, manifest
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.testing.messages import new_key
from scripts.fuzzing import as_file, target

PUBLISHER: SigningKey = new_key(11)
MODEL = b"no model, but nobody runs it"
FIELDS, LABELS = ("x", "y"), ("left", "right")


def head(**more: object) -> bytes:
    files = {"model.tflite": f"sha256:{hashlib.sha256(MODEL).hexdigest()}"}
    document = {"format": 1, "name": "tiny", "version": "1.0.0", "created": "2026-11-24T00:00:00Z", "kind": "classify"}
    window = {"rows": 8, "step": 4, "max_gap_s": 0.5}
    given = {"fields": FIELDS, "units": ["g", "g"], "window": window, "mean": [0.0, 1.5], "std": [1.0, 2.0]}
    shape = {"input": given, "output": {"labels": LABELS, "activation": "softmax"}, "files": files, **more}
    return manifest.encode(manifest.decode(msgspec.json.encode({**document, **shape})))


@target("manifest", "an accepted manifest survives a write and read", lambda: [head()])
def manifest_json(data: bytes) -> None:
    try:
        decoded = manifest.decode(data)
    except BadBundle:
        return
    assert manifest.decode(manifest.encode(decoded)) == decoded


def contents() -> dict[str, bytes]:
    text = head()
    return {
        "manifest.json": text,
        "manifest.jws": bundle.MANIFEST_DOMAIN.sign_file(PUBLISHER, text),
        "model.tflite": MODEL,
    }


def archives() -> list[bytes]:
    seeds = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, content in contents().items():
                archive.writestr(zipfile.ZipInfo(name), content, method)
        seeds.append(out.getvalue())
    return seeds


@target("bundle", "an accepted bundle has the files its publisher signed", archives, 8192)
def archive(data: bytes) -> None:
    with as_file(data, ".zip") as path:
        with contextlib.suppress(BadBundle):
            bundle.read(path, None)
        try:
            loaded = bundle.read(path, [PUBLISHER.public])
        except BadBundle:
            return
    assert {**loaded.files, "manifest.jws": b""} == {**contents(), "manifest.jws": b""}


def reference() -> Reference:
    random = np.random.default_rng(1)
    rows = random.normal(size=(400, 2))
    starts = np.arange(0, 400, 8)
    return draft_reference(rows, starts, 8, window=5, fields=FIELDS, labels=LABELS, scores=random.random(50))


@target("reference", "an accepted drift reference is consistent", lambda: [reference().to_json()], 16_384)
def reference_json(data: bytes) -> None:
    try:
        decoded = Reference.from_json(data)
    except BadBundle:
        return
    assert Reference.from_json(decoded.to_json()).digest == decoded.digest
    DriftMonitor(MonitorSettings(decoded, labels=decoded.labels, window=5)).start()


def states() -> list[bytes]:
    return [DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=5)).start().to_bytes()]


@target("drift-state", "an accepted drift state survives a write and read", states, 8192)
def drift_state(data: bytes) -> None:
    try:
        decoded = DriftState.from_bytes(data)
    except ValueError:
        return
    again = DriftState.from_bytes(decoded.to_bytes())
    assert again.to_bytes() == decoded.to_bytes()


def vectors() -> list[bytes]:
    inputs = np.arange(12, dtype=np.float32).reshape(3, 4)
    return [
        golden_vectors.encode(
            golden_vectors.from_outputs(inputs, inputs[:, :2] / np.float32(9), [0.1], [2], "litert 2.1 x86_64")
        )
    ]


@target("golden", "accepted golden vectors are comparable", vectors, 8192)
def golden_npz(data: bytes) -> None:
    try:
        decoded = golden_vectors.decode(data)
    except BadBundle:
        return
    assert golden_vectors.decode(golden_vectors.encode(decoded)).expected.shape == decoded.expected.shape


ARRAYS = ("inputs", "expected", "runtime", "tolerance")


def arrays() -> list[bytes]:
    """Return each array of the golden vectors, prefixed by one byte for its name."""
    with zipfile.ZipFile(io.BytesIO(vectors()[0])) as archive:
        return [bytes([i]) + archive.read(f"{name}.npy") for i, name in enumerate(ARRAYS)]


@target("golden-array", "golden vectors with a damaged array in a valid archive", arrays)
def golden_array(data: bytes) -> None:
    damaged = ARRAYS[data[0] % len(ARRAYS)] if data else ARRAYS[0]
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(vectors()[0])) as sound, zipfile.ZipFile(out, "w") as archive:
        for name in ARRAYS:
            archive.writestr(f"{name}.npy", data[1:] if name == damaged else sound.read(f"{name}.npy"))
    golden_npz(out.getvalue())


def recordings() -> list[bytes]:
    out = io.BytesIO()
    rows = np.arange(24, dtype=np.int16).reshape(12, 2)
    np.savez(out, rows=rows, fields=np.array(FIELDS), starts=[0, 5, 12], rate=50.0, label=[0, 1], scale=np.float32(0.1))
    return [out.getvalue()]


@target("recordings", "recordings are read with labels and times, or rejected by name", recordings, 8192)
def recordings_npz(content: bytes) -> None:
    _data(content, ".npz")


def replays() -> list[bytes]:
    out = io.BytesIO()
    rows = np.arange(24, dtype=np.int16).reshape(12, 2)
    more: dict[str, Any] = {"label": [0, 1], "labels": np.array(LABELS), "subject": [1, 2], "fields": np.array(FIELDS)}
    np.savez(out, rows=rows, starts=[0, 5, 12], rate=50.0, **more)
    return [out.getvalue()]


@target("replay", "recordings to replay are read, or rejected by name", replays, 8192)
def replay_npz(content: bytes) -> None:
    with as_file(content, ".npz") as path, contextlib.suppress(UsageError):
        load(path)


@target(
    "data-csv", "data for a bundle are read, or rejected by name", lambda: [b"t,x,y\n1,2,3\n2,,4\n", b"y,x\r\n1,2\r\n"]
)
def data_csv(content: bytes) -> None:
    _data(content, ".csv")


def _data(content: bytes, suffix: str) -> None:
    spec = manifest.decode(head()).input
    with as_file(content, suffix) as path:
        try:
            decoded = data.read(path, spec)
            if suffix == ".npz":
                load_windows(path, spec)
        except UsageError:
            return
    assert decoded.features.shape == (len(decoded.t), len(FIELDS))
    assert decoded.label is None or len(decoded.label) == len(decoded.t)


DEVICE = b"""
[device]
id = "pi-07"
fleet = "acme"
[broker]
url = "mqtts://broker:8883"
max_message_bytes = 120_000
[buffer]
max_size = "1 GiB"
[streams.watch]
fields = [{ name = "ax", unit = "g", min = -16, max = 16 }, { name = "mode", type = "category", optional = true }]
source = { kind = "files", folder = "in", poll_interval = "2 s" }
[tasks.exercise]
stream = "watch"
bundle = "exercise"
schedule = "every 60 s"
publish = { below_score = 0.6 }
"""
FLEET = b"""
[fleet]
name = "acme"
db = "sqlite:///fleet.db"
[broker]
url = "mqtt://localhost"
[collector]
key_file = "collector.key"
[operator]
key_file = "operator.key"
"""


@target("config", "a config file is accepted, or its error is named", lambda: [DEVICE])
def device_config(content: bytes) -> None:
    _config(content, "outstation.toml", lambda path: config.digest(config.load(path)))


@target("fleet-config", "a fleet config file is accepted, or its error is named", lambda: [FLEET])
def fleet_toml(content: bytes) -> None:
    _config(content, fleet_config.FILE, lambda path: fleet_config.load(path.parent))


def _config(content: bytes, name: str, load: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            load(path)
        except ConfigError as problem:
            mistake = str(problem)
        except UsageError:
            return
        else:
            return
    assert mistake.startswith(str(path)), mistake
