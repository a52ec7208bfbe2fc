"""A whole fleet on this machine: real broker, collector and device daemons, each in a process that a test can kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from agent.config import BrokerConfig
from agent.fleet.config import FleetConfig
from agent.fleet.database.store import FleetStore
from agent.fleet.enrolment.enrol import enrol, init_fleet
from tests.kit.brokers import Mosquitto

FLEET = "acme"
RECORDINGS = Path(__file__).parents[2] / "models" / "recordings" / "exercise.npz"
FIELDS = ("ax", "ay", "az", "wx", "wy", "wz")
# Long: a machine that is busy with other tests is slow, and where all goes well nobody waits for it.
PATIENCE_S = 90.0


def eventually(what: str, true: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait for it, or fail and say what did not come."""
    deadline = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience_s:g} s: {what}")
        time.sleep(0.05)


def outstation(*arguments: str, within_s: float = PATIENCE_S, **options: Any) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    command = [sys.executable, "-m", "agent", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=within_s, check=False, **options)


class Program:
    """`outstation …` in a process of its own, with its output in a file."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self._arguments = arguments
        self.launcher: Sequence[str] = ("-m", "agent")
        self.before: Sequence[str] = ()
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, launcher: Sequence[str], before: Sequence[str] = ()) -> None:
        """From the next start on: what Python is given instead of `-m agent`, and what stands before Python."""
        self.launcher, self.before = launcher, before

    def start(self, **environment: str) -> Self:
        command = [*self.before, sys.executable, *self.launcher, *self._arguments]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **environment}
            )
        return self

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            self._process = None

    def stop(self, within_s: float = 60.0) -> int:
        """SIGTERM; its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(within_s)
        finally:
            self.kill()

    def wait(self, within_s: float) -> int:
        """Its exit code, once it ends by itself."""
        assert self._process is not None
        return self._process.wait(within_s)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def said(self, text: str) -> bool:
        """Whether its output has `text`."""
        return self.log.exists() and text in self.log.read_text(encoding="utf-8", errors="replace")


class Device(Program):
    """A device daemon with its own folder."""

    def __init__(self, home: Path, name: str) -> None:
        self.name, self.home, self.config = name, home, home / "outstation.toml"
        super().__init__(home / "log", "run", "-c", str(self.config))

    @property
    def data(self) -> Path:
        return self.home / "data"

    def starts(self) -> int:
        """How often it got as far as running."""
        return self.log.read_text(encoding="utf-8").count("running:") if self.log.exists() else 0

    def up(self, **environment: str) -> Device:
        """Start it, and wait until it runs."""
        before = self.starts()
        self.start(**environment)
        eventually(f"{self.name} runs; see {self.log}", lambda: self.starts() > before or not self.running)
        assert self.running, self.log.read_text(encoding="utf-8")
        return self

    def configure(self, text: str) -> Device:
        """Add to the config that enrolment wrote."""
        self.config.write_text(self.config.read_text(encoding="utf-8") + "\n" + text, encoding="utf-8")
        return self

    def replay(self, rows: int, speed: float, *, seed: int = 0, stream: str = "watch", buffer: str = "") -> Device:
        """A stream that replays recordings, committed often."""
        source = f'kind = "replay", file = "{RECORDINGS}", seed = {seed}, rows = {rows}, speed = {speed}'
        return self.configure(
            f'[buffer]\ncommit_every = "200 ms"\n{buffer}\n[streams.{stream}]\n'
            f"fields = [{', '.join(fields(FIELDS))}]\nsource = {{ {source} }}\n"
        )

    def task(self, name: str, *, stream: str = "watch", schedule: str = "every 500 ms", more: str = "") -> Device:
        return self.configure(
            f'[tasks.{name}]\nstream = "{stream}"\nbundle = "exercise"\nschedule = "{schedule}"\n{more}\n'
        )

    def status(self) -> Any:
        found = outstation("status", "--json", "-c", str(self.config))
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)


def fields(names: tuple[str, ...]) -> list[str]:
    return [f'{{ name = "{name}" }}' for name in names]


def ask(db: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """Rows of a collector's database."""
    store = FleetStore(db, read_only=True)
    try:
        return [tuple(row) for row in store._fetch_all(sql, *values)]
    finally:
        store.close()


def covered(db: Path, device: str, task: str = "exercise") -> int:
    """The last row whose results a collector has."""
    sql = "SELECT max(CAST(json_extract(CAST(payload AS TEXT), '$.rows[1]') AS INTEGER)) FROM messages"
    [(row,)] = ask(db, f"{sql} WHERE device = ? AND topic LIKE ?", device, f"%/results/{task}")
    return int(row or 0)


class Fleet:
    """Broker, collector and devices in `folder`. Use as a context: leaving it ends every process."""

    def __init__(self, folder: Path, *, mosquitto: Mosquitto | None = None) -> None:
        self.folder = folder
        self.broker = mosquitto or Mosquitto(folder)
        self.home = folder / "fleet"
        self.config: FleetConfig = init_fleet(self.home, FLEET, BrokerConfig(url=self.broker.url))
        self.collector = Program(folder / "collector.log", "fleet", "collect", "--dir", str(self.home))
        self.devices: list[Device] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for program in (*self.devices, self.collector):
            program.kill()
        self.broker.kill()

    def device(self, name: str) -> Device:
        """Enrol a device and make its folder."""
        store = self.open(write=True)
        try:
            home = enrol(self.home, self.config, store, name, key=None, replace=False).folder
        finally:
            store.close()
        self.devices.append(Device(home, name))
        return self.devices[-1]

    def open(self, *, write: bool = False) -> FleetStore:
        return FleetStore(Path(self.config.fleet.db), read_only=not write)

    def ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of the collector's database."""
        return ask(Path(self.config.fleet.db), sql, *values)

    def covered(self, device: str, task: str = "exercise") -> int:
        """The last row whose results the collector has."""
        return covered(Path(self.config.fleet.db), device, task)

    def audit(self) -> tuple[int, Any]:
        """Exit code and report of `fleet audit --json`."""
        done = outstation("fleet", "audit", "--json", "--dir", str(self.home))
        return done.returncode, json.loads(done.stdout)


class NotifySocket:
    """systemd's end of NOTIFY_SOCKET; `heard` is what it was told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self.path))
        self._thread.join(5)
        self._socket.close()

    def _listen(self) -> None:
        while word := self._socket.recv(4096):
            self.heard.append(word.decode())
