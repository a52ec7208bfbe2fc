"""The daemon as a process: memory, startup time and idle cost."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from outstation.ml.datasets.recordings import load
from outstation.workbench.testing.fleet import FIELDS, RECORDINGS, DeviceProcess
from outstation.workbench.testing.process import run_outstation
from scripts.benchmarks import Result, benchmark
from scripts.benchmarks.device_task import append_rows, device_process
from scripts.kit.process_stats import cpu_s, pss_mb

WINDOWS = 100_000
_IDLE_S = 60.0
_STARTS = 5


@benchmark("memory")
def resident_memory() -> list[Result]:
    """Measure PSS of daemon and model process, idle and at the peak while a backlog is processed."""
    with device_process(FIELDS) as device:
        device.start_and_wait()
        alone = pss_mb(device.pid)
        device.stop()
        device.add_task("exercise").start_and_wait()
        idle = pss_mb(device.pid)
        device.stop()
        _fill(device, WINDOWS)
        device.start_and_wait()
        most = idle
        end = time.monotonic() + 30
        while time.monotonic() < end:
            most = max(most, pss_mb(device.pid))
            time.sleep(0.2)
        device.stop()
    return [
        Result.within("memory, idle, without a model", alone, 53.0, "MB PSS", "daemon with one stream"),
        Result.within("memory, idle", idle, 75.0, "MB PSS", "daemon and the confined exercise model"),
        Result.within("memory, busy", most, 110.0, "MB PSS", f"{WINDOWS:,} windows waiting, peak within 30 s"),
    ]


@benchmark("startup")
def start_to_first_batch() -> Result:
    """Measure `outstation batch` with 100 waiting windows, against the imports it needs."""
    bare = [sys.executable, "-c", "import numpy, ai_edge_litert.interpreter"]
    seen: tuple[list[float], list[float]] = ([], [])
    with device_process(FIELDS) as device, tempfile.TemporaryDirectory() as compiled:
        # Bytecode is compiled beforehand, as pip does at installation.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = compiled
        device.add_task("exercise")
        # Autotuning results and bytecode are cached; both cost time only at the first start.
        for round_ in range(_STARTS + 1):
            _fill(device, 100)
            begin = time.perf_counter()
            done = run_outstation("batch", "-c", str(device.config), env=env)
            middle = time.perf_counter()
            subprocess.run(bare, check=True, capture_output=True, env=env)
            if round_:
                seen[0].append(middle - begin)
                seen[1].append(time.perf_counter() - middle)
            assert done.returncode == 0, done.stderr
    ours, reference = statistics.median(seen[0]), statistics.median(seen[1])
    note = "process start to results committed and process end; reference: import of numpy and the interpreter"
    return Result("startup", ours * 1e3, reference * 1e3, "ms", 2.0, note, less=True)


@benchmark("idle")
def idle_daemon() -> Result:
    """Measure an idle daemon: one stream at 1 Hz, one task per minute, a broker that responds."""
    with device_process() as device:
        device.add_replay_stream(10**6, 1 / 50)
        device.add_task("exercise", schedule="every 60 s").start_and_wait()
        time.sleep(5)
        begin_s, started_s = cpu_s(device.pid, children=True), time.monotonic()
        time.sleep(_IDLE_S)
        share = 100 * (cpu_s(device.pid, children=True) - begin_s) / (time.monotonic() - started_s)
        device.stop()
    return Result.within("idle", share, 0.3, "% of a core", f"over {_IDLE_S:.0f} s, no broker reachable")


def _fill(device: DeviceProcess, windows: int) -> None:
    rows = np.resize(load(RECORDINGS).rows, (windows * 100, len(FIELDS)))
    append_rows(device.config, "watch", rows)
