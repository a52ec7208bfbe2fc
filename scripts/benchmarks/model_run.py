"""`model run` over files, against a plain loop that reads the same files and invokes the interpreter per row.

First all answers are compared: they must be bit-identical.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.runtime import Interpreter  # type: ignore[attr-defined]
from outstation.workbench.authoring import pack, scaffold
from outstation.workbench.cli.model.run import load_bundle
from outstation.workbench.evaluation.predict.run import BatchPredictor
from scripts import benchmarks
from scripts.benchmarks import Result, benchmark, rates
from scripts.kit.bundles import KEY, THIRD_PARTY

MODELS = {
    "ad01": "mlperf_ad01_int8",
    "kws": "mlperf_kws_int8",
    "resnet8": "mlperf_resnet8_cifar_int8",
    "vww96": "mlperf_vww96_int8",
    "mobilenet": "coral_mobilenet_v1_0.25_128_quant",
}
ROWS = 1000
ROUNDS = 3
TARGET = 0.8

Floats = NDArray[np.float32]


@benchmark("model-run")
def compare_with_plain_loop() -> list[Result]:
    """Compare all third-party models in this checkout."""
    if not THIRD_PARTY.exists():
        raise click.ClickException(f"{THIRD_PARTY}: no such folder; set OUTSTATION_THIRDPARTY_MODELS to the models")
    results = []
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            results.append(measured(name, Case.made(Path(folder), THIRD_PARTY / f"{model}.tflite")))
    return results


class Case(msgspec.Struct, frozen=True):
    """A bundle and data of `windows` model inputs: a Parquet file, or a folder of PNG files."""

    folder: Path
    model: bytes
    data: Path
    windows: int
    inference: Inference
    work: BatchPredictor
    raw: BatchPredictor

    @classmethod
    def made(cls, folder: Path, model: Path) -> Case:
        windows = benchmarks.rows or ROWS
        spec = folder / "spec.toml"
        text = scaffold.scaffold_spec(model, spec, None).text
        # The threshold of an anomaly detector does not matter here.
        spec.write_text(text.replace("quantile = 0.99", "threshold = 1.0"), encoding="utf-8")
        pack.write_bundle(pack.pack(spec, KEY), folder / "bundle")
        bundle, inference, _ = load_bundle(folder / "bundle", None)
        data = write(folder, inference, windows)
        works = BatchPredictor(bundle, inference), BatchPredictor(bundle, inference, raw=True)
        return cls(folder, bundle.model_bytes, data, windows, inference, *works)

    def run(self, work: BatchPredictor) -> Path:
        out = self.folder / "out.parquet"
        out.unlink(missing_ok=True)
        work.predict_file(self.data, out, lambda *_: None)
        return out


def write(folder: Path, inference: Inference, windows: int) -> Path:
    random, spec = np.random.default_rng(0), inference.manifest.input
    if (image := spec.image) is not None:
        (folder / "data").mkdir()
        for index in range(windows):
            shape = (image.height, image.width, image.channels)
            Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(folder / "data" / f"{index:06}.png")
        return folder / "data"
    low, high = inference.model.input_range
    rows = random.uniform(low, high, (windows * spec.rows, len(spec.fields))).astype(np.float32)
    # Rows are a millisecond apart, so that no gap splits a window.
    table = {"t": np.arange(len(rows)) / 1000} | dict(zip(spec.fields, rows.T, strict=True))
    parquet.write_table(pa.table(table), folder / "data.parquet")
    return folder / "data.parquet"


class Plain:
    """A hand-written inference loop without our code."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._interpreter: Any = Interpreter(model_content=case.model, num_threads=1)
        self._interpreter.allocate_tensors()
        (self._into,), (self._out,) = self._interpreter.get_input_details(), self._interpreter.get_output_details()

    def run(self) -> int:
        """Read, quantize and invoke each row, and return the answers."""
        return len([self.answer(row) for row in self.rows()])

    def answer(self, row: Floats) -> tuple[int, float]:
        """Return label and score; for an autoencoder, whether the window is anomalous, and its reconstruction error."""
        out = self.values(self.invoke(self.quantized(row)))
        if self._case.inference.manifest.kind == "anomaly":
            error = float(np.square(out.astype(np.float64) - row.reshape(-1)).mean())
            return int(error > 1.0), error
        label = int(out.argmax())
        return label, float(out[label])

    def rows(self) -> Iterator[Floats]:
        spec = self._case.inference.manifest.input
        if (image := spec.image) is not None:
            for path in sorted(self._case.data.iterdir()):
                with Image.open(path) as file:
                    pixels = np.asarray(file.convert("RGB"), np.float32)
                yield pixels * np.float32(image.scale) + np.float32(image.offset)
            return
        table = parquet.read_table(self._case.data, columns=spec.fields)
        columns = np.stack([column.to_numpy() for column in table.columns], axis=1)
        yield from columns.reshape(self._case.windows, -1)

    def quantized(self, row: Floats) -> NDArray[Any]:
        (scale, zero), limits = self._into["quantization"], np.iinfo(self._into["dtype"])
        whole = np.rint(row.reshape(self._into["shape"]) / np.float32(scale)) + zero
        quantized: NDArray[Any] = np.clip(whole, limits.min, limits.max).astype(self._into["dtype"])
        return quantized

    def invoke(self, row: NDArray[Any]) -> NDArray[Any]:
        self._interpreter.set_tensor(self._into["index"], row)
        self._interpreter.invoke()
        out: NDArray[Any] = self._interpreter.get_tensor(self._out["index"]).reshape(-1)
        return out

    def values(self, out: NDArray[Any]) -> Floats:
        scale, zero = self._out["quantization"]
        values: Floats = (out.astype(np.float32) - zero) * np.float32(scale)
        return values


def measured(name: str, case: Case) -> Result:
    plain = Plain(case)
    table = parquet.read_table(case.run(case.raw))
    ours = np.stack([table[f"raw_{i}"].to_numpy() for i in range(case.inference.model.outputs)], axis=1)
    different = sum(
        ours[index].tobytes() != plain.values(plain.invoke(plain.quantized(row))).tobytes()
        for index, row in enumerate(plain.rows())
    )
    if different or len(ours) != case.windows:
        raise click.ClickException(f"{name}: {different} of {len(ours)} predictions differ from the plain loop")

    def predict() -> int:
        case.run(case.work)
        return case.windows

    pace = rates(predict, plain.run, rounds=ROUNDS)
    note = f"{case.windows:,} predictions bit-identical; interpreter alone {interpreter_rate(plain):,.0f} rows/s"
    return Result.timed(f"model-run-{name}", pace, "rows/s", TARGET, note)


def interpreter_rate(plain: Plain) -> float:
    """Return the rows per second of the interpreter alone."""
    rows = [plain.quantized(row) for row in itertools.islice(plain.rows(), ROWS)]
    seconds = []
    for _ in range(ROUNDS):
        started_s = time.perf_counter()
        for row in rows:
            plain.invoke(row)
        seconds.append(time.perf_counter() - started_s)
    return len(rows) / statistics.median(seconds)
