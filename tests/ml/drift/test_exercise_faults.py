"""Faults of a watch that many people wear: only the faulty field is reported, and no cables were exchanged."""

from __future__ import annotations

import pytest

from scripts.benchmarks.drift_peers.recordings import Watch, mixed_alerts


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize("seed", [2, 8, 9])
def test_a_stuck_channel_is_the_only_fault_though_the_model_names_wrong_classes(watch: Watch, seed: int) -> None:
    raised = [a for a in mixed_alerts(watch, seed, "stuck wy", 25) if a.state == "raised"]
    assert [(a.subject, a.evidence.get("fault")) for a in raised] == [("wy", "stuck")]


@pytest.mark.parametrize("seed", [4, 11])
def test_a_weak_accelerometer_drifts_and_has_no_other_unit(watch: Watch, seed: int) -> None:
    raised = [a for a in mixed_alerts(watch, seed, "weak ax, ay, az", 25) if a.state == "raised"]
    assert {a.alert for a in raised} == {"drift"}
    assert {a.subject for a in raised} <= {"ax", "ay", "az", "output"}
