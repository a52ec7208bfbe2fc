"""Drift state before a canary: which alerts a rollback clears and raises again, and which ids it never uses twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from outstation.device.batch_parts import drift_state
from outstation.device.batch_parts.drift_state import LearningRefusals, RestoredDrift
from outstation.device.rollout import saved_drift
from outstation.device.store import task_keys
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.ml.drift import DriftMonitor, MonitorSettings, succession
from outstation.ml.drift.baseline.deviation import SHIPPED, Deviation
from outstation.ml.drift.detectors.registry import GateStates
from outstation.ml.drift.detectors.sampling_rate_watch import RateState
from outstation.ml.drift.state import CarriedAlert, DriftState
from scripts.kit.stores import opened, outbox_payloads
from tests.kit.machine import LABELS, WINDOW, feed, readings, reference

TASK = "exercise"
NEVER = LearningRefusals()
DEVIATES = (Deviation("x", SHIPPED, 1.0, 2.0, 1.0, by_mean=True),)


@pytest.fixture(scope="module")
def judge() -> DriftMonitor:
    return DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=40))


@pytest.fixture(scope="module")
def learned(judge: DriftMonitor) -> DriftState:
    return feed(judge, judge.start(), readings(3, 42))[0]


@pytest.fixture(scope="module")
def drifted(judge: DriftMonitor, learned: DriftState) -> DriftState:
    """Return the state of a site with a drift of y and a stuck z."""
    r = readings(31, 10)
    r.features[:, 1] *= 0.6
    r.features[-600:, 2] = 1.0
    return feed(judge, learned, r)[0]


class Canary:
    """A device that runs a canary after the bundle of `judge`, which left the state `before`."""

    def __init__(self, folder: Path, judge: DriftMonitor) -> None:
        self.judge = judge
        self.store, self.author = opened(folder)

    def begin(
        self,
        before: DriftState,
        canary: DriftState | None,
        refused_before: LearningRefusals = NEVER,
        refused: LearningRefusals | None = None,
    ) -> None:
        """Set the state `before` aside and commit that of the canary, with the refusals to learn of each."""
        with self.store.transaction() as tx:
            drift_state.save(tx, TASK, self.judge, before, None)
            drift_state.save_basis(tx, TASK, drift_state.encode_basis(self.judge))
            drift_state.save_refusals(tx, TASK, refused_before)
        with self.store.transaction() as tx:
            if canary is None:
                saved_drift.save(tx, TASK)
            else:
                saved_drift.begin(tx, self.author, TASK, RestoredDrift(self.judge, canary), clock.read())
            if refused is not None:
                drift_state.save_refusals(tx, TASK, refused)

    def begin_unreferenced(self) -> None:
        """Begin another canary without a drift reference."""
        with self.store.transaction() as tx:
            saved_drift.save(tx, TASK)

    def roll_back(self) -> DriftState:
        with self.store.transaction() as tx:
            saved_drift.restore(tx, self.author, TASK, clock.read())
        return drift_state.restore(self.store, TASK, self.judge).state

    def promote(self) -> None:
        with self.store.transaction() as tx:
            saved_drift.discard(tx, self.author, TASK, clock.read())

    def alerts(self) -> set[tuple[str, str]]:
        payloads = outbox_payloads(self.store).values()
        return {(body["id"].removeprefix(f"{TASK}/"), body["state"]) for body in payloads if body["kind"] == "alerts"}


@pytest.fixture
def device(tmp_path: Path, judge: DriftMonitor) -> Iterator[Canary]:
    made = Canary(tmp_path, judge)
    yield made
    made.store.close()


def with_rate_fault(state: DriftState, number: int, *, is_open: bool = True) -> DriftState:
    rate = RateState(open_fault="rate" if is_open else "", raised_counts=np.array([0, number]))
    return replace(state, gates=GateStates({"sampling_rate": rate}))


def with_deviation(state: DriftState, count: int, *, is_open: bool = True) -> DriftState:
    deviations = DEVIATES if is_open else ()
    return replace(state, guard=replace(state.guard, deviations=deviations, raised_count=count))


def test_a_rollback_clears_the_rate_reference_and_learning_alerts_of_the_canary(
    device: Canary, learned: DriftState
) -> None:
    canary = with_deviation(with_rate_fault(learned, 1), 1)
    device.begin(learned, canary, refused=LearningRefusals(1, is_open=True))
    state = device.roll_back()
    assert device.alerts() == {
        ("rate/fault/1", "cleared"),
        ("reference/drift/1", "cleared"),
        ("reference/model/1", "cleared"),
    }
    # Their ids are used up.
    assert state.gates["sampling_rate"].raised_counts.tolist() == [0, 1]
    assert (state.guard.raised_count, state.guard.deviations) == (1, ())
    assert drift_state.load_refusals(device.store, TASK) == LearningRefusals(1)


def test_a_rollback_raises_again_what_only_the_canary_had_cleared(device: Canary, drifted: DriftState) -> None:
    before = with_deviation(with_rate_fault(drifted, 2), 3)
    canary = with_deviation(with_rate_fault(drifted, 2, is_open=False), 3, is_open=False)
    device.begin(before, canary, LearningRefusals(4, is_open=True), LearningRefusals(4))
    state = device.roll_back()
    assert device.alerts() == {
        ("rate/fault/2", "raised"),
        ("reference/drift/3", "raised"),
        ("reference/model/4", "raised"),
    }, "the drift of y and the fault of z stayed open all the time"
    assert (state.guard.raised_count, state.guard.deviations) == (3, DEVIATES)
    assert drift_state.load_refusals(device.store, TASK) == LearningRefusals(4, is_open=True)


def test_an_alert_gets_a_new_id_if_the_canary_used_its_next_one(device: Canary, drifted: DriftState) -> None:
    before = with_deviation(with_rate_fault(drifted, 1), 1)
    counts = drifted.raised_counts.copy()
    counts[1, 0] = 2
    canary = with_deviation(with_rate_fault(replace(drifted, raised_counts=counts), 2), 2)
    device.begin(before, canary)
    state = device.roll_back()
    ids = {"y/drift": 1, "rate/fault": 1, "reference/drift": 1}
    closed = {(f"{name}/{number + 1}", "cleared") for name, number in ids.items()}
    assert device.alerts() == closed | {(f"{name}/{number + 2}", "raised") for name, number in ids.items()}
    # Their later ends name the ids that stand open.
    assert CarriedAlert("drift", "y", 3) in succession.list_open_alerts(state)
    assert state.gates["sampling_rate"].raised_counts.tolist() == [0, 3]
    assert state.guard.raised_count == 3


def test_no_alert_id_of_the_canary_is_used_after_the_rollback(device: Canary, judge: DriftMonitor) -> None:
    fresh = judge.start()
    counts = fresh.raised_counts.copy()
    counts[0] = 7, 9
    device.begin(fresh, with_deviation(replace(fresh, raised_counts=counts), 5, is_open=False))
    state = device.roll_back()
    assert state.raised_counts.min() == 9
    assert state.guard.raised_count == 5
    assert device.alerts() == set()


def test_a_rollback_of_a_bundle_without_a_drift_reference_changes_no_alert(device: Canary, drifted: DriftState) -> None:
    before = with_deviation(drifted, 1)
    device.begin(before, None)
    state = device.roll_back()
    assert device.alerts() == set()
    assert state.to_bytes() == before.to_bytes()


def test_a_promoted_bundle_without_a_drift_reference_clears_the_alerts_before_it(
    device: Canary, drifted: DriftState
) -> None:
    before = with_deviation(with_rate_fault(drifted, 2), 3)
    device.begin(before, None, LearningRefusals(1, is_open=True))
    device.promote()
    ids = ("y/drift/1", "z/fault/1", "rate/fault/2", "reference/drift/3", "reference/model/1")
    assert device.alerts() == {(alert_id, "cleared") for alert_id in ids}
    assert drift_state.load_refusals(device.store, TASK) == LearningRefusals(1)
    assert _stored_names(device.store) == set()


def test_after_a_bundle_without_a_drift_reference_the_next_one_uses_no_alert_id_twice(
    device: Canary, drifted: DriftState
) -> None:
    device.begin(with_deviation(with_rate_fault(drifted, 2), 3), None)
    device.promote()
    device.begin_unreferenced()
    device.promote()
    restored = drift_state.restore(device.store, TASK, device.judge)
    assert restored.messages == []
    state = restored.state
    assert state.raised_counts.min() == drifted.raised_counts.max() > 0
    assert state.gates["sampling_rate"].raised_counts.tolist() == [0, 2]
    assert state.guard.raised_count == 3
    assert (succession.list_open_alerts(state), state.guard.deviations) == ([], ())
    # The next reference of the site is compared with the one that was learned before.
    assert drifted.site_reference is not None
    assert state.guard.former is not None
    assert np.array_equal(state.guard.former.class_mean, drifted.site_reference.class_mean)


def test_a_promoted_bundle_with_a_drift_reference_keeps_its_alerts(device: Canary, drifted: DriftState) -> None:
    device.begin(drifted, drifted)
    device.promote()
    assert device.alerts() == set()
    assert task_keys.DRIFT_STATE in _stored_names(device.store)


def _stored_names(store: Store) -> set[str]:
    keys = (task_keys.DRIFT_STATE, task_keys.REFERENCE_GUARD, task_keys.SITE_REFERENCE)
    names = {key + suffix for key in keys for suffix in ("", task_keys.SAVED_SUFFIX)}
    return {name for name in names if store.load_state(TASK, name) is not None}
