"""Rollout in a simulated fleet: the repository over HTTP, the operator's commands, and device outages.

The commands are the real ones, each in its own process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import msgspec

from outstation.fleet.rollout.plan import PlanFile
from outstation.foundation.config.toml_files import encode_value
from outstation.foundation.errors import OutstationError
from outstation.protocol.wire.keys import PublicKey
from outstation.workbench.simulate.disturbances import Disturbances
from outstation.workbench.simulate.flaky_web import DeviceConnection, FlakyWebServer
from outstation.workbench.simulate.plan import SimulatedSite
from outstation.workbench.simulate.simulation import Simulation

FOLLOW_PROCESS = "follow"
_DECIDE_EVERY_S = "2"
# A command takes a second or two, and minutes on a busy machine with fifty devices.
_COMMAND_TIMEOUT_S = 300.0


class RolloutDriver(msgspec.Struct):
    """Drives a rollout: `prepare` before the fleet starts, `start` when it runs, `tick` until `is_over`."""

    fleet: Simulation
    plan: PlanFile
    disturbances: Disturbances
    trusted_keys: list[PublicKey]
    seed: int
    web: FlakyWebServer | None = None
    _started_s: float = 0.0
    _departed: set[str] = msgspec.field(default_factory=set)
    _returned: set[str] = msgspec.field(default_factory=set)

    def prepare(self) -> None:
        """Create a repository with the bundle, and start its web server. Raises OutstationError."""
        self.fleet.prepare()
        self.run_command("fleet", "repository", "init", "--demo")
        if self.plan.path is not None:
            trust = [word for key in self.trusted_keys for word in ("--publisher", key.text)]
            self.run_command("fleet", "publish", str(self.plan.path), *trust)
        cuts, rates = self.disturbances.download_cuts, self.disturbances.slow_rates
        connections = {name: DeviceConnection(planned_cuts=count) for name, count in cuts.items()}
        connections |= {name: DeviceConnection(bytes_per_s=rate) for name, rate in rates.items()}
        self.web = FlakyWebServer(self.fleet.home / "repository", self.seed, connections=connections)

    def device_config(self, site: SimulatedSite) -> str:
        """Return the config sections of a device with trusted publishers and the repository."""
        assert self.web is not None
        root = self.fleet.home / "repository" / "metadata" / "1.root.json"
        updates = {"url": self.web.url(site.device), "root": str(root.resolve()), "poll_interval": "60 s"}
        lines = [f"\n[publishers]\nkeys = {encode_value([key.text for key in self.trusted_keys])}\n\n[updates]\n"]
        return "".join([*lines, *(f"{key} = {encode_value(value)}\n" for key, value in updates.items())])

    def start(self) -> None:
        """Take the first devices offline, start the rollout and follow it. Raises OutstationError."""
        for device, outage in self.disturbances.outages.items():
            if outage.begin_s == 0.0:
                self._take_offline(device)
        self.run_command("fleet", "rollout", "start", str(self.plan.source))
        self._started_s = time.monotonic()
        # It exits with 1 when it aborts the rollout.
        self.fleet.allowed_to_exit.add(FOLLOW_PROCESS)
        words = ("--every", _DECIDE_EVERY_S, "--dir", str(self.fleet.home))
        self.fleet.spawn(FOLLOW_PROCESS, "fleet", "rollout", "follow", self.plan.name, *words)

    def tick(self) -> None:
        """Begin and end outages that are due."""
        since_s = time.monotonic() - self._started_s
        for device, outage in self.disturbances.outages.items():
            if device not in self._departed and since_s >= outage.begin_s:
                self._take_offline(device)
            elif device in self._departed - self._returned and since_s >= outage.end_s:
                self._returned.add(device)
                self.fleet.start_device(device)

    @property
    def is_over(self) -> bool:
        """Return True if the rollout ended, and every device is back."""
        ended = self.fleet.processes[FOLLOW_PROCESS].poll() is not None
        return ended and self._returned >= self.disturbances.outages.keys()

    def disturbance_report(self) -> dict[str, Any]:
        """Return the disturbances by device, with the number of cut downloads and sent bytes."""
        connections = self.web.connections if self.web is not None else {}
        return {
            "away": {name: [outage.begin_s, outage.end_s] for name, outage in self.disturbances.outages.items()},
            "cut": {name: connections[name].cut_count for name in self.disturbances.download_cuts},
            "slow": self.disturbances.slow_rates,
            "worse": list(self.disturbances.degraded),
            "sent": sum(connection.sent_bytes for connection in connections.values()),
        }

    def close(self) -> None:
        if self.web is not None:
            self.web.close()

    def run_command(self, *arguments: str) -> str:
        """Run an operator's command on the fleet's folder, and return its output. Raises OutstationError."""
        command = [sys.executable, "-m", "outstation", *arguments, "--dir", str(self.fleet.home)]
        name = f"outstation {' '.join(arguments)}"
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_COMMAND_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise OutstationError(f"{name}: not done within {_COMMAND_TIMEOUT_S:g} s") from None
        if done.returncode:
            raise OutstationError(f"{name}: exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def _take_offline(self, device: str) -> None:
        self._departed.add(device)
        self.fleet.stop_device(device)
