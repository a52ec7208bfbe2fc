"""A device with a task for each bundle in models/, and one run of it: init, ingest, batch, status.

    python -m scripts.kit.bundled_device FOLDER

Each command is a process of its own, as at a device without a collector.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from agent.datasets import recordings

MODELS = Path(__file__).parents[2] / "models"
# Bundle → rows of its recordings, and how many results they give: windows of 100 and of 5 rows, and single rows.
ROWS = {"exercise": (3_000, 30), "machine": (500, 100), "solar": (500, 500)}
# More than 2**31 µs in a batch of some: a 32-bit machine must count them as well.
STEP_S = {"exercise": 0.02, "machine": 0.5, "solar": 900.0}
_BEGIN_S = 1_764_590_400


def run(*arguments: str | Path) -> str:
    """Run a command of the program, and return its output. Raises CalledProcessError."""
    command = [sys.executable, "-m", "agent", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write_rows(folder: Path, bundle: str) -> str:
    """Write a CSV of the bundle's recordings, with a column `t` in epoch seconds; return stream and task for it."""
    table, rows = recordings.load(MODELS / "recordings" / f"{bundle}.npz"), ROWS[bundle][0]
    t = _BEGIN_S + STEP_S[bundle] * np.arange(rows, dtype=np.float64)
    columns, header = np.column_stack([t, table.rows[:rows]]), ",".join(["t", *table.fields])
    np.savetxt(folder / f"{bundle}.csv", columns, "%.15g", ",", header=header, comments="")
    fields = ", ".join(f'{{ name = "{name}" }}' for name in table.fields)
    return f'[streams.{bundle}]\nfields = [{fields}]\n[tasks.{bundle}]\nstream = "{bundle}"\nbundle = "{bundle}"\n'


def main(folder: Path) -> None:
    """Raise SystemExit if a task has not the results that its rows give."""
    run("init", folder)
    config = folder / "outstation.toml"
    with config.open("a", encoding="utf-8") as file:
        file.writelines(write_rows(folder, bundle) for bundle in ROWS)
    for bundle in ROWS:
        run("ingest", bundle, folder / f"{bundle}.csv", "-c", config)
    run("batch", "-c", config)
    status = json.loads(run("status", "--json", "-c", config))
    windows = {task["task"]: task["windows"] for task in status["tasks"]}
    print(f"windows: {windows}")
    expected = {bundle: results for bundle, (_, results) in ROWS.items()}
    if windows != expected:
        sys.exit(f"there should be {expected}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
