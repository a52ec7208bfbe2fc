"""A fleet on this machine: a real broker, a collector and device daemons, each in a process that a test can kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.config import BrokerConfig
from agent.fleet.config import FleetConfig
from agent.fleet.database.store import FleetStore
from agent.fleet.enrolment.enrol import enrol, init_fleet
from agent.model.bundle import builtin
from agent.testing.broker import Mosquitto
from agent.testing.process import Program, eventually, outstation

FLEET = "acme"
RECORDINGS = builtin.recordings_dir() / "exercise.npz"
FIELDS = ("ax", "ay", "az", "wx", "wy", "wz")


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
