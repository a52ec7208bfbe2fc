"""A device to which roll-outs come, in this process, with its own clock: it can crash between any two steps."""

from __future__ import annotations

import copy
import hashlib
import itertools
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agent.bootstrap.daemon import build_daemon
from agent.bootstrap.device import load_config, open_store
from agent.clock import ClockReading
from agent.device.bundles.rollout_state import RolloutState, load_state
from agent.device.daemon import Daemon
from agent.device.pipeline import tuning_cache
from agent.device.rollout.desired_state import DesiredStateStore
from agent.device.store.rows import Rows
from agent.model.bundle import bundle, golden_vectors
from agent.model.inference import runtime
from agent.model.sandbox import probe
from agent.model.sandbox.subprocess_model import SubprocessModel
from agent.transport.packets import IncomingMessage
from agent.wire import jws
from agent.wire.messages import encode
from scripts.kit.bundles import Floats, change_manifest, model, readings
from tests.kit.exchanges import T0, Device, version, versions
from tests.kit.operators import DEVICE, FLEET, NOW, Operator

TOPIC = f"outstation/{FLEET}/{DEVICE}/desired"
HOUR_S = 3600.0
# Beyond what springs the traps of rigged models.
WILD = 3.9


def bundles_in(folder: Path, *rigged: str) -> dict[str, Path]:
    """Versions 1, 2 and 3 of one sound model, and one of each rigged model under the trap's name.

    "otherwise" is the sound model once more, with names of classes exchanged.
    """
    made = versions(folder / "sound", "1", "2", "3")
    for trap in rigged:
        copied = Path(shutil.copytree(made["1"], folder / trap))
        made[trap] = version(renamed(copied) if trap == "otherwise" else with_trap(copied, trap), trap)
    return made


def renamed(folder: Path) -> Path:
    """The bundle with each class called like the one after it: it agrees with the one before in no window."""

    def change(head: dict[str, Any]) -> None:
        labels = head["output"]["labels"]
        head["output"]["labels"] = [*labels[1:], labels[0]]
        # It names classes, too.
        del head["files"]["reference.json"]

    (folder / "reference.json").unlink()
    change_manifest(folder, change)
    return folder


def with_trap(folder: Path, trap: str) -> Path:
    """The bundle with a model that answers calm rows as before; "wrong": it does not, by its golden vectors."""
    content = model("classify_int8" if trap == "wrong" else f"rigged_{trap}")
    return with_model(folder, content, wrong=trap == "wrong")


