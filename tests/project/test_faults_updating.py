"""Rollout oracle of the fault harness: which bundles may answer for a task after a signed audit message."""

from __future__ import annotations

from typing import Any

from scripts.faults import launch
from scripts.faults.on_update import _STEPS
from scripts.faults.updating import OTHER, TASK, _allowed_bundles_after

OLD, NEW = "sha256:old", "sha256:new"


def activated(to: str, before: str | None, why: str, task: str = TASK) -> dict[str, Any]:
    ends = {"from": None if before is None else {"digest": before}, "to": {"digest": to}}
    return {"event": "activated", "evidence": {"task": task, **ends, "why": why}}


def rollout(phase: str) -> dict[str, Any]:
    return {"event": "rollout", "evidence": {"task": TASK, "digest": NEW, "phase": phase}}


def after(*bodies: dict[str, Any]) -> set[str]:
    may = set[str]()
    for body in bodies:
        may = _allowed_bundles_after(body, may)
    return may


FIRST = activated(OLD, None, "configured")
TRIED = (FIRST, rollout("downloading"), rollout("shadow"))
SERVES = (*TRIED, rollout("canary"), activated(NEW, OLD, "roll-out"))


def test_before_probation_only_the_old_bundle_may_answer() -> None:
    assert after(*TRIED) == {OLD}


def test_on_probation_the_old_one_may_answer_what_the_new_one_cannot() -> None:
    assert after(*SERVES) == {OLD, NEW}


def test_once_settled_only_the_new_one_may_answer() -> None:
    assert after(*SERVES, rollout("active")) == {NEW}


def test_taken_back_only_the_old_one_may_answer() -> None:
    assert after(*SERVES, rollout("rolled_back"), activated(OLD, NEW, "rolled_back")) == {OLD}


def test_activations_of_another_task_change_nothing() -> None:
    assert after(*TRIED, activated(NEW, OLD, "configured", OTHER)) == {OLD}


def test_every_step_at_which_a_daemon_is_to_die_is_there() -> None:
    for _, target in _STEPS.values():
        assert callable(launch.resolve_target(target)[2]), target
