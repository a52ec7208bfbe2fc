"""Batches from stored readings to committed results, with drift detection and signing, against the bare interpreter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from outstation.device.pipeline import batch as batches
from outstation.foundation import clock
from outstation.ml.datasets.recordings import load
from outstation.ml.model.inference import features
from outstation.ml.model.inference.runtime import MAX_BATCH, Interpreter, TfliteModel  # type: ignore[attr-defined]
from outstation.workbench.authoring import pack
from outstation.workbench.simulate.scenario import SCENARIOS
from outstation.workbench.testing.fleet import FIELDS as DEVICE_FIELDS
from scripts.benchmarks import Result, benchmark, device_task, rates
from scripts.benchmarks.device_task import Bed, Floats
from scripts.kit import write_models
from scripts.kit.bundles import KEY, THIRD_PARTY

WINDOWS = 4096
FIELDS = 16
# Rows of a small and a large backlog.
_FEW, _MANY = 200_000, 10_000_000
_BATCHES = 3


class Tiny(msgspec.Struct, frozen=True):
    """A model of MLPerf Tiny; `rest_of_spec` follows the input section, `target` is the smallest ratio."""

    file: str
    frames: int
    bands: int
    rest_of_spec: str
    target: float


TINY = {
    "ad01": Tiny("mlperf_ad01_int8", 5, 128, 'kind = "anomaly"\n[output]\nthreshold = 10.0', 0.08),
    "kws": Tiny("mlperf_kws_int8", 49, 10, f'kind = "classify"\nlabels = {[f"w{i}" for i in range(12)]}', 0.73),
}


@benchmark("batch", quick=True)
def exercise_from_store_to_results() -> Result:
    recorded = load(SCENARIOS["exercise"].file).rows
    names = [name for name, _ in SCENARIOS["exercise"].fields]
    with device_task.device_with_task(names, "exercise") as device:
        rows = np.resize(recorded, (WINDOWS * device.task.window_rows, len(names)))
        return _compare_with_interpreter(device, rows, "batch", "exercise model")


@benchmark("backlog")
def batch_with_large_backlog() -> Result:
    """Measure whole batches of the exercise model, from the store to committed results, by wall clock."""
    rows = np.random.default_rng(0).normal(0, 1, (_FEW, len(DEVICE_FIELDS))).astype(np.float32)
    with (
        device_task.device_with_task(DEVICE_FIELDS, "exercise") as few,
        device_task.device_with_task(DEVICE_FIELDS, "exercise") as many,
    ):
        for _ in range(_MANY // _FEW):
            many.fill(rows)
        # Otherwise the kernel would flush the backlog to disk during the measurement.
        os.sync()

        def prepare() -> None:
            few.work_off()
            few.fill(rows)

        pace = rates(lambda: _some(many), lambda: _some(few), rounds=5, prepare=prepare)
    note = f"{_MANY:,} rows waiting; reference: the same with {_FEW:,}"
    return Result.timed("backlog", pace.to_costs(1e3), "ms/batch", 1.2, note, less=True)


def _some(device: Bed) -> int:
    for _ in range(_BATCHES):
        assert batches.run(device.task, device.store, device.author, clock.read()) is not None
    return _BATCHES


@benchmark("tiny")
def mlperf_tiny_models() -> list[Result]:
    """Measure MLPerf Tiny models on windows of noise as wide as the model input."""
    if not THIRD_PARTY.exists():
        raise click.ClickException(f"{THIRD_PARTY}: no such folder; set OUTSTATION_THIRDPARTY_MODELS to the models")
    results = []
    for name, tiny in TINY.items():
        content = (THIRD_PARTY / f"{tiny.file}.tflite").read_bytes()
        low, high = TfliteModel(content).input_range
        noise = np.random.default_rng(0).uniform(low, high, (WINDOWS // 4 * tiny.frames, tiny.bands))
        rows = noise.astype(np.float32)
        with _packed(content, rows[: 1000 * tiny.frames], tiny.rest_of_spec, tiny.frames) as device:
            results.append(_compare_with_interpreter(device, rows, name, f"MLPerf Tiny {name}", tiny.target))
    return results


@benchmark("tabular", quick=True)
def sixteen_field_model() -> list[Result]:
    """Measure processor time per row in µs, against a rule engine that invokes the model once per message."""
    weights = np.random.default_rng(3).normal(0, 1, (3, FIELDS)).astype(np.float32)
    rows = np.random.default_rng(4).normal(0, 1, (100_000, FIELDS)).astype(np.float32)
    rest = 'kind = "classify"\nlabels = ["a", "b", "c"]\n[output]\nactivation = "softmax"\n[drift]\nwindow = 1000'
    with _packed(write_models.model("int8", weights), rows[:40_000], rest) as device:
        plain = _interpreter(device)

        def one_by_one() -> int:
            for row in rows[:5000]:
                _invoke(plain, row[None])
            return 5000

        pace = rates(device.work_off, one_by_one, device.cpu_s, rounds=3, prepare=lambda: device.fill(rows))
    note = "store to committed results, drift of 16 fields included"
    return [
        Result.within("tabular", 1e6 / pace.ours, 1.5, "µs/row", note, "CPU"),
        Result.timed(
            "row at a time",
            pace,
            "rows/s",
            12.0,
            "reference: quantize and invoke a row at a time, nothing else",
        ),
    ]


def _compare_with_interpreter(device: Bed, rows: Floats, name: str, description: str, target: float = 0.45) -> Result:
    spec = device.task.bundle.manifest.input
    count = len(rows) // device.task.window_rows
    ready = features.build_windows(rows, np.arange(count, dtype=np.int64) * device.task.window_rows, spec)
    model = TfliteModel(device.task.bundle.model_bytes)
    quantized = model.input.quantize(ready.reshape(count, *model.input_shape))
    plain = _interpreter(device)
    batch = min(MAX_BATCH, count)

    def bare() -> int:
        for start in range(0, count - batch + 1, batch):
            _raw(plain, quantized[start : start + batch])
        return count // batch * batch

    pace = rates(device.work_off, bare, device.cpu_s, rounds=5, prepare=lambda: device.fill(rows))
    note = (
        f"{description}, {count:,} windows waiting, drift and signature included; "
        "processor time with that of the confined model; reference: set, invoke, get of prepared int8"
    )
    return Result.timed(name, pace, "windows/s", target, note)


def _interpreter(device: Bed) -> Any:
    made = Interpreter(model_content=device.task.bundle.model_bytes, num_threads=1)
    made.allocate_tensors()
    return made


def _raw(plain: Any, part: Any) -> Any:
    into, out = plain.get_input_details()[0], plain.get_output_details()[0]
    if list(into["shape"]) != list(part.shape):
        plain.resize_tensor_input(into["index"], part.shape, strict=True)
        plain.allocate_tensors()
    plain.set_tensor(into["index"], part)
    plain.invoke()
    return plain.get_tensor(out["index"])


def _invoke(plain: Any, row: Floats) -> int:
    into = plain.get_input_details()[0]
    scale, zero = into["quantization"]
    return int(_raw(plain, np.clip(np.rint(row / scale) + zero, -128, 127).astype(np.int8)).argmax())


@contextmanager
def _packed(model: bytes, rows: Floats, rest_of_spec: str, frames: int = 1) -> Iterator[Bed]:
    """Create a device with the model and reference rows; `rest_of_spec` completes the SPEC after its input section."""
    fields = [f"f{i:03}" for i in range(rows.shape[1])]
    head, _, output = rest_of_spec.partition("[output]")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "model.tflite").write_bytes(model)
        table = {"t": np.arange(len(rows)) / 1000} | dict(zip(fields, rows.T, strict=True))
        parquet.write_table(pa.table(table), folder / "rows.parquet")
        window = f"window = {{ rows = {frames}, step = {frames} }}\n" if frames > 1 else ""
        (folder / "spec.toml").write_text(
            'name = "benched"\nversion = "1.0.0"\ncreated = "2026-11-24T00:00:00Z"\nmodel = "model.tflite"\n'
            f'reference = "rows.parquet"\ngolden = "rows.parquet"\n{head}\n[input]\nfields = {fields}\n{window}'
            f"{'[output]' + output if output else ''}\n".replace("'", '"'),
            encoding="utf-8",
        )
        pack.write_bundle(pack.pack(folder / "spec.toml", KEY), folder / "bundle")
        with device_task.device_with_task(
            fields, str(folder / "bundle"), step_us=1000, publisher=KEY.public.text
        ) as device:
            yield device
