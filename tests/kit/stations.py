"""Intake of a device for tests: config, store and intake, in this process or in one that can be killed."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from outstation.device import config
from outstation.device.config.config import Config
from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.server import Intake
from outstation.device.intake.source import Source
from outstation.device.recovery.open import open_store
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.ml.performance.labels import LabelTarget
from outstation.workbench.testing.process import ManagedProcess

ROOT = Path(__file__).parents[2]
WATCH = StreamConfig(
    fields=[FieldConfig(name="ax", unit="g", min=-16, max=16), FieldConfig(name="ay", unit="g", min=-16, max=16)]
)
MACHINE = StreamConfig(
    fields=[
        FieldConfig(name="power", type="f64", min=0),
        FieldConfig(name="count", type="i64"),
        FieldConfig(name="mode", type="category"),
        FieldConfig(name="heat", optional=True),
    ]
)
STREAMS = {"watch": WATCH, "machine": MACHINE}
T0 = 1_764_022_680.0


def conf(folder: Path, commit_every_s: float = 0.02, tcp: str | None = None, **streams: StreamConfig) -> Config:
    """Return a device's config with its data in `folder`."""
    return Config(
        device=config.DeviceConfig(id="pi-07", fleet="acme", data_dir=str(folder)),
        buffer=config.BufferConfig(commit_every=config.Duration(commit_every_s)),
        intake=config.IntakeConfig(tcp=tcp),
        streams=streams or STREAMS,
    )


class Station:
    """Context manager of a store and running intake of `conf`; `failures` holds fatal errors of the intake."""

    def __init__(
        self,
        conf: Config,
        *,
        sources: Callable[[Store], Sequence[Source]] | None = None,
        label_targets: Callable[[], Mapping[str, LabelTarget]] = dict,
        label_key: bytes | None = None,
        **store: Any,
    ) -> None:
        self.conf = conf
        self.failures: list[Exception] = []
        self.commits = 0
        self.store = open_store(conf.data_dir, **store)
        self.store.declare_streams(conf.streams)
        made = sources(self.store) if sources else []
        self.intake = Intake(
            *(conf, self.store, made, clock.read, self._committed, self.failures.append), label_targets, label_key
        )
        self.socket = conf.data_dir / "intake.sock"

    def _committed(self) -> None:
        self.commits += 1

    def __enter__(self) -> Station:
        self.intake.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.intake.stop()
        self.store.close()

    def line(self) -> Line:
        return Line(self.socket)

    def rows(self, stream: str) -> Rows:
        return rows_of(self.store, stream, self.conf.streams[stream])


class Line:
    """Raw connection to an intake."""

    def __init__(self, address: Path | tuple[str, int]) -> None:
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET)
        self.socket.settimeout(60)
        self.socket.connect(str(address) if isinstance(address, Path) else address)
        self._answers = self.socket.makefile("rb")

    def send(self, *lines: bytes | dict[str, Any]) -> None:
        encoded = [line if isinstance(line, bytes) else msgspec.json.encode(line) for line in lines]
        self.socket.sendall(b"".join(line + b"\n" for line in encoded))

    def answer(self) -> dict[str, Any]:
        return msgspec.json.decode(self._answers.readline(), type=dict[str, Any])

    def through(self, line: int) -> dict[str, Any]:
        """Return all responses up to the one that reaches `line`, merged."""
        total: dict[str, Any] = {"through": 0, "accepted": 0, "rejected": []}
        while total["through"] < line:
            answer = self.answer()
            total["through"] = answer["through"]
            total["accepted"] += answer["accepted"]
            total["rejected"] += answer["rejected"]
        return total

    def hang_up(self) -> None:
        """Close the sending side; responses still arrive."""
        self.socket.shutdown(socket.SHUT_WR)

    def rest(self) -> list[dict[str, Any]]:
        """Return the responses until the agent closes the connection."""
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in self._answers]

    def close(self) -> None:
        self._answers.close()
        self.socket.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rows_of(store: Store, stream: str, definition: StreamConfig) -> Rows:
    """Return all rows of a stream, from row 1."""
    batch = store.read_rows(stream, definition.fields, 0, 2**40)
    assert batch is not None, f"stream {stream} has no rows"
    assert batch.loss_reason is None
    return batch.rows


_PROGRAM = """\
import signal, sys, threading
from pathlib import Path
from outstation.device import config
from tests.kit.stations import Station, conf

with Station(conf(Path(sys.argv[1]), float(sys.argv[2]))) as station:
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM])
"""


class Killable(ManagedProcess):
    """Intake process that can be killed at any moment and restarted."""

    def __init__(self, folder: Path, commit_every_s: float = 0.01) -> None:
        self._command = [sys.executable, "-c", _PROGRAM, str(folder), str(commit_every_s)]
        self.socket = folder / "intake.sock"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, cwd=ROOT)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        output = self._process and self._process.stdout
        super().kill()
        if output:
            output.close()

    def __enter__(self) -> Killable:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
