"""A roll-out in a simulated fleet: its repository over HTTP, the operator's commands, and devices that come and go.

Commands are the real ones, each in a process of its own. What a device is told, and does, it tells the collector.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from agent.errors import OutstationError
from agent.fleet.rollout import plan
from agent.simulate.device_config import toml_value
from agent.simulate.disturbances import Disturbances
from agent.simulate.flaky_web import DeviceConnection, FlakyWebServer
from agent.simulate.plan import SimulatedSite
from agent.simulate.simulation import Simulation
from agent.wire.keys import PublicKey

FOLLOW_PROCESS = "follow"
_DECIDE_EVERY_S = "2"
# A command takes a second or two, and minutes beside fifty devices on a machine that is busy with other things.
_COMMAND_TIMEOUT_S = 300.0


class RolloutTarget(msgspec.Struct, frozen=True):
    """What a roll-out file is about; `path` is the bundle's, where the file names one."""

    file: Path
    name: str
    task: str
    bundle_path: Path | None


def read_target(file: Path) -> RolloutTarget:
    """Raises ConfigError."""
    found = plan.read(file)
    # Only who it is for and how it is called are asked for here; the bundle is settled by `fleet rollout start`.
    whole = found.to_plan(found.bundle or "", found.version or "", found.digest or "")
    return RolloutTarget(file.resolve(), whole.name, whole.task, found.path)


class RolloutDriver(msgspec.Struct):
    """`prepare` before the fleet starts, `begin` when it runs, `turn` until `over`. `trusted`: publishers' keys."""

    fleet: Simulation
    target: RolloutTarget
    disturbances: Disturbances
    trusted_keys: list[PublicKey]
    seed: int
    web: FlakyWebServer | None = None
    _started_s: float = 0.0
    _departed: set[str] = msgspec.field(default_factory=set)
    _returned: set[str] = msgspec.field(default_factory=set)

    def prepare(self) -> None:
        """A repository with the bundle in it, and its server. Raises OutstationError."""
        self.fleet.prepare()
        self.run_command("fleet", "repository", "init")
        if self.target.bundle_path is not None:
            trust = [word for key in self.trusted_keys for word in ("--key", key.text)]
            self.run_command("fleet", "publish", str(self.target.bundle_path), *trust)
        lines = {name: DeviceConnection(planned_cuts=cuts) for name, cuts in self.disturbances.download_cuts.items()}
        lines |= {name: DeviceConnection(bytes_per_s=rate) for name, rate in self.disturbances.slow_rates.items()}
        self.web = FlakyWebServer(self.fleet.home / "repository", self.seed, connections=lines)

    def device_config(self, site: SimulatedSite) -> str:
        """Of a device: whose bundles it takes, and from where."""
        assert self.web is not None
        root = self.fleet.home / "repository" / "metadata" / "1.root.json"
        updates = {"url": self.web.url(site.device), "root": str(root.resolve()), "poll_interval": "60 s"}
        keys = [key.text for key in self.trusted_keys]
        sections: dict[str, dict[str, Any]] = {"publishers": {"keys": keys}, "updates": updates}
        return "".join(f"\n[{name}]\n{_toml_lines(section)}" for name, section in sections.items())

    def start(self) -> None:
        """Take the first devices away, start the roll-out and follow it. Raises OutstationError."""
        for device, away in self.disturbances.outages.items():
            if away.begin_s == 0.0:
                self._take_offline(device)
        self.run_command("fleet", "rollout", "start", str(self.target.file))
        self._started_s = time.monotonic()
        # It ends with 1 where it aborts.
        self.fleet.allowed_to_exit.add(FOLLOW_PROCESS)
        words = ("--every", _DECIDE_EVERY_S, "--dir", str(self.fleet.home))
        self.fleet.spawn(FOLLOW_PROCESS, "fleet", "rollout", "follow", self.target.name, *words)

    def tick(self) -> None:
        """Devices go and come back as their hardship has it."""
        since_s = time.monotonic() - self._started_s
        for device, away in self.disturbances.outages.items():
            if device not in self._departed and since_s >= away.begin_s:
                self._take_offline(device)
            elif device in self._departed - self._returned and since_s >= away.end_s:
                self._returned.add(device)
                self.fleet.start_device(device)

    @property
    def is_over(self) -> bool:
        """Whether the roll-out ended, and every device is back."""
        return self.fleet.processes[FOLLOW_PROCESS].poll() is not None and self._returned >= set(
            self.disturbances.outages
        )

    def disturbance_report(self) -> dict[str, Any]:
        """Who had it how hard, and what came of it: downloads that broke off, bytes that were sent."""
        lines = self.web.connections if self.web is not None else {}
        return {
            "away": {name: [away.begin_s, away.end_s] for name, away in self.disturbances.outages.items()},
            "cut": {name: lines[name].cut_count for name in self.disturbances.download_cuts},
            "slow": self.disturbances.slow_rates,
            "worse": list(self.disturbances.degraded),
            "sent": sum(line.sent_bytes for line in lines.values()),
        }

    def close(self) -> None:
        if self.web is not None:
            self.web.close()

    def run_command(self, *arguments: str) -> str:
        """One command of the operator's, on the fleet's folder; what it printed. Raises OutstationError."""
        command = [sys.executable, "-m", "agent", *arguments, "--dir", str(self.fleet.home)]
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
            raise OutstationError(
                f"outstation {' '.join(arguments)}: not done within {_COMMAND_TIMEOUT_S:g} s"
            ) from None
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise OutstationError(f"outstation {' '.join(arguments)}: exit code {done.returncode}: {said}")
        return done.stdout

    def _take_offline(self, device: str) -> None:
        self._departed.add(device)
        self.fleet.stop_device(device)


def _toml_lines(section: dict[str, Any]) -> str:
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in section.items())
