"""`outstation demo`: the whole system on one desktop, on Mosquitto and on the broker from pip."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import find_program

# Real starts, as users and systemd do it.
pytestmark = pytest.mark.exec

WITHOUT_MOSQUITTO = """\
import shutil

which = shutil.which
shutil.which = lambda name, *more, **named: None if name == "mosquitto" else which(name, *more, **named)
if __name__ == "__main__":
    from outstation.__main__ import main

    main()
"""


def left_over(folder: Path) -> list[str]:
    """Command lines of processes that know the folder."""
    processes = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            processes.append(command)
    return processes


def run(
    home: Path, *arguments: str, command: tuple[str, ...] = ("-m", "outstation")
) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, *command, "demo", "--dir", str(home), *arguments]
    return subprocess.run(whole, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    find_program("mosquitto")
    home = tmp_path_factory.mktemp("demo")
    done = run(home, "--duration", "20", "--json")
    assert done.returncode == 0, done.stderr
    assert left_over(home) == []
    return json.loads(done.stdout)


def test_the_demo_ends_with_a_passed_audit_of_every_device(report: Any) -> None:
    audit = report["audit"]
    assert audit["passed"] is True
    assert audit["devices"] == 4
    assert audit["messages"] > 4 * 20
    assert (audit["gaps"], audit["duplicates"], audit["invalid"]) == ([], 0, [])


def test_drift_and_the_fault_are_reported_on_their_devices_only(report: Any) -> None:
    drift = {device["device"]: set(device["drift"]) for device in report["devices"]}
    faults = {device["device"]: set(device["faults"]) for device in report["devices"]}
    # What may only follow from wrong classes says so in its sentence.
    sure = [sentence for sentence in report["devices"][0]["alerts"] if "may follow" not in sentence]
    named = {sentence.split(":")[0] for sentence in sure}
    assert named
    assert named <= {"ax", "ay", "az"} & drift.pop("pi-01")
    assert drift == {"pi-02": set(), "pi-03": set(), "pi-04": set()}
    assert faults == {"pi-01": set(), "pi-02": {"wy"}, "pi-03": set(), "pi-04": set()}
    assert [bool(device["alerts"]) for device in report["devices"]] == [True, True, False, False]


def test_its_report_has_the_members_that_programs_read(report: Any) -> None:
    for device in report["devices"]:
        assert {"device", "rows", "windows", "results", "drift", "faults", "alerts"} <= set(device)
        assert min(device["rows"], device["windows"], device["results"]) > 0
        assert all(isinstance(sentence, str) and sentence.endswith(".") for sentence in device["alerts"])
    assert {"accuracy", "seconds", "audit"} <= set(report)
    assert 0 < report["accuracy"] <= 1


def test_without_mosquitto_it_runs_on_the_broker_from_pip(tmp_path: Path) -> None:
    pytest.importorskip("iotcore", reason="the demo extra is not installed")
    script, home = tmp_path / "without_mosquitto.py", tmp_path / "home"
    script.write_text(WITHOUT_MOSQUITTO, encoding="utf-8")
    done = run(home, "--duration", "15", "--devices", "2", "--json", command=(str(script),))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["audit"]["passed"] is True
    assert report["devices"][0]["drift"]
    assert report["devices"][1]["faults"] == ["wy"]
    assert (home / "broker.toml").exists()
    assert not (home / "broker.log").exists()
    assert left_over(home) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    find_program("mosquitto")
    home = tmp_path / "home"
    command = [sys.executable, "-m", "outstation", "demo", "--dir", str(home), "--devices", "1", "--no-dashboard"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as demo:
        wait_until("the daemon's log", (home / "pi-01.log").exists)
        time.sleep(0.5)
        os.kill(demo.pid, number)
        _, stderr = demo.communicate(timeout=60)
    assert demo.returncode != 0
    assert b"Traceback" not in stderr
    assert left_over(home) == []


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious", encoding="utf-8")
    done = run(tmp_path)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
