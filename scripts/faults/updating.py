"""World with rollouts of one task's bundle; repository, plan and commands are the real ones.

Each round publishes a new version and rolls it out, first in shadow mode, then to all. Whatever fails in between, the
rollout must end with the device settled on the new bundle. Each result must come from the bundle that the preceding
signed audit messages name.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from outstation.workbench.authoring import pack
from outstation.workbench.simulate.flaky_web import DeviceConnection, FlakyWebServer
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import run_outstation
from scripts.faults.world import DEVICE, TASKS, World
from scripts.kit import bundles

if TYPE_CHECKING:
    from scripts.faults.oracle import Verdict

# The task whose bundle is replaced; the other task keeps its bundle.
TASK, OTHER = TASKS
# The device's last status of a rollout that ended in this way.
_ARRIVED = {"finished": {"active"}, "aborted": {"rolled_back", "rejected", "cancelled"}}
_FINISHED = frozenset({"finished"})
_BY_ROLLOUT = "roll-out"
# Generous, for a busy machine; on an idle one nothing takes ten seconds.
_PATIENCE_S = 150.0
_PADDING = 60_000
_PLAN = """
[rollout]
name = "{name}"
task = "{task}"
path = "{path}"

[promote]
min_devices = 1
min_batches = 10
min_hours = 0.0
min_agreement = 0.5

[[steps]]
strategy = "shadow"

[[steps]]
strategy = "all"

