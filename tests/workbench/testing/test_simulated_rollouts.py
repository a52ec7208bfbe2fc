"""Roll-outs of a scenario: the good and the bad candidate of the gate end in a simulated fleet as they do there."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from outstation.fleet.rollout import actions
from outstation.fleet.rollout import plan as plans
from outstation.foundation.errors import ConfigError, UsageError
from outstation.ml.model.bundle import builtin
from outstation.workbench.authoring import pack
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.simulated_fleet import SimulatedFleet
from outstation.workbench.testing.simulation import scenario, setup, simulation_report
from outstation.workbench.testing.simulation.page import render
from outstation.workbench.testing.simulation.runner import Simulation
from scripts.kit.bundles import CLASSIFY, KEY, LABELS, packed, write_spec
from scripts.rollout_trials import trials
from tests.kit.stations import ROOT

pytestmark = pytest.mark.process
# Of the two devices, hall-02 is in the first half.
PLAN = """
[rollout]
name = "tiny-1-1"
task = "tiny"
path = "CANDIDATE"
target = "group:hall"
[[steps]]
strategy = "shadow"
[[steps]]
strategy = "canary"
percent = 50
[[steps]]
strategy = "all"
[promote]
max_accuracy_drop = 0.02
min_devices = 1
min_batches = 12
min_hours = 0.04
[device_rules]
min_batches = 12
min_hours = 0.04
"""
EXERCISE = """
[device]
id = "sim"
fleet = "sim"
[publishers]
keys = ["{key}"]
[buffer]
commit_every = "10 s"
[streams.watch]
fields = [
  {{ name = "ax" }}, {{ name = "ay" }}, {{ name = "az" }}, {{ name = "wx" }}, {{ name = "wy" }}, {{ name = "wz" }},
]
[tasks.exercise]
stream = "watch"
bundle = "exercise"
schedule = "every 20 s"
"""
CONFIG = """
[device]
id = "sim"
fleet = "sim"
[publishers]
keys = ["{key}"]
[buffer]
commit_every = "10 s"
[streams.sensor]
fields = [{{ name = "a" }}, {{ name = "b" }}, {{ name = "c" }}, {{ name = "d" }}]
[tasks.tiny]
stream = "sensor"
bundle = "{bundle}"
schedule = "every 10 s"
"""


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of tiny 1.1.0: a good one, and one whose classes are shuffled."""
    made = {}
    for name, labels in {"good": LABELS, "bad": LABELS[1:] + LABELS[:1]}.items():
        folder = tmp_path_factory.mktemp(name)
        spec = write_spec(folder, replace(CLASSIFY, labels=labels))
        spec.write_text(spec.read_text().replace('"1.0.0"', '"1.1.0"'))
        made[name] = folder / "tiny"
        pack.write_bundle(pack.pack(spec, KEY), made[name])
    return made


