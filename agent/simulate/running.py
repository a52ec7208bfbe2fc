"""A simulated fleet on one machine: a real broker, the real collector and real device daemons on replayed recordings.

Each part is the program a user would start, in a process of its own. The faults are in the recordings' replay.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from agent.config import Broker, ReplaySource
from agent.config import load as load_config
from agent.device.incoming.sources.playlist import load
from agent.errors import OutstationError
from agent.fleet.enrol import enrol, init_fleet
from agent.fleet.store import FleetStore
from agent.simulate import brokers
from agent.simulate.meter import Meter
from agent.simulate.plan import Plan, Site

FLEET = "demo"
_START_S = 10.0
_LOOK_S, _SETTLED_S = 0.5, 2.0


@dataclass
class Simulation:
    """The running fleet in `folder`. Use as a context: leaving it ends every process it started."""

    folder: Path
    plan: Plan
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    broker_name: str = ""
    _embedded: Any = None
    _meters: dict[str, Meter] = field(default_factory=dict)

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        if self._embedded is not None:
            self._embedded.stop()

    def start(self) -> None:
        """Broker, collector, devices, in this order. Raises OutstationError where one does not come up."""
        broker = Broker(url=f"mqtt://127.0.0.1:{_free_port()}")
        config = init_fleet(self.folder / "fleet", FLEET, broker)
        self._start_broker(broker)
        self._spawn("collector", "fleet", "collect", "--dir", str(self.folder / "fleet"))
        store = FleetStore(Path(config.fleet.db))
        try:
            for site in self.plan.sites:
                home = enrol(self.folder / "fleet", config, store, site.device, key=None, replace=False).folder
                self._write_config(home / "outstation.toml", site)
                self._spawn(site.device, "run", "-c", str(home / "outstation.toml"))
                self._add_meter(home / "outstation.toml", site)
        finally:
            store.close()

    def watch(self, until_s: float) -> Iterator[list[dict[str, Any]]]:
        """The collector's view, twice a second, until all rows were judged or `until_s` (monotonic) has passed."""
        store = FleetStore(self.database, read_only=True)
        before, still_s = list[int](), 0.0
        try:
            while True:
                self._check_alive()
                view = store.progress()
                self._read_meters(view)
                yield view
                # The tail of the last recording may fill no window.
                done = [row for row in view if row["rows"] >= self.plan.rows - self.plan.scenario.tail]
                told = [row["messages"] for row in view]
                still_s = 0.0 if told != before else still_s + _LOOK_S
                before = told
                # What labels say of the last rows comes after these.
                settled = not self._meters or still_s >= _SETTLED_S
                if (len(done) == len(self.plan.sites) and settled) or time.monotonic() > until_s:
                    return
                time.sleep(_LOOK_S)
        finally:
            store.close()

    def stop(self) -> None:
        """Devices, then the collector, each by SIGTERM; they finish what they have in hand."""
        for meter in self._meters.values():
            meter.close()
        for names in ([site.device for site in self.plan.sites], ["collector"]):
            running = [self.processes[name] for name in names if name in self.processes]
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()

    @property
    def database(self) -> Path:
        return self.folder / "fleet" / "fleet.db"

    def _read_meters(self, view: list[dict[str, Any]]) -> None:
        """Labels for what the collector has seen judged by now."""
        judged = {row["device"]: row["rows"] for row in view}
        for device, meter in self._meters.items():
            meter.read(judged.get(device, 0))

    def _start_broker(self, broker: Broker) -> None:
        command = brokers.mosquitto(self.folder / "fleet")
        if command is not None:
            self._spawn_command("broker", command)
            self.broker_name = "Mosquitto"
        else:
            self._embedded = brokers.embedded(self.folder, broker.port)
            self.broker_name = "iotcore (embedded, for this demo only)"
        deadline = time.monotonic() + _START_S
        while not _listens(broker.port):
            if time.monotonic() > deadline:
                raise OutstationError(f"the broker did not start: see {self.folder / 'broker.log'}")
            self._check_alive()
            time.sleep(0.05)

    def _write_config(self, file: Path, site: Site) -> None:
        """Stream and task for the config that enrolment wrote."""
        scenario = self.plan.scenario
        fields = ", ".join(f'{{ name = "{name}", unit = "{unit}" }}' for name, unit in scenario.fields)
        source = ReplaySource(
            file=str(scenario.file),
            subject=site.subject,
            seed=site.seed,
            speed=self.plan.speed,
            rows=self.plan.rows,
            faults=list(site.fate.faults),
            scenes=list(site.fate.scenes),
            skip=scenario.skip,
        )
        file.write_text(
            file.read_text(encoding="utf-8")
            + '\n[buffer]\ncommit_every = "500 ms"\n'
            + f"\n[streams.{scenario.stream}]\nfields = [{fields}]\n"
            + f"source = {_toml_value(msgspec.to_builtins(source))}\n"
            + f'\n[tasks.{scenario.name}]\nstream = "{scenario.stream}"\nbundle = "{scenario.bundle}"\n'
            + f'schedule = "every 1 s"\nlearn = {scenario.learn}\n',
            encoding="utf-8",
        )

    def _add_meter(self, config: Path, site: Site) -> None:
        measured = self.plan.scenario.measured
        if measured is not None:
            address = load_config(config).data_dir / "intake.sock"
            told = self.plan.metered(load(self.plan.scenario.file), site)
            self._meters[site.device] = Meter(address, self.plan.scenario.name, measured, told)

    def _spawn(self, name: str, *arguments: str) -> None:
        self._spawn_command(name, [sys.executable, "-m", "agent", *arguments])

    def _spawn_command(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _check_alive(self) -> None:
        for name, process in self.processes.items():
            if process.poll() not in (None, 0):
                log = self.folder / f"{name}.log"
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                raise OutstationError(f"{name} ended with code {process.returncode}: {' '.join(last)} (see {log})")


def _toml_value(value: Any) -> str:
    """Of a config, where what is None goes without saying."""
    if isinstance(value, dict):
        members = (f"{key} = {_toml_value(member)}" for key, member in value.items() if member is not None)
        return "{ " + ", ".join(members) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return msgspec.json.encode(value).decode() if isinstance(value, str) else repr(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
