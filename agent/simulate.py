"""A simulated fleet on one machine: a real broker, the real collector and real device daemons on replayed recordings.

Each part is the program a user would start, in a process of its own. The faults are in the recordings' replay.
"""

from __future__ import annotations

import os
import shutil
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
import numpy as np

from agent.config import Broker, Fault
from agent.device.incoming.sources import replay
from agent.errors import OutstationError, UsageError
from agent.fleet.audit import Report, audit
from agent.fleet.enrol import enrol, init_fleet
from agent.fleet.store import FleetStore
from agent.model import shipped

FLEET = "demo"
_UNITS = {"a": "g", "w": "rad/s"}
_START_S = 10.0

# 40 drift windows of 20 model windows of 100 rows, and the rows at the end of each recording that fill none.
_LEARN_ROWS = 90_000
_CLEAN_ROWS = 30_000
_FAULT_ROWS = 50_000


@dataclass(frozen=True, slots=True)
class Site:
    """A simulated device: whose recordings it replays, and what goes wrong with its sensor."""

    device: str
    subject: int
    seed: int
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What the fleet does: `rows` per device at `speed` times the recordings' rate."""

    sites: tuple[Site, ...]
    rows: int
    speed: float


def plan(devices: int, duration_s: float, seed: int = 0) -> Plan:
    """The demo's sites: the first loses gain, the second's channel sticks, the others stay as they are."""
    recordings = replay.load(recordings_file())
    subjects = sorted({int(s) for s in recordings.subject})
    begin = _LEARN_ROWS + _CLEAN_ROWS
    faults: dict[int, tuple[Fault, ...]] = {
        0: (Fault(kind="gain", fields=["ax", "ay", "az"], from_row=begin, amount=0.6),),
        1: (Fault(kind="stuck", fields=["wy"], from_row=begin, amount=0.25),),
    }
    sites = tuple(
        Site(f"pi-{i + 1:02d}", subjects[i % len(subjects)], seed * 1000 + i, faults.get(i, ())) for i in range(devices)
    )
    rows = begin + _FAULT_ROWS
    return Plan(sites, rows, rows / recordings.rate / max(6.0, 0.6 * duration_s))


def recordings_file() -> Path:
    return shipped.recordings() / "exercise.npz"


