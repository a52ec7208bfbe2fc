"""Device fixture for benchmarks: a store, a task with its bundle, and rows; no broker and no threads."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.bootstrap import tasks
from outstation.device.bootstrap.device import KEY_FILE, load_config, open_message_log, open_store
from outstation.device.pipeline import batch
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.store.message_log import MessageLog
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import enrol_on_this_machine, init_fleet
from outstation.foundation import clock
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.wire import keys
from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.fleet import FLEET, DeviceProcess, field_tables
from scripts.kit.process_stats import running_s

CHUNK = 8192
Floats = NDArray[np.float32]


class Bed(msgspec.Struct):
    """A device under measurement: `fill` appends rows (n, F), `work_off` runs batches until the backlog is empty."""

    store: Store
    task: LoadedTask
    author: MessageLog
    step_us: int

    def fill(self, rows: Floats, jitter_us: int = 0) -> None:
        """Append `rows` at a steady pace; each time is up to `jitter_us` later."""
        _append(self.store, self.task.config.stream, rows, self.step_us, jitter_us)

    def cpu_s(self) -> float:
        """Return the processor time of this process and of the confined model's."""
        model = self.task.model
        pid = model.pid if isinstance(model, SubprocessModel) else None
        return time.process_time() + (running_s(pid) if pid else 0.0)

    def work_off(self) -> int:
        """Run batches until the backlog is empty, and return the number of model windows."""
        done = 0
        while (step := batch.run(self.task, self.store, self.author, clock.read())) is not None:
            done += step.windows
        return done


@contextlib.contextmanager
def device_with_task(
    fields: Sequence[str], bundle: str, *, step_us: int = 20_000, publisher: str = "", confinement: str = "auto"
) -> Iterator[Bed]:
    """Create a device with one task on a stream of these fields.

    `bundle` is a name or a path, `publisher` the public key that verifies it.
    """
    listed = ", ".join(field_tables(fields))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outstation.toml"
        file.write_text(
            f'[device]\nid = "bench"\nfleet = "bench"\ndata_dir = "data"\n[publishers]\nkeys = ["{publisher}"]\n'
            f'[models]\nconfinement = "{confinement}"\n'
            f'[streams.rows]\nfields = [{listed}]\n[tasks.task]\nstream = "rows"\nbundle = "{bundle}"\n'.replace(
                'keys = [""]', "keys = []"
            ),
            encoding="utf-8",
        )
        _, conf = load_config(str(file))
        keys.generate(Path(folder) / KEY_FILE)
        with open_store(conf) as store:
            task = tasks.load_task(file, conf, store, "task")
            yield Bed(store, task, open_message_log(file, conf, store), step_us)


@contextlib.contextmanager
def device_process(fields: Sequence[str] = (), stream: str = "watch") -> Iterator[DeviceProcess]:
    """Create a device to run as a separate process, with a stream of these fields and no broker."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "fleet"
        config = init_fleet(home, FLEET, BrokerConfig(url=f"mqtt://127.0.0.1:{free_port()}"))
        store = FleetStore(Path(config.fleet.db))
        made = enrol_on_this_machine(home, config, store, "pi-01", Path(folder) / "pi-01")
        store.close()
        device = DeviceProcess(made, "pi-01")
        if fields:
            listed = ", ".join(field_tables(fields))
            device.append_config(f"[streams.{stream}]\nfields = [{listed}]\n")
        try:
            yield device
        finally:
            device.kill()


def append_rows(config: Path, stream: str, rows: Floats, step_us: int = 20_000) -> None:
    """Append rows to the store of a stopped device."""
    _, conf = load_config(str(config))
    with open_store(conf) as store:
        _append(store, stream, rows, step_us)


def _append(store: Store, stream: str, rows: Floats, step_us: int, jitter_us: int = 0) -> None:
    rng = np.random.default_rng(0)
    stored = store.last_row(stream)
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        t = (np.arange(len(part), dtype=np.int64) + stored + start) * step_us
        t += rng.integers(0, jitter_us + 1, len(part))
        with store.transaction() as tx:
            tx.append(stream, Rows(t, tuple(np.ascontiguousarray(c) for c in part.T)), "synced")
