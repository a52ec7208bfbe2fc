"""Bundles that ran are kept, and an operator goes back to the one before: verified like any, and over restarts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.cli import wiring
from agent.device.daemon import Daemon
from agent.device.operating import kept
from agent.device.storage.rows import Rows
from agent.errors import StorageFull
from agent.wire import keys
from tests.bundles import KEY, change_manifest, packed
from tests.operators import DEVICE, FLEET, NOW, Operator

T0 = 1_764_022_680_000_000


def version(bundle: Path, text: str) -> Path:
    def change(head: dict[str, Any]) -> None:
        head["version"] = text

    change_manifest(bundle, change)
    return bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    first = version(packed(tmp_path_factory.mktemp("bundles")), "1")
    found = {"1": first}
    for text in ("2", "3"):
        found[text] = version(Path(shutil.copytree(first, first.with_name(text))), text)
    return found


class Device:
    """A device with task `sort`, whose bundle lies in its bundle store and can be exchanged."""

    def __init__(self, folder: Path, bundles: dict[str, Path]) -> None:
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
        """Put another bundle where the config looks."""
        target = self.home / "data" / "bundles" / "tiny"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.bundles[text], target)

    def start(self) -> None:
        self.file, self.conf = wiring.load(str(self.home / "outstation.toml"))
        self.store = wiring.open_store(self.conf)
        self.daemon: Daemon = wiring.daemon(self.file, self.conf, self.store)
        self.daemon._operations.start(NOW, lambda: None)

    def crash(self, configured: str | None = None) -> None:
        self.store.close()
        if configured is not None:
            self.configure(configured)
        self.start()

    def obey(self, name: str, **args: str) -> tuple[bool, str, dict[str, Any]]:
        self.daemon._operations._commands.take(self.operator.command(name, args=args))
        self.daemon._operations.turn(NOW)
        with self.store.transaction() as tx:
            answer = tx.commands.unsent(0)[-1]
        return answer.ok, answer.summary, answer.data

    def runs(self) -> str | None:
        """The version of the bundle in force."""
        return next((one.task.bundle.manifest.version for one in self.daemon._planned), None)

    def results_by(self) -> str:
        """The version that the newest result names."""
        rows = 40
        t = T0 + np.arange(rows, dtype=np.int64) * 10_000
        with self.store.transaction() as tx:
            tx.append("cells", Rows(t, tuple(np.zeros(rows, "<f4") for _ in range(4))), "synced")
        self.daemon._work_off(self.daemon._planned[0].task, NOW)
        bodies = [json.loads(message.payload) for message in self.store.unsent(0, 1000)]
        return str([body for body in bodies if body["kind"] == "results"][-1]["model"]["version"])

    def activations(self) -> list[tuple[str | None, str, str]]:
        """(from, to, why) of each audit message."""
        bodies = [json.loads(message.payload) for message in self.store.unsent(0, 1000)]
        found = [body["evidence"] for body in bodies if body.get("event") == "activated"]
        return [(one["from"] and one["from"]["version"], one["to"]["version"], one["why"]) for one in found]

    def kept(self) -> set[str]:
        home = self.home / "data" / "bundles" / ".kept"
        return {json.loads((entry / "manifest.json").read_bytes())["version"] for entry in home.iterdir()}


@pytest.fixture
def device(tmp_path: Path, bundles: dict[str, Path]) -> Iterator[Device]:
    made = Device(tmp_path, bundles)
    yield made
    made.store.close()


def test_a_first_bundle_has_nothing_to_go_back_to(device: Device) -> None:
    ok, summary, _ = device.obey("rollback", task="sort")
    assert not ok
    assert "nothing to go back to" in summary
    assert device.runs() == "1"


def test_a_rollback_runs_the_bundle_before_says_from_and_to_and_holds_over_a_restart(device: Device) -> None:
    device.crash("2")
    assert device.results_by() == "2"
    ok, summary, data = device.obey("rollback", task="sort")
    assert ok, summary
    assert (data["from"], data["to"]) == tuple(digest(device, text) for text in ("2", "1"))
    assert device.runs() == device.results_by() == "1"
    device.crash()
    assert device.runs() == device.results_by() == "1"
    assert device.activations() == [(None, "1", "configured"), ("1", "2", "configured"), ("2", "1", "rollback")]


def digest(device: Device, text: str) -> str:
    from agent.model import bundle

    return bundle.read(device.bundles[text], None).digest


def test_a_second_rollback_goes_back_to_the_one_that_was_left(device: Device) -> None:
    device.crash("2")
    device.obey("rollback", task="sort")
    ok, _, _ = device.obey("rollback", task="sort")
    assert ok
    assert device.runs() == "2"
    device.crash()
    assert device.runs() == "2"


def test_a_rollback_ends_when_another_bundle_is_configured(device: Device) -> None:
    device.crash("2")
    device.obey("rollback", task="sort")
    device.crash("3")
    assert device.runs() == "3"
    device.crash()
    assert device.runs() == "3"
    ok, _, data = device.obey("rollback", task="sort")
    assert (ok, data["to"]) == (True, digest(device, "1"))


def test_only_the_last_two_bundles_are_kept(device: Device) -> None:
    device.crash("2")
    assert device.kept() == {"1", "2"}
    device.crash("3")
    assert device.kept() == {"2", "3"}


def test_a_kept_copy_that_was_altered_is_refused_and_what_ran_goes_on(device: Device) -> None:
    device.crash("2")
    copy = kept.folder(device.conf.data_dir, digest(device, "1"))
    (copy / "model.tflite").write_bytes(b"evil")
    ok, summary, _ = device.obey("rollback", task="sort")
    assert not ok
    assert "altered" in summary
    assert device.runs() == device.results_by() == "2"
    device.crash()
    assert device.runs() == "2"


def test_a_task_whose_configured_bundle_is_broken_is_rescued_by_a_rollback(device: Device) -> None:
    device.store.close()
    model = device.home / "data" / "bundles" / "tiny" / "model.tflite"
    model.write_bytes(b"not a model")
    device.start()
    assert device.runs() is None
    ok, summary, _ = device.obey("rollback", task="sort")
    assert ok, summary
    assert device.runs() == device.results_by() == "1"
    device.crash()
    assert device.runs() == "1"


def test_a_crash_within_the_commit_leaves_the_bundle_that_ran(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.crash("2")
    with monkeypatch.context() as patched:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(kept, "record", die)
        with pytest.raises(KeyboardInterrupt):
            device.obey("rollback", task="sort")
    device.crash()
    assert device.runs() == "2"
    with device.store.transaction() as tx:
        assert "stopped while" in tx.commands.unsent(0)[-1].summary


def test_half_a_copy_is_no_copy_and_is_made_anew(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.store.close()
    device.configure("2")
    writes = []

    def die_later(path: Path, data: bytes, mode: int) -> None:
        writes.append(path)
        if len(writes) == 3:
            raise KeyboardInterrupt
        path.write_bytes(data)

    with monkeypatch.context() as patched:
        patched.setattr(kept, "write_new", die_later)
        with pytest.raises(KeyboardInterrupt):
            device.start()
    device.daemon._store.close()
    device.store.close()
    device.start()
    assert device.kept() == {"1", "2"}
    assert [path.name for path in (device.home / "data" / "bundles" / ".kept").iterdir() if "half" in path.name] == []


def test_a_disk_that_takes_no_copy_keeps_no_task_from_running(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(kept, "write_new", full)
        device.crash("2")
    assert device.runs() == "2"
    device.crash()
    assert device.kept() == {"1", "2"}


def test_a_full_store_at_the_start_records_the_activation_at_the_next_one(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageFull("full")

    with monkeypatch.context() as patched:
        patched.setattr(kept, "record", full)
        device.crash("2")
    assert device.activations()[-1] == (None, "1", "configured")
    device.crash()
    assert device.activations()[-1] == ("1", "2", "configured")


def test_pause_schedule_and_rollback_are_shown_by_health(device: Device) -> None:
    device.crash("2")
    device.obey("rollback", task="sort")
    device.obey("pause", task="sort")
    device.obey("set-schedule", task="sort", schedule="when 7 rows")
    ok, _, status = device.obey("report")
    assert ok
    bodies = [json.loads(message.payload) for message in device.store.unsent(0, 1000)]
    health = [body for body in bodies if body["kind"] == "health"][-1]["tasks"]["sort"]
    expected = (True, "when 7 rows", digest(device, "1"))
    assert (health["paused"], health["schedule_set"], health["rolled_back_to"]) == expected
    shown = status["tasks"][0]
    assert (shown["paused"], shown["schedule"], shown["rolled_back_to"]) == expected
    assert shown["bundle"] == "tiny 1"


def test_an_activation_says_what_labels_of_its_results_may_be(device: Device) -> None:
    bodies = [json.loads(message.payload) for message in device.store.unsent(0, 1000)]
    said = [one["evidence"] for one in bodies if one.get("event") == "activated"][-1]
    manifest = device.daemon._planned[0].task.bundle.manifest
    wanted = (manifest.kind, list(manifest.output.labels), manifest.output.threshold)
    assert (said["kind"], said["labels"], said["threshold"]) == wanted
