"""A simulated fleet on one machine: a real broker, the real collector and real device daemons on replayed recordings.

Each part is the program a user would start, in a process of its own. The faults are in the recordings' replay.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from agent.config import Broker
from agent.config import load as load_config
from agent.device.intake.sources.recordings import load
from agent.errors import OutstationError
from agent.fleet.config import FleetConfig
from agent.fleet.database.store import FleetStore
from agent.fleet.enrolment.enrol import enrol, init_fleet
from agent.simulate import brokers
from agent.simulate.device_config import stream_and_task
from agent.simulate.label_meter import Meter
from agent.simulate.plan import Plan, Site

FLEET = "demo"
_START_S = 10.0
_LOOK_S, _SETTLED_S = 0.5, 2.0
# Devices that start beside each other: more would only wait for the processor, and for each other.
_AT_ONCE, _UP_S = 4, 60.0
_MOST_RESTARTS = 3


class Simulation(msgspec.Struct):
    """The running fleet in `folder`. Use as a context: leaving it ends every process it started.

    `broker`: one that runs already; None: it starts its own. `more` is added to a device's config. `may_end`: processes
    that may end by themselves. `restarts`: what ended a device's daemon, each time.
    """

    folder: Path
    plan: Plan
    broker: str | None = None
    more: Callable[[Site], str] = lambda _: ""
    processes: dict[str, subprocess.Popen[bytes]] = msgspec.field(default_factory=dict)
    may_end: set[str] = msgspec.field(default_factory=set)
    restarts: dict[str, list[str]] = msgspec.field(default_factory=dict)
    broker_name: str = ""
    _fleet: FleetConfig | None = None
    _embedded: Any = None
    _meters: dict[str, Meter] = msgspec.field(default_factory=dict)

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        if self._embedded is not None:
            self._embedded.stop()

    def prepare(self) -> FleetConfig:
        """Make the fleet's folder, its keys and its broker's config, once."""
        if self._fleet is None:
            broker = Broker(url=self.broker or f"mqtt://127.0.0.1:{_free_port()}")
            self._fleet = init_fleet(self.home, FLEET, broker)
        return self._fleet

    def start(self) -> None:
        """Broker, collector, devices, in this order. Raises OutstationError where one does not come up."""
        config = self.prepare()
        self._start_broker(config.broker)
        self.spawn("collector", "fleet", "collect", "--dir", str(self.home))
        store = FleetStore(self.database)
        try:
            for site in self.plan.sites:
                home = enrol(self.home, config, store, site.device, key=None, replace=False).folder
                file = home / "outstation.toml"
                text = file.read_text(encoding="utf-8") + stream_and_task(self.plan, site) + self.more(site)
                file.write_text(text, encoding="utf-8")
                self._wait_for_room()
                self.begin(site.device)
                self._add_meter(file, site)
        finally:
            store.close()

    def begin(self, device: str) -> None:
        """Start the device's daemon."""
        self.may_end.discard(device)
        self.spawn(device, "run", "-c", str(self.config(device)))

    def end(self, device: str) -> None:
        """Stop the device's daemon, until `begin`."""
        self.may_end.add(device)
        self._stop([device])

    def watch(self, until_s: float) -> Iterator[list[dict[str, Any]]]:
        """The collector's view, twice a second, until all rows were judged or `until_s` (monotonic) has passed."""
        store = FleetStore(self.database, read_only=True)
        before, still_s = list[int](), 0.0
        try:
            while True:
                self.check_alive()
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
        self._stop([site.device for site in self.plan.sites])
        self._stop(["collector"])

    @property
    def home(self) -> Path:
        """The fleet's folder."""
        return self.folder / "fleet"

    @property
    def database(self) -> Path:
        return self.home / "fleet.db"

    def config(self, device: str) -> Path:
        return self.home / "devices" / device / "outstation.toml"

    def log(self, name: str) -> Path:
        """What a process wrote to its stdout and stderr."""
        return self.folder / f"{name}.log"

    def spawn(self, name: str, *arguments: str) -> None:
        """Run `outstation …` as the process `name`."""
        self._spawn_command(name, [sys.executable, "-m", "agent", *arguments])

    def check_alive(self) -> None:
        """A device's daemon that ended is started again, as by systemd.

        Raises OutstationError where another process ended that should not have, or a daemon did again and again.
        """
        for name, process in list(self.processes.items()):
            if name in self.may_end or process.poll() in (None, 0):
                continue
            last = self.log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            said = f"{name} ended with code {process.returncode}: {' '.join(last)}"
            again = self.restarts.setdefault(name, [])
            if not self.config(name).exists() or len(again) >= _MOST_RESTARTS:
                raise OutstationError(f"{said} (see {self.log(name)})")
            again.append(said)
            self.begin(name)

    def _stop(self, names: list[str]) -> None:
        running = [self.processes[name] for name in names if name in self.processes]
        for process in running:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 15 + len(running)
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait_for_room(self) -> None:
        """Until but a few of the devices that were begun are still starting."""
        deadline = time.monotonic() + _UP_S
        while sum(not self._up(site.device) for site in self.plan.sites if site.device in self.processes) >= _AT_ONCE:
            self.check_alive()
            if time.monotonic() > deadline:
                raise OutstationError(f"devices do not come up: see {self.log(self.plan.sites[0].device)}")
            time.sleep(0.05)

    def _up(self, device: str) -> bool:
        return b"running:" in self.log(device).read_bytes()

    def _read_meters(self, view: list[dict[str, Any]]) -> None:
        """Labels for what the collector has seen judged by now."""
        judged = {row["device"]: row["rows"] for row in view}
        for device, meter in self._meters.items():
            meter.read(judged.get(device, 0))

    def _start_broker(self, broker: Broker) -> None:
        if self.broker is not None:
            self.broker_name = self.broker
            return
        command = brokers.mosquitto(self.home)
        if command is not None:
            self._spawn_command("broker", command)
            self.broker_name = "Mosquitto"
        else:
            self._embedded = brokers.embedded(self.folder, broker.port)
            self.broker_name = "iotcore (embedded, for this demo only)"
        deadline = time.monotonic() + _START_S
        while not _listens(broker.port):
            if time.monotonic() > deadline:
                raise OutstationError(f"the broker did not start: see {self.log('broker')}")
            self.check_alive()
            time.sleep(0.05)

    def _add_meter(self, config: Path, site: Site) -> None:
        measured = self.plan.scenario.measured
        if measured is not None:
            address = load_config(config).data_dir / "intake.sock"
            told = self.plan.metered(load(self.plan.scenario.file), site)
            self._meters[site.device] = Meter(address, self.plan.scenario.name, measured, told)

    def _spawn_command(self, name: str, command: list[str]) -> None:
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
