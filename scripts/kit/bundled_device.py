"""A device with a task for each bundle in models/, and one run of it: init, ingest, batch, status, results.

    python -m scripts.kit.bundled_device FOLDER

Each command is a process of its own, as at a device without a collector. The results of the bundle `exercise` must be
the answers of its golden vectors, whose inputs are ingested as readings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from outstation.foundation.arrays import Float64s
from outstation.ml.datasets import recordings
from outstation.ml.model.bundle import golden_vectors
from outstation.ml.model.bundle.golden_vectors import GoldenVectors
from outstation.ml.model.inference.runtime_name import runtime_name

MODELS = Path(__file__).parents[2] / "models"
# Bundle → rows, and how many results they give: windows of 100 and of 5 rows, and single rows.
ROWS = {"exercise": (3_200, 32), "machine": (500, 100), "solar": (500, 500)}
# More than 2**31 µs in a batch of some: a 32-bit machine must count them as well.
STEP_S = {"exercise": 0.02, "machine": 0.5, "solar": 900.0}
_BEGIN_S = 1_764_590_400
_PROBE_RETRIES = 3


def run(*arguments: str | Path) -> str:
    """Run a command of the program, and return its output. Raises CalledProcessError."""
    command = [sys.executable, "-m", "outstation", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write_rows(folder: Path, bundle: str) -> str:
    """Write a CSV of the bundle's readings, with a column `t` in epoch seconds; return stream and task for it."""
    table, rows = recordings.load(MODELS / "recordings" / f"{bundle}.npz"), ROWS[bundle][0]
    values = restore_golden_rows() if bundle == "exercise" else table.rows[:rows]
    t = _BEGIN_S + STEP_S[bundle] * np.arange(rows, dtype=np.float64)
    columns, header = np.column_stack([t, values]), ",".join(["t", *table.fields])
    np.savetxt(folder / f"{bundle}.csv", columns, "%.15g", ",", header=header, comments="")
    fields = ", ".join(f'{{ name = "{name}" }}' for name in table.fields)
    return f'[streams.{bundle}]\nfields = [{fields}]\n[tasks.{bundle}]\nstream = "{bundle}"\nbundle = "{bundle}"\n'


def restore_golden_rows() -> Float64s:
    """Return the readings (n, F) whose scaled windows are the golden inputs of `exercise`."""
    inputs = _read_golden().inputs.astype(np.float64)
    scale = _read_manifest()["input"]
    rows: Float64s = inputs.reshape(-1, inputs.shape[-1]) * scale["std"] + scale["mean"]
    return rows


def compare_with_golden(results: list[dict[str, Any]]) -> None:
    """Raise SystemExit if a result of `exercise` is not the class and score that its golden vector expects."""
    golden, output = _read_golden(), _read_manifest()["output"]
    is_same_runtime = runtime_name().split()[0] == golden.runtime.split()[0]
    tolerance = golden.tolerance if is_same_runtime else golden.other_runtime_tolerance
    labels = [output["labels"][index] for index in golden.expected.argmax(axis=1)]
    powers = golden.expected.astype(np.float64) ** (1 / output["temperature"])
    scores = (powers / powers.sum(axis=1, keepdims=True)).max(axis=1)
    largest = max(abs(result["score"] - score) for result, score in zip(results, scores, strict=True))
    print(f"results: {len(results)}, scores within {largest:.4f} of the golden vectors, {tolerance:.4f} allowed")
    if [result["label"] for result in results] != labels or largest > tolerance:
        sys.exit(f"the golden vectors expect {labels}")


def _read_manifest() -> Any:
    return json.loads((MODELS / "exercise" / "manifest.json").read_text(encoding="utf-8"))


def _read_golden() -> GoldenVectors:
    return golden_vectors.decode((MODELS / "exercise" / "golden.npz").read_bytes())


def run_batch(config: Path) -> None:
    """Run all tasks; again where a probe exceeds its limit of wall-clock time, as on an emulated, busy processor."""
    for _ in range(_PROBE_RETRIES):
        try:
            run("batch", "-c", config)
            return
        except subprocess.CalledProcessError:
            continue
    run("batch", "-c", config)


def main(folder: Path) -> None:
    """Raise SystemExit if a task has not the results that its rows give."""
    run("init", folder)
    config = folder / "outstation.toml"
    with config.open("a", encoding="utf-8") as file:
        file.writelines(write_rows(folder, bundle) for bundle in ROWS)
    for bundle in ROWS:
        run("ingest", bundle, folder / f"{bundle}.csv", "-c", config)
    run_batch(config)
    status = json.loads(run("status", "--json", "-c", config))
    windows = {task["task"]: task["windows"] for task in status["tasks"]}
    print(f"windows: {windows}")
    expected = {bundle: results for bundle, (_, results) in ROWS.items()}
    if windows != expected:
        sys.exit(f"there should be {expected}")
    compare_with_golden(json.loads(run("results", "exercise", "--last", "32", "--json", "-c", config)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
