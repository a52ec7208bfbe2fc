"""Rollout oracle of the fault harness: which bundles may answer for a task after a signed audit message."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from outstation.workbench.testing.patience import wait_until
from scripts.faults import launch
from scripts.faults.on_update import _STEPS
from scripts.faults.updating import OTHER, TASK, _allowed_bundles_after

ROOT = Path(__file__).parents[2]
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


def test_the_daemon_calls_every_step_at_which_a_fault_kills_it_so_that_the_fault_sees_it() -> None:
    """The launcher replaces an attribute of a module or class: a caller that imported the function keeps the old."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "agent" / "outstation").rglob("*.py")}
    for _, target in _STEPS.values():
        owner, name, step = launch.resolve_target(target)
        assert callable(step), target
        calls = [path for path, text in sources.items() if re.search(rf"\.{name}\(", text)]
        assert calls, f"nothing calls {target}"
        if isinstance(owner, ModuleType):
            imports = re.compile(rf"from {re.escape(owner.__name__)} import [^\n]*\b{name}\b")
            assert [path for path, text in sources.items() if imports.search(text)] == [], target


@pytest.mark.parametrize("when", ["before", "in", "after", "committed"])
def test_a_process_dies_at_its_step_once(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaths: list[str] = []
    commits: list[Callable[[], None]] = []
    monkeypatch.setattr(launch, "_INTO_S", 0.0)
    monkeypatch.setattr(launch, "_die", lambda: deaths.append(when))
    monkeypatch.setattr(launch, "_after_each_commit", commits.append)
    # Restored afterwards, since the launcher replaces it for good.
    monkeypatch.setattr(launch, "synchronous", lambda level: level)
    mark = tmp_path / "died"
    launch.at_step(f"{when},scripts.faults.launch:synchronous,{mark}")
    assert deaths == []
    for _ in range(2):
        assert launch.synchronous("FULL") == "FULL"  # type: ignore[func-returns-value]
        for do in commits:
            do()
    wait_until("it dies", lambda: deaths == [when])
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
    assert deaths == [when]
    assert mark.exists()
