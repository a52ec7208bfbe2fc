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
from agent.simulate.disturbances import Hardship
from agent.simulate.flaky_web import Line, Web
from agent.simulate.plan import Site
from agent.simulate.simulation import Simulation
from agent.wire.keys import PublicKey

FOLLOW = "follow"
_JUDGE_S = "2"
# A command takes a second or two, and minutes beside fifty devices on a machine that is busy with other things.
_COMMAND_S = 300.0


class Subject(msgspec.Struct, frozen=True):
    """What a roll-out file is about; `path` is the bundle's, where the file names one."""

    file: Path
    name: str
    task: str
    path: Path | None


def subject(file: Path) -> Subject:
    """Raises ConfigError."""
    found = plan.read(file)
    # Only who it is for and how it is called are asked for here; the bundle is settled by `fleet rollout start`.
    whole = found.plan(found.bundle or "", found.version or "", found.digest or "")
    return Subject(file.resolve(), whole.name, whole.task, found.path)


class Rolling(msgspec.Struct):
    """`prepare` before the fleet starts, `begin` when it runs, `turn` until `over`. `trusted`: publishers' keys."""

    fleet: Simulation
    about: Subject
    hardship: Hardship
    trusted: list[PublicKey]
    seed: int
    web: Web | None = None
    _began_s: float = 0.0
    _left: set[str] = msgspec.field(default_factory=set)
    _back: set[str] = msgspec.field(default_factory=set)

    def prepare(self) -> None:
        """A repository with the bundle in it, and its server. Raises OutstationError."""
        self.fleet.prepare()
        self.run("fleet", "repository", "init")
        if self.about.path is not None:
            trust = [word for key in self.trusted for word in ("--key", key.text)]
            self.run("fleet", "publish", str(self.about.path), *trust)
        lines = {name: Line(cuts=cuts) for name, cuts in self.hardship.cuts.items()}
        lines |= {name: Line(rate=rate) for name, rate in self.hardship.slow.items()}
        self.web = Web(self.fleet.home / "repository", self.seed, lines=lines)

    def config(self, site: Site) -> str:
        """Of a device: whose bundles it takes, and from where."""
        assert self.web is not None
        root = self.fleet.home / "repository" / "metadata" / "1.root.json"
        updates = {"url": self.web.url(site.device), "root": str(root.resolve()), "every": "60 s"}
        keys = [key.text for key in self.trusted]
        sections: dict[str, dict[str, Any]] = {"publishers": {"keys": keys}, "updates": updates}
        return "".join(f"\n[{name}]\n{_lines(section)}" for name, section in sections.items())

    def begin(self) -> None:
        """Take the first devices away, start the roll-out and follow it. Raises OutstationError."""
        for device, away in self.hardship.away.items():
            if away.begin_s == 0.0:
                self._leave(device)
        self.run("fleet", "rollout", "start", str(self.about.file))
        self._began_s = time.monotonic()
        # It ends with 1 where it aborts.
        self.fleet.may_end.add(FOLLOW)
        words = ("--every", _JUDGE_S, "--dir", str(self.fleet.home))
        self.fleet.spawn(FOLLOW, "fleet", "rollout", "follow", self.about.name, *words)

    def turn(self) -> None:
        """Devices go and come back as their hardship has it."""
        since_s = time.monotonic() - self._began_s
        for device, away in self.hardship.away.items():
            if device not in self._left and since_s >= away.begin_s:
                self._leave(device)
            elif device in self._left - self._back and since_s >= away.end_s:
                self._back.add(device)
                self.fleet.begin(device)

    @property
    def over(self) -> bool:
        """Whether the roll-out ended, and every device is back."""
        return self.fleet.processes[FOLLOW].poll() is not None and self._back >= set(self.hardship.away)

    def suffered(self) -> dict[str, Any]:
        """Who had it how hard, and what came of it: downloads that broke off, bytes that were sent."""
        lines = self.web.lines if self.web is not None else {}
        return {
            "away": {name: [away.begin_s, away.end_s] for name, away in self.hardship.away.items()},
            "cut": {name: lines[name].cut for name in self.hardship.cuts},
            "slow": self.hardship.slow,
            "worse": list(self.hardship.worse),
            "sent": sum(line.sent for line in lines.values()),
        }

    def close(self) -> None:
        if self.web is not None:
            self.web.close()

    def run(self, *arguments: str) -> str:
        """One command of the operator's, on the fleet's folder; what it printed. Raises OutstationError."""
        command = [sys.executable, "-m", "agent", *arguments, "--dir", str(self.fleet.home)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMMAND_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise OutstationError(f"outstation {' '.join(arguments)}: not done within {_COMMAND_S:g} s") from None
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise OutstationError(f"outstation {' '.join(arguments)}: exit code {done.returncode}: {said}")
        return done.stdout

    def _leave(self, device: str) -> None:
        self._left.add(device)
        self.fleet.end(device)


def _lines(section: dict[str, Any]) -> str:
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in section.items())
