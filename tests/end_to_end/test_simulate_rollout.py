"""Roll-outs in a small simulated fleet, end to end: repository, operator, devices with bad lines, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.testing.process import find_program
from agent.wire.keys import generate
from scripts.rollout_trials import candidates
from tests.end_to_end.test_demo import left_over
from tests.end_to_end.test_simulate_fleet import simulate

# A machine that is busy with other tests is slow; the roll-out itself takes 20 s.
pytestmark = pytest.mark.timeout(240)
# Few batches: what is looked at here is the way, and not how sure a verdict is.
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
    """Exit code and report of a roll-out in three devices."""
    find_program("mosquitto")
    key = generate(home / "publisher.key")
    candidates.make(bundle, home, key)
    last = "" if strategy == "all" else '[[steps]]\nstrategy = "all"'
    (home / "plan.toml").write_text(PLAN.format(bundle=bundle, strategy=strategy, last=last), encoding="utf-8")
    asked = ("--devices", "3", "--speed", "20", "--rollout", str(home / "plan.toml"), "--duration", "150", "--json")
    done = simulate(home / "it", *asked, "--publisher", key.public.text, *options)
    assert done.stdout, done.stderr
    assert left_over(home / "it") == []
    return done.returncode, json.loads(done.stdout)


def test_a_good_bundle_arrives_everywhere_although_a_download_breaks_off(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("good")
    code, report = rolled(home, "distilled", "all", "--cut", "1", "--away", "0", "--slow", "1")
    assert code == 0, report["rollout"]
    rollout, devices = report["rollout"], report["devices"]
    assert (rollout["state"], rollout["ended"], report["audit"]["passed"]) == ("finished", True, True)
    assert [one["phase"] for one in devices] == ["active"] * 3
    assert {one["runs"]["digest"] for one in devices} == {rollout["digest"]}
    assert rollout["served"] == sum(one["served"]["1.1.0"] for one in devices) > 0
    assert list(rollout["disturbances"]["cut"].values()) == [1]
    assert [one["event"] for one in rollout["decisions"]] == ["started", "finished"]


def test_a_bundle_that_crashes_is_stopped_in_shadow_and_no_result_is_its(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("crash")
    code, report = rolled(home, "crash", "shadow", "--cut", "0", "--away", "0", "--slow", "0")
    assert code == 0
    rollout, devices = report["rollout"], report["devices"]
    assert (rollout["state"], rollout["step"], rollout["served"]) == ("aborted", 1, 0)
    assert {one["runs"]["version"] for one in devices} == {"1.0.0"}
    # Its death is a batch that failed, too: which of the two is found first is chance.
    assert {"crash", "error_rate"} & {one["reason"] for one in devices}
    assert report["audit"]["passed"] is True
    assert rollout["decisions"][-1]["event"] == "aborted"