def with_model(folder: Path, content: bytes, *, wrong: bool = False) -> Path:
    """The bundle with another model, and golden vectors of that on calm rows; `wrong`: of classes in another order."""
    calm = np.clip(readings(60), -3, 3)
    loaded = runtime.TfliteModel(content)
    expected = loaded.invoke(calm)
    vectors = golden_vectors.from_outputs(
        calm, expected[:, ::-1] if wrong else expected, loaded.output_step, runtime.RUNTIME_NAME
    )
    files = {"model.tflite": content, "golden.npz": golden_vectors.encode(vectors)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    sums = {name: f"sha256:{hashlib.sha256(data).hexdigest()}" for name, data in files.items()}
    change_manifest(folder, lambda head: head["files"].update(sums))
    return folder


def signed(operator_key: Any, counter: int, tasks: Mapping[str, Any]) -> IncomingMessage:
    head = {"v": 1, "kind": "desired", "device": DEVICE, "counter": counter, "issued": "2026-11-26T00:00:00Z"}
    payload = encode({**head, "tasks": tasks})
    return IncomingMessage(TOPIC, payload, (jws.sign(operator_key, TOPIC, payload),), True, 1, 1)


class Site(Device):
    """`offered`: versions that lie in the device's folder of bundles, so that nothing has to be fetched."""

    def __init__(self, folder: Path, bundles: dict[str, Path], *offered: str) -> None:
        self.now = NOW
        self._counters = itertools.count(1)
        self._offered = offered
        self._written = 0
        super().__init__(folder, bundles)

    @classmethod
    def template(cls, folder: Path, bundles: dict[str, Path], *offered: str) -> Site:
        """A device that ran once and stopped, and knows how models of the offered bundles are run best here."""
        made = cls(folder, bundles, *offered)
        contents = {found.model_bytes: found for found in (bundle.read(bundles[text], None) for text in offered)}
        for found in contents.values():
            choice = probe.probe(found, []).tuning
            if choice is not None:
                tuning_cache.save(made.store, "sort", choice)
        made.stop()
        return made

    def copied(self, folder: Path) -> Site:
        """This stopped device once more, in a folder of its own, started."""
        shutil.copytree(self.home, folder, dirs_exist_ok=True)
        made = copy.copy(self)
        made.home, made.operator, made._counters = folder, Operator(), itertools.count(1)
        made.start()
        return made

    def start(self) -> None:
        for text in self._offered:
            target = self.home / "data" / "bundles" / f"offered-{text}"
            if not target.exists():
                shutil.copytree(self.bundles[text], target)
        self.file, self.conf = load_config(str(self.home / "outstation.toml"))
        self.store = open_store(self.conf)
        self.daemon: Daemon = build_daemon(self.file, self.conf, self.store, now=lambda: self.now)
        self.daemon._remote_commands.start(self.now, lambda: None)

    def stop(self) -> None:
        """As a process that was killed: nothing is written any more."""
        self.end_processes()
        self.store.close()

    def end_processes(self) -> None:
        """As their parent's death does."""
        self.daemon._rollout.abort()

    def crash(self, configured: str | None = None) -> None:
        self.end_processes()
        super().crash(configured)

    def wanted(self, text: str, strategy: str, rollout: str = "", **more: Any) -> dict[str, Any]:
        named = {"rollout": rollout or f"r-{text}", "bundle": "tiny", "version": text, "digest": self.digest(text)}
        rules = {"min_batches": 3, "min_hours": 0.0, **more.pop("rules", {})}
        return {**named, "strategy": strategy, "rules": rules, **more}

    def desire(self, text: str, strategy: str, rollout: str = "", **more: Any) -> None:
        self.desire_tasks({"sort": self.wanted(text, strategy, rollout, **more)})

    def desire_tasks(self, tasks: Mapping[str, Any]) -> None:
        desires = self.daemon._uplink._receivers[1]
        assert isinstance(desires, DesiredStateStore)
        desires.accept(signed(self.operator.key, next(self._counters), tasks))
        desires.apply_pending(self.now)
        self.tick()

    def tick(self, seconds: float = 1.0) -> None:
        """One turn of the main loop, so many seconds later."""
        self.now = ClockReading(self.now.wall_us + round(seconds * 1e6), self.now.boot_s + seconds, self.now.quality)
        self.daemon.tick(self.now)

    def until(self, happened: Callable[[], object], what: str, within_s: float = 90.0) -> None:
        end = time.monotonic() + within_s
        while not happened():
            assert time.monotonic() < end, f"not within {within_s:g} s: {what}; it stands {self.standing}"
            self.tick()
            time.sleep(0.01)

    def is_beside(self) -> bool:
        """Whether a candidate has started, in shadow."""
        trial = self.daemon._rollout.rollouts._rollouts["sort"].canary
        model = None if trial is None else trial.candidate.model
        return isinstance(model, SubprocessModel) and model.poll_ready()

    def until_phase(self, phase: str) -> None:
        self.until(lambda: self.phase == phase, phase)

    @property
    def standing(self) -> RolloutState | None:
        return load_state(self.store, "sort")

    @property
    def phase(self) -> str:
        return "" if self.standing is None else self.standing.phase

    @property
    def reason(self) -> str:
        return "" if self.standing is None else self.standing.reason

    def feed(self, rows: int = 40, *, wild: bool = False) -> None:
        """Readings, the last of them with a value that springs a trap."""
        values = np.clip(readings(rows, seed=self._written), -3, 3)
        if wild:
            values[-1, 0] = WILD
        self.add(values)

    def add(self, values: Floats) -> None:
        """Readings (n, 4), 10 ms apart."""
        rows = len(values)
        t = T0 + (self._written + np.arange(rows, dtype=np.int64)) * 10_000
        self._written += rows
        with self.store.transaction() as tx:
            tx.append("cells", Rows(t, tuple(np.ascontiguousarray(column, "<f4") for column in values.T)), "synced")

    def batch(self, rows: int = 40, *, wild: bool = False) -> str:
        """One batch of new readings; the version that answered it."""
        self.feed(rows, wild=wild)
        self.work()
        return str(self.results()[-1]["model"]["version"])

    def work(self) -> None:
        self.until(lambda: not self.daemon._rollout.is_resuming("sort"), "the bundle on probation is there again")
        self.daemon._run_batches(self.daemon._scheduled_tasks[0], self.now)

    def results(self) -> list[dict[str, Any]]:
        return [body for body in self.messages() if body["kind"] == "results"]

    def answered(self) -> list[tuple[int, int]]:
        """The rows of all results, which must tile."""
        return [tuple(body["rows"]) for body in self.results()]

    def events(self) -> list[tuple[str, str, str]]:
        """(version, phase, reason) of each audit message of a roll-out."""
        found = [body["evidence"] for body in self.messages() if body.get("event") == "rollout"]
        return [(one["version"], one["phase"], one["reason"]) for one in found]

    def phases(self) -> list[str]:
        return [phase for _, phase, _ in self.events()]

    def model_alerts(self) -> list[tuple[str, str]]:
        found = [body for body in self.messages() if body.get("alert") == "model" and body["id"] == "sort/rollout"]
        return [(body["state"], body["severity"]) for body in found]

    def copies(self) -> set[str]:
        return self.kept()


def tiles(rows: list[tuple[int, int]], through: int) -> bool:
    """Whether each row up to `through` is in exactly one of these ranges, in order."""
    expected = 1
    for first, last in rows:
        if first != expected:
            return False
        expected = last + 1
    return expected == through + 1


def digest_of(path: Path) -> str:
    return bundle.read(path, None).digest