@pytest.fixture
def simulate(tmp_path: Path, candidates: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the roll-out of a candidate in a fleet with tiny 1.0.0."""
    bundle = packed(tmp_path / "current", CLASSIFY)
    (tmp_path / "outstation.toml").write_text(CONFIG.format(key=KEY.public.text, bundle=bundle))
    rows, labels = CLASSIFY.rows(1200, seed=5), [LABELS[i] for i in np.arange(1200) // 7 % 3]
    lines = [",".join([*(f"{v:.5f}" for v in row), label]) for row, label in zip(rows, labels, strict=True)]
    (tmp_path / "rows.csv").write_text("\n".join([",".join([*CLASSIFY.fields, "label"]), *lines]) + "\n")

    def run(
        folder: str,
        candidate: str,
        ends: str = "completed",
        plan: str = PLAN,
        broker: str = "",
        before_rollout: Callable[[], None] = lambda: None,
        **more: Any,
    ) -> dict[str, Any]:
        (tmp_path / "plan.toml").write_text(plan.replace("CANDIDATE", str(candidates[candidate])))
        rollout = {"kind": "rollout", "at": "1 min", "plan": str(tmp_path / "plan.toml"), "ends": ends}
        described = {
            "seed": 1,
            "duration": "10 min",
            "groups": {"hall": {"devices": 2, "start_within": "10 s"}},
            "labels": {"tiny": {"every": 1, "delay": "10 s"}},
            **more,
            "events": [rollout, *more.get("events", [])],
        }
        config, recordings = tmp_path / "outstation.toml", {"sensor": tmp_path / "rows.csv"}
        if broker:
            return run_over_broker(tmp_path / folder, described, broker, config, recordings)
        fleet = SimulatedFleet(tmp_path / folder, scenario=described, config=config, recordings=recordings)
        with contextlib.closing(fleet):
            fleet.run("30 s")
            before_rollout()
            return fleet.run_scenario()

    return run


def run_over_broker(
    folder: Path, described: dict[str, Any], broker: str, config: Path, recordings: dict[str, Path]
) -> dict[str, Any]:
    """Run a scenario at thirty times real time."""
    folder.mkdir()
    chosen = setup.load(config, folder, {}, {name: (file, ()) for name, file in recordings.items()}, ())
    (folder / "scenario.toml").write_text(setup.render_toml(described))
    read = scenario.load(folder / "scenario.toml", chosen.fields, chosen.batch_s)
    with contextlib.closing(Simulation(folder, read, chosen, broker=broker, speed=30.0)) as simulation:
        return simulation_report.build(read, simulation.run(), simulation.store)


def test_a_good_candidate_reaches_all_devices_despite_a_power_cut_and_repeats_every_byte(
    simulate: Callable[..., dict[str, Any]],
) -> None:
    # While the canary runs.
    cut = {"kind": "power-cut", "devices": ["hall-02"], "at": "4 min", "lasts": "20 s"}
    document = simulate("a", "good", events=[cut])
    assert document["passed"], render(document)
    [rollout] = document["rollouts"]
    assert (rollout["outcome"], rollout["ended"] < 600) == ("completed", True)
    assert [step["strategy"] for step in rollout["steps"]] == ["shadow", "canary", "all"]
    assert [sorted(step["devices"].get("active", [])) for step in rollout["steps"]][:2] == [[], ["hall-02"]]
    assert [(device["device"], device["runs"], device["phase"]) for device in rollout["devices"]] == [
        ("hall-01", "1.1.0", "active"),
        ("hall-02", "1.1.0", "active"),
    ]
    assert rollout["served"] == sum(device["served"] for device in rollout["devices"]) > 0
    # Each decision is signed, and follows the one before.
    assert (document["audit"]["decisions"], document["audit"]["passed"]) == (4, True)
    page = render(document)
    assert "Roll-out tiny-1-1 1.1.0: completed" in page
    assert "canary 50 %" in page
    assert simulate("b", "good", events=[cut])["messages_digest"] == document["messages_digest"]


def test_a_bad_candidate_is_rolled_back_in_shadow_and_never_serves(simulate: Callable[..., dict[str, Any]]) -> None:
    document = simulate("a", "bad", "rolled-back", duration="3 min")
    assert document["passed"], render(document)
    [rollout] = document["rollouts"]
    assert (rollout["outcome"], rollout["served"], len(rollout["steps"])) == ("rolled-back", 0, 1)
    assert "accuracy gain -1.0" in rollout["why"]
    assert {device["runs"] for device in rollout["devices"]} == {"1.0.0"}
    assert {device["phase"] for device in rollout["devices"]} == {"cancelled"}


def test_a_plan_and_a_bundle_that_are_deleted_before_the_rollout_change_nothing(
    simulate: Callable[..., dict[str, Any]], candidates: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(candidates["bad"], tmp_path / "candidate" / "tiny"))
    plan = PLAN.replace("CANDIDATE", str(copy))

    def delete() -> None:
        (tmp_path / "plan.toml").unlink()
        shutil.rmtree(copy)

    document = simulate("a", "bad", "rolled-back", plan, duration="3 min", before_rollout=delete)
    assert document["passed"], render(document)
    [rollout] = document["rollouts"]
    assert (rollout["name"], rollout["version"]) == ("tiny-1-1", "1.1.0")
    assert "accuracy gain -1.0" in rollout["why"]


def test_a_bad_candidate_is_rolled_back_in_real_time_over_a_real_broker(
    simulate: Callable[..., dict[str, Any]], outstation_broker: MosquittoBroker
) -> None:
    url = f"mqtt://127.0.0.1:{outstation_broker.port}"
    document = simulate("a", "bad", "rolled-back", broker=url, duration="3 min", drain="1 min")
    assert document["passed"], render(document)
    [rollout] = document["rollouts"]
    assert (rollout["outcome"], rollout["served"]) == ("rolled-back", 0)
    assert {device["phase"] for device in rollout["devices"]} == {"cancelled"}


def test_a_rollout_that_lacks_evidence_is_held_and_another_end_fails_the_run(
    simulate: Callable[..., dict[str, Any]],
) -> None:
    document = simulate("a", "good", events=[{"kind": "silence", "at": "90 s", "stream": "sensor"}])
    [rollout] = document["rollouts"]
    assert (document["passed"], rollout["outcome"], rollout["ended"]) == (False, "held", None)
    assert "devices with 12 batches: 0 of 1" in rollout["why"]
    assert "Roll-out tiny-1-1 is held; expected is completed." in render(document)


def test_a_candidate_that_crashes_ends_neither_the_simulation_nor_a_device(tmp_path: Path) -> None:
    bundle = trials.make_bundle("crash", tmp_path, KEY)
    plan = PLAN.replace("tiny", "exercise").replace("CANDIDATE", str(bundle)).replace("group:hall", "all")
    # At once to all devices.
    head, *_, last = plan.split("[[steps]]")
    (tmp_path / "plan.toml").write_text(f"{head}[[steps]]{last}")
    (tmp_path / "outstation.toml").write_text(EXERCISE.format(key=KEY.public.text))
    rollout = {"kind": "rollout", "at": "1 min", "plan": "../plan.toml", "ends": "rolled-back"}
    scenario = {"duration": "5 min", "groups": {"hall": {"devices": 2}}, "events": [rollout]}
    recordings = {"watch": builtin.recordings_dir() / "exercise.npz"}
    fleet = SimulatedFleet(
        tmp_path / "a", scenario=scenario, config=tmp_path / "outstation.toml", recordings=recordings
    )
    with contextlib.closing(fleet):
        document = fleet.run_scenario()
    assert document["passed"], render(document)
    [rollout] = document["rollouts"]
    # The first crash aborts it.
    assert "crash" in {device["reason"] for device in rollout["devices"]} <= {"crash", "aborted"}
    assert {device["runs"] for device in rollout["devices"]} == {"1.0.0"}


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("max_accuracy_drop = 0.02", "max_latency_ratio = 2.0", r"plan\.toml: steps\[0\]\.max_latency_ratio: a simu"),
        ('path = "CANDIDATE"', 'bundle = "tiny"\nversion = "1.1.0"', r"plan\.toml: rollout\.path: is missing"),
        ('task = "tiny"', 'task = "tinny"', r"rollout\.task: no task 'tinny'.*tiny"),
        ("group:hall", "group:hell", r"rollout\.target: no group 'hell'"),
    ],
)
def test_a_plan_that_a_simulation_cannot_follow_is_one_line_with_file_and_key(
    simulate: Callable[..., dict[str, Any]], before: str, after: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        simulate("a", "good", plan=PLAN.replace(before, after))
    assert "\n" not in str(caught.value)


def test_a_step_that_selects_too_few_devices_stops_the_run_before_it_starts(
    simulate: Callable[..., dict[str, Any]],
) -> None:
    plan = PLAN.replace("group:hall", "all").replace("min_devices = 1", "min_devices = 2")
    with pytest.raises(UsageError, match="selects 1 of 2 enrolled devices, but 2 must report"):
        simulate("a", "good", plan=plan)


def test_a_step_that_selects_nobody_of_a_group_stops_the_run_before_it_starts(
    simulate: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(UsageError, match=r"canary 1 %\): selects 0 of 2 enrolled devices.*percent = \d+ selects 1"):
        simulate("a", "good", plan=PLAN.replace("percent = 50", "percent = 1"))


def test_a_roll_out_that_cannot_be_completed_in_time_stops_the_run_before_it_starts(
    simulate: Callable[..., dict[str, Any]],
) -> None:
    hours, batches = (
        PLAN[: PLAN.rindex("min_hours")] + "min_hours = 1.0\n",
        PLAN.replace("min_batches = 12", "min_batches = 20"),
    )
    for folder, plan, least in (("a", hours, "1 h 04 min"), ("b", batches, "10 min 00 s")):
        with pytest.raises(
            ConfigError, match=rf"events\[0\]\.at: the roll-out takes at least {least} .* and 9 min 00 s"
        ):
            simulate(folder, "good", plan=plan)
    assert simulate("c", "good", plan=hours, ends="held", duration="2 min")["rollouts"][0]["outcome"] == "held"


def test_the_plan_of_the_guide_fits_the_scenario_that_the_guide_names(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guides" / "simulate.md").read_text(encoding="utf-8")
    [plan] = re.findall(r"<!-- file: plan.toml -->\n```toml\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    at, duration = re.findall(r'With `at = "(.*?)"` and `duration = "(.*?)"` it is completed', guide)[0]
    (tmp_path / "plan.toml").write_text(plan)
    (tmp_path / "mymodel-2").mkdir()
    head = f'duration = "{duration}"\n[groups.hall]\ndevices = 6\n[[events]]\nkind = "rollout"\n'
    (tmp_path / "scenario.toml").write_text(f'{head}at = "{at}"\nplan = "plan.toml"\n')
    read = scenario.load(tmp_path / "scenario.toml", {"mymodel": ["a"]}, {"mymodel": 60.0})
    chosen = plans.read(tmp_path / "plan.toml").to_plan("mymodel", "2", "sha256:" + "0" * 64)
    actions.require_selection(chosen, [*read.device_names()])


def test_a_scenario_with_rejected_labels_only_fails(simulate: Callable[..., dict[str, Any]]) -> None:
    report = simulate(
        "a", "good", ends="held", duration="3 min", labels={"tiny": {"column": "a", "every": 1, "delay": "10 s"}}
    )
    assert not report["passed"]
    assert report["labels"] == 0
    rejected = f"all {report['rejected_labels']} labels of task tiny: this is no label of this model; it knows left"
    assert any(rejected in problem for problem in report["problems"])


def test_a_scenario_without_labels_before_its_end_fails(simulate: Callable[..., dict[str, Any]]) -> None:
    report = simulate("a", "good", ends="held", duration="3 min", labels={"tiny": {"column": "a", "delay": "1 h"}})
    assert any("No label of task tiny came due: `delay`" in problem for problem in report["problems"])


def test_labels_of_a_column_that_the_recording_lacks_are_an_error(simulate: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match=r"rows\.csv: has no column 'truth' for labels"):
        simulate("a", "good", labels={"tiny": {"column": "truth"}})
