"""scripts/rollouts: valid trials, a verdict that detects wrong outcomes, and a few trials in a small fleet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outstation.fleet.rollout import plan
from outstation.ml.model.bundle import bundle
from outstation.ml.model.sandbox import probe
from outstation.protocol.wire.keys import generate
from scripts.rollout_trials import trials
from scripts.rollout_trials.trials import TRIALS, Trial, problems

NEW, OLD = "sha256:new", "sha256:old"
KNOWN = {trial.name: trial for trial in TRIALS}
Change = Callable[[dict[str, Any]], Any]


def device(name: str, phase: str, digest: str = NEW) -> dict[str, Any]:
    return {"device": name, "phase": phase, "reason": "", "why": "", "runs": {"version": "2", "digest": digest}}


def report(trial: Trial) -> dict[str, Any]:
    """Return the expected report of a trial."""
    finished = trial.ends == "finished"
    devices = [
        device(f"pi-{i:02d}", "active" if finished else "cancelled", NEW if finished else OLD) for i in (1, 2, 3)
    ]
    worse = ["pi-02"] if trial.worse else []
    if trial.back:
        devices[1] |= {"phase": "rolled_back", "runs": {"version": "1", "digest": OLD}}
    rollout = {
        "ended": True,
        "state": "finished" if finished else "aborted",
        "step": 4 if finished else 1,
        "strategy": "all" if finished else trial.ends,
        "digest": NEW,
        "served": 9 if trial.serves else 0,
        "disturbances": {"worse": worse},
    }
    return {"devices": devices, "rollout": rollout, "audit": {"passed": True, "invalid": []}}


@pytest.mark.parametrize("trial", TRIALS, ids=KNOWN)
def test_a_trial_that_ended_as_it_should_has_no_problem(trial: Trial) -> None:
    assert problems(trial, report(trial)) == []


@pytest.mark.parametrize("trial", TRIALS, ids=KNOWN)
def test_each_trial_makes_a_plan_that_the_fleet_takes(trial: Trial, tmp_path: Path) -> None:
    for devices in (6, 50):
        file = tmp_path / "plan.toml"
        file.write_text(trial.plan("there", devices), encoding="utf-8")
        rollout_plan = plan.read(file).to_plan("exercise", "2.0.0", f"sha256:{'0' * 64}")
        assert rollout_plan.steps[-1].strategy == "all"
        assert trial.ends == "finished" or trial.ends in [step.strategy for step in rollout_plan.steps]


WRONG: dict[str, tuple[str, Change, str]] = {
    "the audit fails": ("good", lambda r: r["audit"].update(passed=False), "audit"),
    "it did not end": ("good", lambda r: r["rollout"].update(ended=False), "did not end"),
    "a good one was aborted": ("good", lambda r: r["rollout"].update(state="aborted"), "should be finished"),
    "a device is missing": ("good", lambda r: r["devices"][2].update(phase="canary"), "pi-03 is canary"),
    "a device runs the old one": ("good", lambda r: r["devices"][0]["runs"].update(digest=OLD), "pi-01 runs"),
    "a device is silent": ("good", lambda r: r["devices"][0].update(runs=None), "no results at all from pi-01"),
    "an ill one finished": ("crash", lambda r: r["rollout"].update(state="finished"), "should be aborted"),
    "an ill one served": ("crash", lambda r: r["rollout"].update(served=1), "should never serve"),
    "an ill one came too far": ("crash", lambda r: r["rollout"].update(strategy="canary"), "and should be in shadow"),
    "an ill one still runs": ("slow", lambda r: r["devices"][0]["runs"].update(digest=NEW), "pi-01 still run it"),
    "a worse site kept it": ("drift-sensitive", lambda r: r["devices"][1].update(device("pi-02", "active")), "pi-02"),
    "another site took it back": (
        "drift-sensitive",
        lambda r: r["devices"][0].update(device("pi-01", "rolled_back", OLD)),
        "pi-01",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_outcome_is_reported(name: str) -> None:
    trial, change, expected = WRONG[name]
    wrong = copy.deepcopy(report(KNOWN[trial]))
    change(wrong)
    assert any(expected in problem for problem in problems(KNOWN[trial], wrong))


def test_every_candidate_is_signed_and_passes_its_golden_vectors(tmp_path: Path) -> None:
    key = generate(tmp_path / "key")
    versions = set()
    for name in (*trials.TRAINED, *trials.RIGGED):
        content = bundle.read(trials.make_bundle(name, tmp_path, key), [key.public])
        probe.probe(content).raise_for_failure()
        versions.add(content.manifest.version)
    assert len(versions) == len(trials.TRAINED) + len(trials.RIGGED)
    assert {trial.bundle for trial in TRIALS} <= {*trials.TRAINED, *trials.RIGGED}
