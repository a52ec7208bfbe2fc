"""Device under rollouts, in this process, with its own clock; it can crash between any two steps."""

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

from outstation.device.bootstrap.daemon import build_daemon
from outstation.device.bootstrap.device import load_config, open_store
from outstation.device.bundles.rollout_state import RolloutState, load_state
from outstation.device.daemon import Daemon
from outstation.device.pipeline import tuning_cache
from outstation.device.rollout.desired_state import DesiredStateStore
from outstation.device.store.rows import Rows
from outstation.foundation.clock import ClockReading
from outstation.ml.model.bundle import bundle, golden_vectors
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.sandbox import probe
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import encode
from outstation.workbench.testing.patience import Patience
from scripts.kit.bundles import Floats, change_manifest, model, readings
from tests.kit.bundle_devices import T0, Device, version, versions
from tests.kit.operators import DEVICE, FLEET, NOW, Operator

TOPIC = f"outstation/{FLEET}/{DEVICE}/desired"
HOUR_S = 3600.0
# Above the limit of the rigged models' traps.
WILD = 3.9


def bundles_in(folder: Path, *rigged: str) -> dict[str, Path]:
    """Return versions 1, 2 and 3 of one good model, and one of each rigged model under the trap's name.

    "otherwise" is the good model with rotated class names.
    """
    made = versions(folder / "sound", "1", "2", "3")
    for trap in rigged:
        copied = Path(shutil.copytree(made["1"], folder / trap))
        made[trap] = version(renamed(copied) if trap == "otherwise" else with_trap(copied, trap), trap)
    return made


def renamed(folder: Path) -> Path:
    """Return the bundle with rotated class names, so that it disagrees with the old bundle in each window."""

    def change(head: dict[str, Any]) -> None:
        labels = head["output"]["labels"]
        head["output"]["labels"] = [*labels[1:], labels[0]]
        # It contains class names too.
        del head["files"]["reference.json"]

    (folder / "reference.json").unlink()
    change_manifest(folder, change)
    return folder


def with_trap(folder: Path, trap: str) -> Path:
    """Return the bundle with a rigged model that answers calm rows as before; "wrong" fails its golden vectors."""
    content = model("classify_int8" if trap == "wrong" else f"rigged_{trap}")
    return with_model(folder, content, wrong=trap == "wrong")


