"""Soak tests in simulated time, shortened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.soaks import Result
from scripts.soaks.day import Sample, flat
from scripts.soaks.fleet import fleet
from tests.kit.browsers import CHROMIUM

ROOT = Path(__file__).parents[2]


def test_half_an_hour_on_a_lossy_link_delivers_all_with_constant_memory() -> None:
    """Run in a separate process, so that the memory use of other tests is not measured."""
    command = [sys.executable, "-m", "scripts.soaks", "day", "--hours", "0.5", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [report] = json.loads(done.stdout)
    assert report["passed"]
    assert report["rows"] == 18_000
    assert report["connections"] > 2


def test_seventy_five_minutes_offline_on_a_small_store_lose_only_what_is_declared() -> None:
    command = [sys.executable, "-m", "scripts.soaks", "offline", "--hours", "1.25", "--seed", "7", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [report] = json.loads(done.stdout)
    assert report["passed"]
    assert report["evicted"] > 100
    assert report["arrived"] + report["evicted"] == report["written"]
    assert report["largest"] <= report["max_size"]


def test_two_hours_of_a_fleet_with_faults_and_a_rollout_raise_no_false_alert_and_miss_none() -> None:
    command = [sys.executable, "-m", "scripts.soaks", "alert-truth", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [report] = json.loads(done.stdout)
    assert report["problems"] == []
    # The roll-out cleared nothing.
    assert {name: report[name]["open"] for name in ("fine", "stuck", "weak", "wrong")} == {
        "fine": [],
        "stuck": ["fault wy"],
        "weak": ["drift ax"],
        "wrong": ["drift reference"],
    }


def sample(hour: float, **changes: int) -> Sample:
    return Sample(hour, **{"own": 50_000, "rss": 80_000, "handles": 16, "threads": 2, **changes})


def problems(*samples: Sample) -> list[str]:
    result = Result()
    flat([sample(0, own=20_000, handles=3), sample(2), *samples], 24, result)
    return result.problems


def test_what_is_allocated_while_it_warms_up_is_not_held_against_it() -> None:
    assert problems(sample(12), sample(24, own=55_000)) == []


def test_memory_handles_and_threads_that_grow_are_noticed() -> None:
    assert problems(sample(12, own=55_121)) == ["memory grew by 5.0 MiB after hour 2.0"]
    assert problems(sample(12, handles=17)) == ["handles between 16 and 17"]
    assert problems(sample(12, threads=3), sample(24)) == ["threads between 2 and 3"]


@pytest.mark.postgres
@pytest.mark.broker
def test_a_fleet_loses_nothing_while_its_collectors_are_killed(tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip("chromium is not installed: apt-get install chromium")
    result = fleet(tmp_path, 1, 4 / 3600, lambda _: None, devices=30, kill_every_s=1.5)
    # How fast the page is depends on what else runs.
    assert [problem for problem in result.problems if "the limit is" not in problem] == []
    assert result.figures["audit_passed"]
    assert result.figures["kills"] >= 2
    assert result.figures["messages"] > 40
    assert result.figures["change_s"]["n"] >= 1