@dataclass
class Simulation:
    """The running fleet in `folder`. Use as a context: leaving it ends every process it started."""

    folder: Path
    plan: Plan
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    broker_name: str = ""
    _embedded: Any = None

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
        finally:
            store.close()

    def watch(self, until_s: float) -> Iterator[list[dict[str, Any]]]:
        """The collector's view, twice a second, until all rows were judged or `until_s` (monotonic) has passed."""
        store = FleetStore(self.database, read_only=True)
        try:
            while True:
                self._check_alive()
                view = store.progress()
                yield view
                done = [row for row in view if row["rows"] >= self._last_row(row["device"])]
                if len(done) == len(self.plan.sites) or time.monotonic() > until_s:
                    return
                time.sleep(0.5)
        finally:
            store.close()

    def stop(self) -> None:
        """Devices, then the collector, each by SIGTERM; they finish what they have in hand."""
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

    def report(self) -> tuple[list[dict[str, Any]], Report]:
        """What the collector has of each device, with accuracy against the recordings' labels; and the audit."""
        store = FleetStore(self.database, read_only=True)
        try:
            view = {row["device"]: row for row in store.progress()}
            devices = [self._summary(store, site, view.get(site.device)) for site in self.plan.sites]
            return devices, audit(store)
        finally:
            store.close()

    def _summary(self, store: FleetStore, site: Site, seen: dict[str, Any] | None) -> dict[str, Any]:
        raised = [a for a in store.alerts(site.device, closed=True) if a["state"] == "raised"]
        right, known = self._accuracy(store, site)
        return {
            "device": site.device,
            "rows": seen["rows"] if seen else 0,
            "windows": seen["windows"] if seen else 0,
            "results": seen["results"] if seen else 0,
            "verified": seen["messages"] if seen else 0,
            "drift": sorted({a["subject"] for a in raised if a["alert"] == "drift"}),
            "faults": sorted({a["subject"] for a in raised if a["alert"] == "fault"}),
            "alerts": [a["summary"] for a in raised],
            "right": right,
            "labelled": known,
        }

    def _accuracy(self, store: FleetStore, site: Site) -> tuple[int, int]:
        """Right answers and all answers, of windows from before the site's sensor goes wrong."""
        recordings = replay.load(recordings_file())
        clean = min((fault.from_row for fault in site.faults), default=self.plan.rows + 1)
        parts = []
        for part in replay.Playlist(recordings, site.subject, site.seed).parts():
            if part.first > self.plan.rows:
                break
            parts.append(part)
        ends = np.array([part.last for part in parts])
        truth = [recordings.labels[part.label] for part in parts]
        answers = [(row, label) for row, label in store.labels(site.device) if row < clean]
        at = np.searchsorted(ends, [row for row, _ in answers])
        return sum(truth[i] == label for i, (_, label) in zip(at, answers, strict=True)), len(answers)

    def _last_row(self, device: str) -> int:
        """The row that must be judged before this device is done: the tail of the last recording may fill no window."""
        return self.plan.rows - 2_000

    def _start_broker(self, broker: Broker) -> None:
        binary = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if binary is not None:
            conf = self.folder / "fleet" / "broker" / "mosquitto.conf"
            if os.geteuid() == 0:
                # Else Mosquitto becomes a user who cannot read a private folder.
                conf.write_text(conf.read_text(encoding="utf-8") + "user root\n", encoding="utf-8")
            self._spawn_command("broker", [binary, "-c", str(conf)])
            self.broker_name = "Mosquitto"
        else:
            self._embedded = _embedded_broker(self.folder, broker.port)
            self.broker_name = "iotcore (embedded, for this demo only)"
        deadline = time.monotonic() + _START_S
        while not _listens(broker.port):
            if time.monotonic() > deadline:
                raise OutstationError(f"the broker did not start: see {self.folder / 'broker.log'}")
            self._check_alive()
            time.sleep(0.05)

    def _write_config(self, file: Path, site: Site) -> None:
        """Streams and task for the config that enrolment wrote."""
        fields = ", ".join(f'{{ name = "{n}", unit = "{_UNITS[n[0]]}" }}' for n in ("ax", "ay", "az", "wx", "wy", "wz"))
        faults = ", ".join(_toml_table(msgspec.to_builtins(fault)) for fault in site.faults)
        source = {"kind": "replay", "file": str(recordings_file()), "subject": site.subject, "seed": site.seed}
        pace = {"speed": self.plan.speed, "rows": self.plan.rows}
        file.write_text(
            file.read_text(encoding="utf-8")
            + '\n[buffer]\ncommit_every = "500 ms"\n'
            + f"\n[streams.watch]\nfields = [{fields}]\n"
            + f"source = {_toml_table(source | pace)[:-2]}, faults = [{faults}] }}\n"
            + '\n[tasks.exercise]\nstream = "watch"\nbundle = "exercise"\nschedule = "every 1 s"\n',
            encoding="utf-8",
        )

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


def _embedded_broker(folder: Path, port: int) -> Any:
    try:
        from iotcore import Broker as Embedded
    except ImportError:
        raise UsageError(
            "no MQTT broker on this machine: apt-get install mosquitto, or pip install 'outstation[demo]'"
        ) from None
    file = folder / "broker.toml"
    file.write_text(_RUMQTTD.format(port=port), encoding="utf-8")
    broker = Embedded(config_path=str(file))
    broker.start()
    return broker


_RUMQTTD = """\
id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "v5"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 1048576
max_inflight_count = 500
dynamic_filters = true
"""


def _toml_table(members: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {_toml_value(value)}" for key, value in members.items()) + " }"


def _toml_value(value: Any) -> str:
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