[device_rules]
# Of one device an interval takes ten blocks, of a twelfth of these each.
min_batches = 24
min_hours = 0.0
min_agreement = 0.5
batch_timeout_s = 120.0
# The sensor's rows are noise, of which no shipped reference is.
output_drift = false
"""


class Updating:
    """Rollouts and the promises about them; a companion of the world."""

    def __init__(self, world: World) -> None:
        self._world, self._count, self._ends = world, 0, _FINISHED
        self._follower: subprocess.Popen[bytes] | None = None
        self._digests: dict[str, str] = {}
        self._operate("repository", "init", "--demo")
        self.web = FlakyWebServer(world.fleet.home / "repository")
        root = world.fleet.home / "repository" / "metadata" / "1.root.json"
        world.device.append_config(f'[updates]\nurl = "{self.web.url(DEVICE)}"\nroot = "{root}"\n')

    @staticmethod
    def in_world(world: World) -> Updating:
        [update] = [companion for companion in world.companions if isinstance(companion, Updating)]
        return update

    @property
    def line(self) -> DeviceConnection:
        return self.web.connection(DEVICE)

    @property
    def phase(self) -> str:
        """Return the device's last phase in this round's rollout, as the collector recorded it."""
        return next((phase for phase, _ in reversed(self._reported_phases(self.name))), "")

    @property
    def name(self) -> str:
        return f"round-{self._count}"

    def roll(self) -> None:
        """Publish the next version, start its rollout, and follow it during live readings."""
        self._count, self._ends = self._count + 1, _FINISHED
        folder = self._world.folder / self.name
        folder.mkdir()
        spec = bundles.write_spec(folder, bundles.FLOAT)
        bundles.change(spec, 'version = "1.0.0"', f'version = "1.{self._count}.0"')
        # A slow, busy machine must not look like a hanging model.
        bundles.change(spec, "seconds = 20", "seconds = 120")
        # Large enough that its transfer takes a while.
        (folder / "DATA.md").write_text(self._world.rng.randbytes(_PADDING).hex(), encoding="ascii")
        pack.write_bundle(pack.pack(spec, bundles.KEY), folder / "bundle")
        self._operate("publish", str(folder / "bundle"), "--publisher", bundles.KEY.public.text)
        plan = folder / "plan.toml"
        plan.write_text(_PLAN.format(name=self.name, task=TASK, path="bundle"), encoding="utf-8")
        self._operate("rollout", "start", str(plan))
        self.follow()

    def may_abort(self) -> None:
        """Allow this round's rollout to abort, with the previous bundle active again."""
        self._ends = frozenset({"finished", "aborted"})

    def follow(self) -> None:
        command = [sys.executable, "-m", "outstation", "fleet", "rollout", "follow", self.name, "--every", "0.5"]
        with (self._world.folder / "follow.log").open("ab") as log:
            self._follower = subprocess.Popen(
                [*command, "--dir", str(self._world.fleet.home)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def reach(self, phase: str) -> None:
        """Wait until the device reports `phase` or a later one."""
        try:
            wait_until(
                f"{self.name}: {phase}",
                lambda: phase in [reached for reached, _ in self._reported_phases(self.name)],
                _PATIENCE_S,
            )
        except AssertionError as late:
            raise AssertionError(f"{late}; {self.waiting()}; it said {self._reported_phases(self.name)[-3:]}") from None

    def finish(self, patience_s: float) -> None:
        """Wait for the end of the rollout; if it does not end, `judge` reports it."""
        with contextlib.suppress(AssertionError):
            wait_until(f"{self.name} is over", lambda: not self.waiting(), patience_s)

    # --- as a companion ---

    def resume(self) -> None:
        """Do nothing: the fault starts the rollouts."""

    def pause(self, _patience_s: float) -> bool:
        return True

    def close(self) -> None:
        self._end_following()
        self.web.close()

    def waiting(self) -> str:
        """Describe what is still to come; empty if nothing is."""
        if not self._count:
            return ""
        state, runs = self._state(), self._runs()
        if state not in ("finished", "aborted"):
            return f"{self.name} is {state}, the device's part: {self.phase or 'unknown'}"
        there = self.phase in _ARRIVED[state] and (runs == self._wanted()) == (state == "finished")
        return "" if there else f"{self.name} is {state}, the device's part: {self.phase}, and it runs {runs}"

    def judge(self, verdict: Verdict) -> None:
        self._end_following()
        if not self._count:
            return
        if (state := self._state()) not in self._ends:
            should = " or ".join(sorted(self._ends))
            verdict.problems.append(
                f"{self.name} is {state}, and should be {should}: {self._reported_phases(self.name)[-3:]}"
            )
        elif (self._runs() == self._wanted()) != (state == "finished"):
            verdict.problems.append(f"{TASK} runs {self._runs()}, and {self.name} of {self._wanted()} is {state}")
        verdict.problems += self._undeclared_bundles()

    # --- observations ---

    def _undeclared_bundles(self) -> Iterator[str]:
        """Describe results of a bundle other than the one that the preceding signed messages name."""
        may, own, wrong = set[str](), "", 0
        sql = "SELECT kind, payload FROM messages WHERE device = ? AND kind IN ('results', 'audit') ORDER BY log, seq"
        for kind, payload in self._world.fleet.query(sql, DEVICE):
            body = json.loads(payload)
            if kind == "audit":
                may = _allowed_bundles_after(body, may)
            elif body["task"] == TASK:
                wrong += body["model"]["digest"] not in may
            elif body["task"] == OTHER:
                own = own or body["model"]["digest"]
                wrong += body["model"]["digest"] != own
        if wrong:
            yield f"{wrong} messages name another bundle than the signed audit messages before them say"

    def _state(self) -> str:
        states = self._world.fleet.query("SELECT state FROM rollouts WHERE rollout = ?", self.name)
        return str(states[0][0]) if states else "not started"

    def _reported_phases(self, name: str) -> list[tuple[str, str]]:
        """Return the device's phases and sentences, in order."""
        sql = "SELECT phase, summary FROM rollout_devices WHERE device = ? AND rollout = ? ORDER BY time, seq"
        return [(str(phase), str(summary)) for phase, summary in self._world.fleet.query(sql, DEVICE, name)]

    def _wanted(self) -> str:
        [(digest,)] = self._world.fleet.query("SELECT digest FROM rollouts WHERE rollout = ?", self.name)
        return str(digest)

    def _runs(self) -> str:
        """Return the bundle of the newest results."""
        sql = "SELECT payload FROM messages WHERE device = ? AND topic LIKE ? ORDER BY rowid DESC LIMIT 1"
        runs = self._world.fleet.query(sql, DEVICE, f"%/results/{TASK}")
        return str(json.loads(runs[0][0])["model"]["digest"]) if runs else ""

    def _operate(self, *arguments: str) -> None:
        done = run_outstation("fleet", *arguments, "--dir", str(self._world.fleet.home), timeout_s=_PATIENCE_S)
        assert done.returncode == 0, done.stderr or done.stdout

    def _end_following(self) -> None:
        if self._follower is not None:
            self._follower.kill()
            self._follower.wait(10)
            self._follower = None


def _allowed_bundles_after(body: dict[str, Any], may: set[str]) -> set[str]:
    """Return the digests of the bundles that may answer for the task after this audit message.

    It is a single bundle. On probation the previous bundle answers where the new one fails.
    """
    evidence = body.get("evidence", {})
    if evidence.get("task") != TASK:
        return may
    if body["event"] == "activated":
        both = [evidence[end]["digest"] for end in ("from", "to") if evidence[end] is not None]
        return set(both if evidence["why"] == _BY_ROLLOUT else both[-1:])
    if body["event"] == "rollout" and evidence["phase"] == "active":
        return {str(evidence["digest"])}
    return may


def updating(world: World) -> None:
    """Create a repository, and a device configured for it; for `Setting.prepare`."""
    world.companions.append(Updating(world))
