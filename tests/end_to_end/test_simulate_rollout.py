"""Rollouts in a small simulated fleet, end to end: repository, operator, bad connections, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outstation.protocol.wire.keys import generate
from outstation.workbench.testing.process import find_program
from scripts.rollout_trials import trials
from tests.end_to_end.test_demo import left_over
from tests.end_to_end.test_simulate_fleet import simulate

# The rollout takes 20 s, and ends the simulation; a busy machine is slow.
LIMIT_S = 600
pytestmark = pytest.mark.timeout(LIMIT_S + 100)
# Few batches: this tests the procedure, not the certainty of the verdict.
PLAN = """
[rollout]
name = "{bundle}"
task = "exercise"
path = "{bundle}"

[promote]
min_devices = 1
min_batches = 6
min_hours = 0.0
min_agreement = 0.3
max_failed_share = 0.3

[device_rules]
min_batches = 8
min_hours = 0.0
min_agreement = 0.3
max_accuracy_drop = 0.9
batch_timeout_s = 10.0

[[steps]]
strategy = "{strategy}"
{last}
"""


def rolled(home: Path, bundle: str, strategy: str, *options: str) -> tuple[int, Any]:
    """Return exit code and report of a rollout on three devices."""
    find_program("mosquitto")
    key = generate(home / "publisher.key")
    trials.make_bundle(bundle, home, key)
    last = "" if strategy == "all" else '[[steps]]\nstrategy = "all"'
    (home / "plan.toml").write_text(PLAN.format(bundle=bundle, strategy=strategy, last=last), encoding="utf-8")
    arguments = ("--devices", "3", "--speed", "8", "--rollout", str(home / "plan.toml"), "--json")
    limit = ("--duration", str(LIMIT_S))
    done = simulate(home / "it", *arguments, *limit, "--publisher", key.public.text, *options, timeout_s=LIMIT_S + 60)
    assert done.stdout, done.stderr
    assert left_over(home / "it") == []
    return done.returncode, json.loads(done.stdout)


def test_a_good_bundle_reaches_all_devices_despite_a_cut_download(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("good")
    code, report = rolled(home, "distilled", "all", "--cut", "1", "--away", "0", "--slow", "1")
    assert code == 0, report["rollout"]
    rollout, devices = report["rollout"], report["devices"]
    assert (rollout["state"], rollout["ended"], report["audit"]["passed"]) == ("finished", True, True)
    assert [item["phase"] for item in devices] == ["active"] * 3
    assert {item["runs"]["digest"] for item in devices} == {rollout["digest"]}
    assert rollout["served"] == sum(item["served"]["1.1.0"] for item in devices) > 0
    assert list(rollout["disturbances"]["cut"].values()) == [1]
    assert [item["event"] for item in rollout["decisions"]] == ["started", "finished"]


def test_a_crashing_bundle_is_aborted_in_shadow_without_results(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("crash")
    code, report = rolled(home, "crash", "shadow", "--cut", "0", "--away", "0", "--slow", "0")
    assert code == 0
    rollout, devices = report["rollout"], report["devices"]
    assert (rollout["state"], rollout["step"], rollout["served"]) == ("aborted", 1, 0)
    assert {item["runs"]["version"] for item in devices} == {"1.0.0"}
    # A crash is also a failed batch: which of the two is reported first is chance.
    assert {"crash", "error_rate"} & {item["reason"] for item in devices}
    assert report["audit"]["passed"] is True
    assert rollout["decisions"][-1]["event"] == "aborted"
