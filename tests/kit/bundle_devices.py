"""Device with bundle changes and crashes, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from outstation.device.bootstrap.daemon import build_daemon
from outstation.device.bootstrap.device import load_config, open_store
from outstation.device.daemon import Daemon
from outstation.device.pipeline import tuning_cache
from outstation.device.store.rows import Rows
from outstation.ml.model.bundle import bundle
from outstation.ml.model.inference.tuning import Tuning
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.protocol.wire import keys
from scripts.kit.bundles import KEY, change_manifest, packed
from tests.kit.operators import DEVICE, FLEET, NOW, Operator

T0 = 1_764_022_680_000_000
# Tunings of bundles that passed their probe in an earlier test: a device knows them, as after a restart.
_tunings: list[Tuning] = []


def version(bundle: Path, text: str) -> Path:
    def change(head: dict[str, Any]) -> None:
        head["version"] = text

    change_manifest(bundle, change)
    return bundle


def versions(folder: Path, *texts: str) -> dict[str, Path]:
    """Return bundles of one model with different versions; the first is `texts[0]`."""
    first = version(packed(folder), texts[0])
    others = {text: version(Path(shutil.copytree(first, first.with_name(text))), text) for text in texts[1:]}
    return {texts[0]: first, **others}


class Device:
    """A device with task `sort`, whose bundle is in its bundle store and replaceable."""

    def __init__(self, folder: Path, bundles: dict[str, Path], confinement: str = "off") -> None:
        self.home, self.bundles, self.operator = folder, bundles, Operator()
        keys.generate(folder / "device.key")
        (folder / "outstation.toml").write_text(
            f"""
[device]
id = "{DEVICE}"
fleet = "{FLEET}"
data_dir = "data"
[collector]
key = "{KEY.public.text}"
[operators]
keys = ["{self.operator.key.public.text}"]
[publishers]
keys = ["{KEY.public.text}"]
[models]
confinement = "{confinement}"
[streams.cells]
fields = [{{ name = "a" }}, {{ name = "b" }}, {{ name = "c" }}, {{ name = "d" }}]
[tasks.sort]
stream = "cells"
bundle = "tiny"
schedule = "every 60 s"
""",
            encoding="utf-8",
        )
        self.configure("1")
        self.start()

    def configure(self, text: str) -> None:
        """Put another bundle at the configured path."""
        target = self.home / "data" / "bundles" / "tiny"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.bundles[text], target)

    def start(self) -> None:
        self.file, self.conf = load_config(str(self.home / "outstation.toml"))
        self.store = open_store(self.conf)
        for tuning in _tunings:
            tuning_cache.save(self.store, "sort", tuning)
        self.daemon: Daemon = build_daemon(self.file, self.conf, self.store)
        _tunings[:] = tuning_cache.load(self.store, "sort")
        self.daemon._remote_commands.start(NOW, lambda: None)

    def end_processes(self) -> None:
        """End the models' processes, as the death of their parent does."""
        for scheduled in self.daemon._scheduled_tasks:
            if isinstance(scheduled.task.model, SubprocessModel):
                scheduled.task.model.close()

    def stop(self) -> None:
        """Stop as a killed process does, without further writes."""
        self.end_processes()
        self.store.close()

    def crash(self, configured: str | None = None) -> None:
        self.stop()
        if configured is not None:
            self.configure(configured)
        self.start()

    def obey(self, name: str, **args: str) -> tuple[bool, str, dict[str, Any]]:
        self.daemon._remote_commands._receiver.accept(self.operator.command(name, args=args))
        self.daemon._remote_commands.tick(NOW)
        with self.store.transaction() as tx:
            answer = tx.commands.unsent(0)[-1]
        return answer.ok, answer.summary, answer.data

    def runs(self) -> str | None:
        """Return the version of the active bundle."""
        return next((scheduled.task.bundle.manifest.version for scheduled in self.daemon._scheduled_tasks), None)

    def digest(self, text: str) -> str:
        """Return the digest of the bundle of that version."""
        return bundle.read(self.bundles[text], None).digest

    def messages(self) -> list[dict[str, Any]]:
        """Return all written but undelivered messages."""
        return [json.loads(message.payload) for message in self.store.unacknowledged_messages(0, 1000)]

    def add_rows(self, rows: int, value: float = 0.0) -> None:
        t = T0 + np.arange(rows, dtype=np.int64) * 10_000
        with self.store.transaction() as tx:
            tx.append("cells", Rows(t, tuple(np.full(rows, value, "<f4") for _ in range(4))), "synced")

    def results_by(self, value: float = 0.0) -> str:
        """Return the version that the newest result names."""
        self.add_rows(40, value)
        self.daemon._run_batches(self.daemon._scheduled_tasks[0], NOW)
        return str([body for body in self.messages() if body["kind"] == "results"][-1]["model"]["version"])

    def activations(self) -> list[tuple[str | None, str, str]]:
        """Return (from, to, why) of each activation's audit message."""
        evidence = [body["evidence"] for body in self.messages() if body.get("event") == "activated"]
        return [
            (entry["from"] and entry["from"]["version"], entry["to"]["version"], entry["why"]) for entry in evidence
        ]

    def stored_versions(self) -> set[str]:
        home = self.home / "data" / "bundles" / ".copies"
        return {json.loads((entry / "manifest.json").read_bytes())["version"] for entry in home.iterdir()}
