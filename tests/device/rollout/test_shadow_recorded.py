"""Bundles beside the shipped `exercise`, over its held-out recordings: who is told good, and who bad, by which rule."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from outstation.ml.comparison import rules
from outstation.ml.model import activation
from outstation.ml.model.bundle import bundle
from outstation.ml.model.sandbox.confinement import ModelPolicy
from outstation.protocol.wire.desired_state import CanaryRules
from scripts.kit.bundles import KEY, Recipe
from scripts.kit.rigged import SHIPPED, build_rigged_bundle, write_bundle
from tests.kit.shadow_devices import ShadowDevice

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("ai_edge_litert"), reason="ai-edge-litert is missing: its schema rigs the models"
)
RULES = CanaryRules(min_agreement=0.9, max_latency_ratio=3.0, max_accuracy_drop=0.05, max_error_growth=None)
WINDOW, BATCHES, ROUNDS = 100, 24, 4
RuleStates = Callable[[str], dict[str, str]]


def recorded(windows: int) -> np.ndarray:
    with np.load(SHIPPED.parent / "recordings" / "exercise.npz") as result:
        rows: np.ndarray = result["rows"][: windows * WINDOW]
        return rows


@pytest.fixture
def rule_states(tmp_path: Path) -> Iterator[RuleStates]:
    made: list[ShadowDevice] = []

    def compare(kind: str) -> dict[str, str]:
        """Return the state of each rule for this kind of bundle in shadow, over the recordings."""
        # So slow that a busy machine does not hide it.
        content = bundle.read(write_bundle(build_rigged_bundle(kind, repeats=1200), tmp_path / kind), [KEY.public])
        active = activation.activate(SHIPPED, [], policy=ModelPolicy("off"))
        recipe = Recipe("classify", "", fields=tuple(content.manifest.input.fields))
        # Others may be stopped by the machine for a while.
        timeout_s = 0.6 if kind == "hang" else 30.0
        pair = ShadowDevice(tmp_path / f"device {kind}", recipe, active, content, call_timeout_s=timeout_s)
        made.append(pair)
        # Until all rules know: a machine that is busy meanwhile leaves the times open for longer.
        for _ in range(ROUNDS):
            # A row each 10 ms, batch by batch.
            for part in np.array_split(recorded(BATCHES * 24), BATCHES):
                pair.batch(part)
            states = {verdict.rule: verdict.state for verdict in rules.evaluate_rules(RULES, pair.runner.blocks, True)}
            if "undecided" not in states.values():
                break
        return dict(states)

    yield compare
    for pair in made:
        pair.close()


def test_the_same_model_as_a_new_version_passes_every_rule(rule_states: RuleStates) -> None:
    assert rule_states("good") == {
        "agreement": "passed",
        "latency": "passed",
        "error_rate": "passed",
        "estimated_accuracy": "passed",
    }


def test_swapped_classes_fail_agreement(rule_states: RuleStates) -> None:
    assert rule_states("mixed_up")["agreement"] == "failed"


def test_a_slow_model_fails_latency_only(rule_states: RuleStates) -> None:
    assert rule_states("slow") == {
        "agreement": "passed",
        "latency": "failed",
        "error_rate": "passed",
        "estimated_accuracy": "passed",
    }


@pytest.mark.parametrize("kind", ["error", "hang"])
def test_a_model_that_fails_on_some_windows_fails_the_error_rate(rule_states: RuleStates, kind: str) -> None:
    assert rule_states(kind)["error_rate"] == "failed"
