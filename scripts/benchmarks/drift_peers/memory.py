"""Memory of the drift monitor, measured in a separate process.

    python -m scripts.benchmarks.drift_peers.memory FILE ROWS BATCH

Prints JSON in MB of resident memory: the cost of the imports, and the peak above it from parsing the bundle's reference
to the last window. FILE comes from `write` and is read before the measurement. The model answers every ROWS rows. BATCH
rows are monitored at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from scripts.benchmarks.drift_peers.peer import peak, status

FIELDS = 16
WATCHED = 110  # windows, for one batch of the largest kind


def write(file: Path, model_rows: int) -> None:
    from scripts.benchmarks.drift_peers import ours, synthetic

    kind = synthetic.KINDS[0]
    shipped = np.frombuffer(ours.MonitorRun.from_kind(kind, model_rows).judge.shipped.to_json(), np.uint8)
    np.savez(file, shipped=shipped, learning=synthetic.learning(kind, 0), quiet=synthetic.quiet(kind, 0, WATCHED))


def measured(file: Path, model_rows: int, batch: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, str(file), str(model_rows), str(batch)]
    figures: dict[str, float] = json.loads(subprocess.check_output(command))
    return figures


def main() -> None:
    file, model_rows, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with np.load(file, allow_pickle=False) as data:
        shipped, tables = data["shipped"].tobytes(), [data["learning"], data["quiet"]]
    batches = [table[at : at + batch] for table in tables for at in range(0, len(table), batch)]
    features = [np.ascontiguousarray(table[:, :FIELDS]) for table in batches]
    before = status("VmRSS")
    from outstation.ml.drift import DriftMonitor, MonitorSettings, Reference
    from scripts.benchmarks.drift_peers import ours

    imported = status("VmRSS") - before
    with peak() as grown:
        judge = DriftMonitor(
            MonitorSettings(
                Reference.from_json(shipped), labels=ours.LABELS, window=500 // model_rows, learn_windows=40
            )
        )
        watch, state = ours.MonitorRun(judge, model_rows), judge.start()
        for table, columns in zip(batches, features, strict=True):
            state, _ = watch.step(state, table, columns)
    assert state.site_reference is not None
    print(json.dumps({"import_mb": imported / 1024, "work_mb": grown[0] / 1024}))


if __name__ == "__main__":
    main()