def with_model(folder: Path, content: bytes, *, wrong: bool = False) -> Path:
    """Return the bundle with another model and its golden vectors on calm rows; `wrong` permutes their classes."""
    calm = np.clip(readings(60), -3, 3)
    loaded = runtime.TfliteModel(content)
    expected = loaded.invoke(calm)
    vectors = golden_vectors.from_outputs(
        calm, expected[:, ::-1] if wrong else expected, loaded.output_steps, loaded.output_sizes, runtime_name()
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
    """Device site; `offered` are versions in the device's bundle folder, which need no fetch."""

    def __init__(self, folder: Path, bundles: dict[str, Path], *offered: str) -> None:
        self.now = NOW
        self._counters = itertools.count(1)
        self._offered = offered
        self._written = 0
        super().__init__(folder, bundles)

    @classmethod
    def template(cls, folder: Path, bundles: dict[str, Path], *offered: str) -> Site:
        """Return a device that ran once and stopped, with autotuning results for the offered bundles."""
        made = cls(folder, bundles, *offered)
        contents = {content.model_bytes: content for content in (bundle.read(bundles[text], None) for text in offered)}
        for content in contents.values():
            choice = probe.probe(content, []).tuning
            if choice is not None:
                tuning_cache.save(made.store, "sort", choice)
        made.stop()
        return made

    def copy(self, folder: Path) -> Site:
        """Return a copy of this stopped device in its own folder, started."""
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

    def end_processes(self) -> None:
        self.daemon._updater.abort()
        super().end_processes()

    def wanted(self, text: str, strategy: str, rollout: str = "", **more: Any) -> dict[str, Any]:
        named = {"rollout": rollout or f"r-{text}", "bundle": "tiny", "version": text, "digest": self.digest(text)}
        rules = {"min_batches": 3, "min_hours": 0.0, **more.pop("rules", {})}
        return {**named, "strategy": strategy, "rules": rules, **more}

    def desire(self, text: str, strategy: str, rollout: str = "", **more: Any) -> None:
        self.desire_tasks({"sort": self.wanted(text, strategy, rollout, **more)})

    def desire_tasks(self, tasks: Mapping[str, Any]) -> None:
        receivers = self.daemon.uplink._receivers
        [desires] = [receiver for receiver in receivers if isinstance(receiver, DesiredStateStore)]
        desires.accept(signed(self.operator.key, next(self._counters), tasks))
        desires.apply_pending(self.now)
        self.tick()

    def tick(self, seconds: float = 1.0) -> None:
        """Run one turn of the main loop, the given number of seconds later."""
        self.now = ClockReading(self.now.wall_us + round(seconds * 1e6), self.now.boot_s + seconds, self.now.quality)
        self.daemon.tick(self.now)

    def until(self, happened: Callable[[], object], description: str, within_s: float = 90.0) -> None:
        patience = Patience(within_s)
        while not happened():
            assert not patience.is_over(), f"not within {within_s:g} s: {description}; it stands {self.standing}"
            self.tick()
            time.sleep(0.01)

    def is_in_shadow(self) -> bool:
        """Return True if a candidate runs in shadow."""
        trial = self.daemon._updater.rollouts._rollouts["sort"].canary
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
        """Feed readings, the last of them with a value that triggers a trap."""
        values = np.clip(readings(rows, seed=self._written), -3, 3)
        if wild:
            values[-1, 0] = WILD
        self.add(values)

    def add(self, values: Floats) -> None:
        """Append readings (n, 4), 10 ms apart."""
        rows = len(values)
        t = T0 + (self._written + np.arange(rows, dtype=np.int64)) * 10_000
        self._written += rows
        with self.store.transaction() as tx:
            tx.append("cells", Rows(t, tuple(np.ascontiguousarray(column, "<f4") for column in values.T)), "synced")

    def batch(self, rows: int = 40, *, wild: bool = False) -> str:
        """Run one batch of new readings, and return the version that answered it."""
        self.feed(rows, wild=wild)
        self.work()
        return str(self.results()[-1]["model"]["version"])

    def work(self) -> None:
        is_resuming = self.daemon._updater.rollouts.is_resuming
        self.until(lambda: not is_resuming("sort"), "the bundle on probation is there again")
        self.daemon._run_batches(self.daemon._scheduled_tasks[0], self.now)

    def results(self) -> list[dict[str, Any]]:
        return [body for body in self.messages() if body["kind"] == "results"]

    def answered(self) -> list[tuple[int, int]]:
        """Return the rows of all results, which must tile."""
        return [tuple(body["rows"]) for body in self.results()]

    def events(self) -> list[tuple[str, str, str]]:
        """Return (version, phase, reason) of each audit message of a rollout."""
        evidence = [body["evidence"] for body in self.messages() if body.get("event") == "rollout"]
        return [(entry["version"], entry["phase"], entry["reason"]) for entry in evidence]

    def phases(self) -> list[str]:
        return [phase for _, phase, _ in self.events()]

    def model_alerts(self) -> list[tuple[str, str]]:
        alerts = [body for body in self.messages() if body.get("alert") == "model" and body["id"] == "sort/rollout"]
        return [(body["state"], body["severity"]) for body in alerts]

    def copies(self) -> set[str]:
        return self.stored_versions()


def tiles(rows: list[tuple[int, int]], through: int) -> bool:
    """Return True if each row up to `through` is in exactly one of these ranges, in order."""
    expected = 1
    for first, last in rows:
        if first != expected:
            return False
        expected = last + 1
    return expected == through + 1


def digest_of(path: Path) -> str:
    return bundle.read(path, None).digest
