"""Quarantine in real processes: a model ends the daemon, the previous bundle goes on, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outstation.device.bundles.quarantine import CrashMarker
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.inference import tuning
from outstation.workbench.testing.fleet import DeviceProcess, LocalFleet
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import NotifySocket
from scripts.kit.bundles import KEY, change_manifest
from tests.kit.commands import audit_fleet

ROWS = 6000
# More rows than the tail of a recording that fills no window.
OPEN_TAIL = 1500


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path) as made:
        made.broker.start()
        made.collector.start()
        yield made


def running(fleet: LocalFleet) -> DeviceProcess:
    """A device whose first results, by the bundle that ships, have arrived."""
    device = fleet.add_device("pi-01").add_replay_stream(ROWS, 100).add_task("exercise")
    device.append_config(
        f'[publishers]\nkeys = ["{KEY.public.text}"]\n[models]\nconfinement = "off"\n'
    ).start_and_wait()
    wait_until("first results", lambda: fleet.last_result_row("pi-01"))
    assert device.stop() == 0
    return device


def exchange(device: DeviceProcess) -> str:
    """Another version of the bundle, whose model is another file; the SHA-256 of that."""
    folder = device.data_dir / "bundles" / "exercise"
    shutil.copytree(builtin.bundles_dir() / "exercise", folder)
    # What stands behind a flatbuffer belongs to no table of it.
    content = (folder / "model.tflite").read_bytes() + bytes(16)
    (folder / "model.tflite").write_bytes(content)

    def change(head: dict[str, Any]) -> None:
        head["version"] = "9.9.9"
        head["files"]["model.tflite"] = tuning.model_digest(content)

    change_manifest(folder, change)
    return tuning.model_digest(content)


def shipped_version() -> str:
    return bundle.read(builtin.bundles_dir() / "exercise", None).manifest.version


def versions(fleet: LocalFleet) -> list[str]:
    """Return the versions of the bundles whose results arrived."""
    version = "json_extract(CAST(payload AS TEXT), '$.model.version')"
    return [str(row[0]) for row in fleet.query(f"SELECT DISTINCT {version} FROM messages WHERE kind = 'results'")]


def went_on_without_loss(fleet: LocalFleet, device: DeviceProcess) -> None:
    wait_until("the results of all rows", lambda: fleet.last_result_row("pi-01") > ROWS - OPEN_TAIL)
    assert device.stop() == 0
    wait_until("stopped", lambda: fleet.query("SELECT state FROM devices") == [("stopped",)])
    assert versions(fleet) == [shipped_version()]
    [(severity, summary)] = fleet.query("SELECT severity, summary FROM alerts WHERE alert = 'model'")
    assert severity == "critical"
    assert summary.startswith("exercise: exercise 9.9.9 (sha256:")
    assert "crashed or hung 2 times in a row" in summary
    events = fleet.query("SELECT json_extract(CAST(payload AS TEXT), '$.event') FROM messages WHERE kind = 'audit'")
    assert ("quarantined",) in events
    code, report = audit_fleet(fleet.home)
    assert (code, report["passed"], report["gaps"], report["duplicates"]) == (0, True, [], 0)
    assert [(track["first"], track["last"] > ROWS - OPEN_TAIL) for track in report["coverage"]] == [(1, True)]


def test_a_bundle_that_kills_the_agent_twice_gives_way_and_nothing_is_lost(fleet: LocalFleet) -> None:
    device = running(fleet)
    device.set_launcher(("-m", "scripts.faults.launch", f"die-in-model={exchange(device)}", "--"))
    for _ in range(2):
        assert device.start().wait(60) == -signal.SIGSEGV
    device.start_and_wait()
    went_on_without_loss(fleet, device)


def test_a_hanging_bundle_gives_way_after_two_watchdog_kills(
    fleet: LocalFleet,
) -> None:
    device = running(fleet)
    device.set_launcher(("-m", "scripts.faults.launch", f"hang-in-model={exchange(device)}", "--"))
    with contextlib.closing(NotifySocket(fleet.folder / "notify")) as systemd:
        for _ in range(2):
            device.start_and_wait(NOTIFY_SOCKET=str(systemd.path))
            wait_until("it hangs", lambda: hangs(device, systemd))
            # As systemd does then.
            os.kill(device.pid, signal.SIGABRT)
            assert device.wait(60) == -signal.SIGABRT
        device.start_and_wait(NOTIFY_SOCKET=str(systemd.path))
        went_on_without_loss(fleet, device)


def hangs(device: DeviceProcess, systemd: NotifySocket) -> bool:
    """Return True if the crash marker stays the same, and no sign of life comes meanwhile."""
    first, signs = CrashMarker(device.data_dir).previous, systemd.messages.count("WATCHDOG=1")
    time.sleep(2.0)
    second = CrashMarker(device.data_dir).previous
    is_same = first is not None and second is not None and first.id == second.id
    return is_same and systemd.messages.count("WATCHDOG=1") == signs
