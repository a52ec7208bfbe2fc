"""Simulation of a fleet on one machine: a real broker, collector and device daemons on replayed recordings.

Each part is the program that a user would start, in its own process. The faults are in the replay of the recordings.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from outstation.device.config.config import load as load_config
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import enrol_on_this_machine, init_fleet
from outstation.foundation.errors import OutstationError, UsageError
from outstation.foundation.extras import install_command
from outstation.ml.datasets.recordings import load
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.workbench.simulate.label_meter import LabelMeter
from outstation.workbench.simulate.plan import SimulatedSite, SimulationPlan

FLEET_NAME = "demo"
_BROKER_TIMEOUT_S = 10.0
_POLL_INTERVAL_S, _QUIET_S = 0.5, 2.0
# Devices that start at the same time: more would only wait for the processor.
_MAX_STARTING, _STARTUP_TIMEOUT_S = 4, 60.0
_MAX_RESTARTS = 3
# Config of the embedded broker.
_RUMQTTD_CONFIG = """\
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


class Simulation(msgspec.Struct):
    """A running fleet in `folder`; leaving its context ends every process that it started.

    `broker`: URL of a running broker; None: start one. `extra_config` is appended to a device's config.
    `allowed_to_exit`: processes that may exit by themselves. `restarts`: why each daemon was restarted.
    """

    folder: Path
    plan: SimulationPlan
    broker: str | None = None
    extra_config: Callable[[SimulatedSite], str] = lambda _: ""
    processes: dict[str, subprocess.Popen[bytes]] = msgspec.field(default_factory=dict)
    allowed_to_exit: set[str] = msgspec.field(default_factory=set)
    restarts: dict[str, list[str]] = msgspec.field(default_factory=dict)
    broker_name: str = ""
    _fleet: FleetConfig | None = None
    _embedded: Any = None
    _meters: dict[str, LabelMeter] = msgspec.field(default_factory=dict)

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
        """Create the fleet's folder, keys and broker config, once."""
        if self._fleet is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                free_port = int(probe.getsockname()[1])
            broker = BrokerConfig(url=self.broker or f"mqtt://127.0.0.1:{free_port}")
            self._fleet = init_fleet(self.home, FLEET_NAME, broker)
        return self._fleet

    def start(self) -> None:
        """Start broker, collector and devices, in this order; wait until all devices run.

        Raises OutstationError if one does not start.
        """
        config = self.prepare()
        self._start_broker(config.broker)
        self.spawn("collector", "fleet", "collect", "--dir", str(self.home))
        with FleetStore(self.database) as store:
            for site in self.plan.sites:
                home = self.config_path(site.device).parent
                enrol_on_this_machine(self.home, config, store, site.device, home)
                file = home / "outstation.toml"
                with file.open("a", encoding="utf-8") as config_file:
                    config_file.write(self.plan.device_toml(site) + self.extra_config(site))
                self._wait_for_startups(_MAX_STARTING - 1)
                self.start_device(site.device)
                if (labels := self.plan.scenario.delayed_labels) is not None:
                    intake = load_config(file).data_dir / "intake.sock"
                    values = self.plan.metered_labels(load(self.plan.scenario.file), site)
                    self._meters[site.device] = LabelMeter(intake, self.plan.scenario.name, labels, values)
        # On a slow machine a start takes as long as a short run.
        self._wait_for_startups(0)

    def start_dashboard(self) -> None:
        """Start the dashboard on a free port; without its libraries it only says so in its log."""
        self.allowed_to_exit.add("dashboard")
        options = ["--listen", "127.0.0.1:0", "--local-role", "operator", "--dir", str(self.home)]
        self.spawn("dashboard", "fleet", "dashboard", *options)

    @property
    def dashboard_url(self) -> str:
        """Return the address of the dashboard; "" before it serves."""
        log = self.log_path("dashboard")
        match = re.search(rb"http://[^ \n]+", log.read_bytes()) if log.exists() else None
        return match[0].decode() if match else ""

    def start_device(self, device: str) -> None:
        self.allowed_to_exit.discard(device)
        self.spawn(device, "run", "-c", str(self.config_path(device)))

    def stop_device(self, device: str) -> None:
        """Stop the device's daemon, until `start_device`."""
        self.allowed_to_exit.add(device)
        self._stop([device])

    def watch_progress(self, until_s: float) -> Iterator[list[dict[str, Any]]]:
        """Yield the collector's progress twice a second, until all rows have results or until `until_s` (monotonic)."""
        store = FleetStore(self.database, read_only=True)
        last_counts, idle_s = list[int](), 0.0
        try:
            while True:
                self.restart_exited()
                progress = store.progress()
                last_rows = {row["device"]: row["rows"] for row in progress}
                for device, meter in self._meters.items():
                    meter.send_due_labels(last_rows.get(device, 0))
                yield progress
                # The tail of the last recording may fill no window.
                done = [row for row in progress if row["rows"] >= self.plan.rows - self.plan.scenario.tail_rows]
                counts = [row["messages"] for row in progress]
                idle_s = 0.0 if counts != last_counts else idle_s + _POLL_INTERVAL_S
                last_counts = counts
                # Metrics from labels of the last rows arrive after their results.
                settled = not self._meters or idle_s >= _QUIET_S
                if (len(done) == len(self.plan.sites) and settled) or time.monotonic() > until_s:
                    return
                time.sleep(_POLL_INTERVAL_S)
        finally:
            store.close()

    def stop(self) -> None:
        """Stop the devices, then the collector, by SIGTERM; they finish their current work."""
        for meter in self._meters.values():
            meter.close()
        self._stop([site.device for site in self.plan.sites])
        self._stop(["collector", "dashboard"])

    @property
    def home(self) -> Path:
        return self.folder / "fleet"

    @property
    def database(self) -> Path:
        return self.home / "fleet.db"

    def config_path(self, device: str) -> Path:
        return self.home / "sites" / device / "outstation.toml"

    def log_path(self, name: str) -> Path:
        """Return the file with stdout and stderr of a process."""
        return self.folder / f"{name}.log"

    def spawn(self, name: str, *arguments: str) -> None:
        """Run `outstation …` as the process `name`."""
        self._spawn_command(name, [sys.executable, "-m", "outstation", *arguments])

    def restart_exited(self) -> None:
        """Restart daemons that exited, as systemd would.

        Raises OutstationError if another process exited unexpectedly, or a daemon keeps exiting.
        """
        for name, process in list(self.processes.items()):
            if name in self.allowed_to_exit or process.poll() in (None, 0):
                continue
            last = self.log_path(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            problem = f"{name} exited with code {process.returncode}: {' '.join(last)}"
            restarts = self.restarts.setdefault(name, [])
            if not self.config_path(name).exists() or len(restarts) >= _MAX_RESTARTS:
                raise OutstationError(f"{problem} (see {self.log_path(name)})")
            restarts.append(problem)
            self.start_device(name)

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

    def _wait_for_startups(self, others: int) -> None:
        """Wait until at most `others` devices are still starting."""
        deadline = time.monotonic() + _STARTUP_TIMEOUT_S
        started = [site.device for site in self.plan.sites if site.device in self.processes]
        while sum(b"running:" not in self.log_path(name).read_bytes() for name in started) > others:
            self.restart_exited()
            if time.monotonic() > deadline:
                raise OutstationError(f"devices do not start: see {self.log_path(self.plan.sites[0].device)}")
            time.sleep(0.05)

    def _start_broker(self, broker: BrokerConfig) -> None:
        if self.broker is not None:
            self.broker_name = self.broker
            return
        mosquitto = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if mosquitto is not None:
            conf = self.home / "broker" / "mosquitto.conf"
            if os.geteuid() == 0:
                # As root, Mosquitto switches to a user who cannot read a private folder.
                conf.write_text(conf.read_text(encoding="utf-8") + "user root\n", encoding="utf-8")
            self._spawn_command("broker", [mosquitto, "-c", str(conf)])
            self.broker_name = "Mosquitto"
        else:
            self._embedded = _start_embedded_broker(self.folder, broker.port)
            self.broker_name = "iotcore (embedded, for this demo only)"
        deadline = time.monotonic() + _BROKER_TIMEOUT_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", broker.port)) == 0:
                    return
            if time.monotonic() > deadline:
                raise OutstationError(f"the broker did not start: see {self.log_path('broker')}")
            self.restart_exited()
            time.sleep(0.05)

    def _spawn_command(self, name: str, command: list[str]) -> None:
        with self.log_path(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


def _start_embedded_broker(folder: Path, port: int) -> Any:
    """Start the embedded broker on `port`. Raises UsageError if it is not installed."""
    try:
        from iotcore import Broker as Embedded
    except ImportError:
        raise UsageError(f"no MQTT broker: apt-get install mosquitto, or {install_command('demo')}") from None
    file = folder / "broker.toml"
    file.write_text(_RUMQTTD_CONFIG.format(port=port), encoding="utf-8")
    broker = Embedded(config_path=str(file))
    broker.start()
    return broker
