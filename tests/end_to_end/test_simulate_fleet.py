"""`outstation fleet simulate`: a fleet on one machine, its disturbances, and its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from outstation.workbench.simulate import disturbances, plan
from outstation.workbench.simulate.simulation import Simulation
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.process import find_program
from tests.end_to_end.test_demo import left_over

NAMES = plan.device_names(50)


def simulate(home: Path, *arguments: str, timeout_s: float = 170.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outstation", "fleet", "simulate", "--dir", str(home), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def drawn(seed: int, **counts: int) -> disturbances.Disturbances:
    return disturbances.draw(NAMES, seed, span_s=60.0, **{"away": 5, "cut": 5, "slow": 5, "worse": 2} | counts)


def test_the_same_seed_draws_the_same_disturbances() -> None:
    assert drawn(1) == drawn(1)
    assert drawn(1).degraded != drawn(2).degraded


def test_no_device_has_two_disturbances() -> None:
    result = drawn(3)
    groups = [set(result.degraded), set(result.outages), set(result.download_cuts), set(result.slow_rates)]
    assert [len(group) for group in groups] == [2, 5, 5, 5]
    assert len(set.union(*groups)) == 17


def test_more_disturbances_than_devices_use_each_device_once() -> None:
    result = drawn(4, away=30, cut=30, slow=30, worse=2)
    assert (len(result.degraded), len(result.outages), len(result.download_cuts), len(result.slow_rates)) == (
        2,
        30,
        18,
        0,
    )


def test_some_outages_begin_before_the_rollout_and_all_end() -> None:
    away = list(drawn(5).outages.values())
    assert 0 < sum(item.begin_s == 0.0 for item in away) < len(away)
    assert all(item.end_s > item.begin_s for item in away)


def test_a_simulation_has_started_once_the_slowest_device_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def spawn(simulation: Simulation, name: str, *_: str) -> None:
        simulation.log_path(name).write_text("", encoding="utf-8")
        simulation.processes[name] = Mock()

    def look(simulation: Simulation) -> None:
        looks.append(len(simulation.processes))
        if len(looks) == 3:
            for name in NAMES[:2]:
                simulation.log_path(name).write_text("running: 1 stream", encoding="utf-8")

    monkeypatch.setattr(Simulation, "_start_broker", Mock())
    monkeypatch.setattr(Simulation, "spawn", spawn)
    monkeypatch.setattr(Simulation, "restart_exited", look)
    Simulation(tmp_path, plan.demo_plan(2, 20.0)).start()
    # All processes were started before: the collector and both devices.
    assert looks == [3, 3, 3]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Simulate three devices on a running broker."""
    find_program("mosquitto")
    home = tmp_path_factory.mktemp("fleet")
    with MosquittoBroker(home / "broker") as broker:
        options = ("--devices", "3", "--duration", "10", "--worse", "1", "--broker", broker.url, "--json")
        done = simulate(home / "it", *options)
    assert done.returncode == 0, done.stderr
    assert left_over(home / "it") == []
    return json.loads(done.stdout)


def test_a_fleet_on_a_given_broker_ends_with_a_passed_audit(report: Any) -> None:
    assert report["audit"]["passed"] is True
    assert report["audit"]["devices"] == 3
    assert [item["device"] for item in report["devices"]] == NAMES[:3]
    assert min(item["results"] for item in report["devices"]) > 10


def test_its_report_has_the_members_that_programs_read(report: Any) -> None:
    assert {"devices", "accuracy", "seconds", "audit"} <= set(report)
    for item in report["devices"]:
        assert {"device", "rows", "windows", "results", "drift", "faults", "alerts"} <= set(item)


def test_a_roll_out_file_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('[rollout]\nname = "a"\n', encoding="utf-8")
    done = simulate(tmp_path / "it", "--devices", "2", "--rollout", str(file))
    assert done.returncode == 2
    assert f"{file}: rollout.task" in done.stderr
