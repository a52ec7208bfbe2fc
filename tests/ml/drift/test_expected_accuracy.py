"""Expected accuracy: it is tested by itself, where no field and no class share moves."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from outstation.ml.drift import DriftMonitor, DriftState
from outstation.ml.drift.succession import inherit, merge_references
from tests.kit.machine import LEARN, Readings, feed, readings


def with_doubts(r: Readings, first: int, share: float) -> Readings:
    """Return readings whose model doubts a `share` of its answers from model window `first` on."""
    scores = r.scores.copy()
    doubted = np.random.default_rng(5).random(len(scores)) < share
    doubted[:first] = False
    top = scores[doubted].max(1, keepdims=True)
    scores[doubted] = np.where(scores[doubted] == top, 0.42, 0.29)
    return replace(r, scores=scores)


def test_an_expected_accuracy_that_falls_alone_is_reported(monitor: DriftMonitor, learned: DriftState) -> None:
    _, results = feed(monitor, learned, with_doubts(readings(21, 40), 100, 0.15))
    raised = [a for r in results for a in r.alerts if a.state == "raised"]
    assert {a.subject for a in raised} == {"score"}
    assert raised[0].evidence["test"] in ("mean", "accuracy")


def test_a_site_learns_how_its_expected_accuracy_varies(learned: DriftState) -> None:
    assert learned.site_reference is not None
    place = learned.site_reference.layout["expected_accuracy"]
    assert 0.8 < learned.site_reference.test_mean[place][0] < 1.0
    assert learned.site_reference.test_sd[place][0] < 0.1


def test_an_alert_compares_no_accuracy_of_two_models_after_a_change_of_the_bundle(
    monitor: DriftMonitor, learned: DriftState
) -> None:
    own = monitor.shipped
    assert own.score_correct is not None
    merged = merge_references(own, replace(own, score_correct=own.score_correct // 2))
    r = readings(23, 8)
    shifted = r.changed(0, r.features[:, 0] + 1)
    heir = monitor.rebase(merged), inherit(learned, merged)
    for (shipped, state), compared in (((monitor, learned), True), (heir, False)):
        _, results = feed(shipped, state, shifted)
        alert = next(a for r in results for a in r.alerts if a.state == "raised" and a.subject == "x")
        assert ("the model's expected accuracy" in alert.summary) is compared
        assert ("accuracy" in alert.evidence) is compared


def test_quiet_windows_raise_nothing(monitor: DriftMonitor, learned: DriftState) -> None:
    _, results = feed(monitor, learned, readings(22, 3 * LEARN))
    assert "score" not in {a.subject for r in results for a in r.alerts}
