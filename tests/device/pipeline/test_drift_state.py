"""Drift state of another bundle: what it inherits, what is carried over, and what is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from outstation.device.batch_parts import drift_state
from outstation.device.batch_parts.drift_state import RestoredDrift
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.ml.drift import DriftMonitor, MonitorSettings
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.detectors.registry import GATES, GateStates
from outstation.ml.drift.state import DriftState
from outstation.protocol.alerts.kinds import FIELD_DRIFT, FIELD_FAULT
from scripts.kit.stores import opened, outbox_payloads
from tests.kit.machine import LABELS, LEARN, WINDOW, feed, readings, reference


@pytest.fixture(scope="module")
def judge() -> DriftMonitor:
    return DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=40))


@pytest.fixture(scope="module")
def drifted(judge: DriftMonitor) -> DriftState:
    """Return the state of a learned site with a drift of y and a stuck z."""
    state, _ = feed(judge, judge.start(), readings(3, 42))
    r = readings(31, 10)
    r.features[:, 1] *= 0.6
    r.features[-600:, 2] = 1.0
    state, verdicts = feed(judge, state, r)
    assert {a.id for v in verdicts for a in v.alerts if a.state == "raised"} == {"y/drift/1", "z/fault/1"}
    return state


def keep(store: Store, judge: DriftMonitor, state: DriftState) -> None:
    with store.transaction() as tx:
        drift_state.save(tx, "exercise", judge, state, None)
        drift_state.save_basis(tx, "exercise", drift_state.encode_basis(judge))


def take_over(store: Store, author: MessageLog, judge: DriftMonitor) -> RestoredDrift:
    """Restore the state for another bundle, and commit what belongs to it."""
    restored = drift_state.restore(store, "exercise", judge)
    assert restored.messages is not None
    assert restored.basis is not None
    with store.transaction() as tx:
        author.append_all(tx, restored.messages, clock.read())
        drift_state.save(tx, "exercise", restored.monitor, restored.state, None)
        drift_state.save_basis(tx, "exercise", restored.basis)
    return restored


def monitor_of(shipped: Reference, **options: Any) -> DriftMonitor:
    return DriftMonitor(MonitorSettings(shipped, labels=shipped.labels, window=WINDOW, learn_windows=LEARN, **options))


def test_the_same_bundle_restores_everything(tmp_path: Path, judge: DriftMonitor, drifted: DriftState) -> None:
    store, _ = opened(tmp_path)
    keep(store, judge, drifted)
    restored = drift_state.restore(store, "exercise", judge)
    assert restored.messages is None
    assert restored.state.to_bytes() == drifted.to_bytes()
    store.close()


@pytest.mark.parametrize("seed", [1, 2], ids=["same bundle", "another bundle"])
def test_a_restored_monitor_has_the_settings_of_its_bundle(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState, seed: int
) -> None:
    store, _ = opened(tmp_path)
    keep(store, judge, drifted)
    settings = {"units": ("g", "g", "m/s²"), "roles": ("computed", "sensor", "computed"), "hold_deviating": True}
    settings |= {"min_learn_s": 60.0, "learn_extension": 2.0, "seasonality": "none"}
    bundle = monitor_of(reference(seed), **settings)
    restored = drift_state.restore(store, "exercise", bundle)
    assert restored.state.site_reference is not None
    assert restored.monitor is not bundle
    assert replace(restored.monitor.settings, basis=None) == bundle.settings
    r = readings(32, 10)
    r.features[:, 0] *= 0.6
    _, verdicts = feed(restored.monitor, restored.state, r)
    [alert] = [a for v in verdicts for a in v.alerts if (a.subject, a.state) == ("x", "raised")]
    assert "computed from" in alert.summary
    store.close()


def test_the_site_reference_is_written_only_when_it_is_learned(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, _ = opened(tmp_path)
    keep(store, judge, drifted)
    later, _ = feed(judge, drifted, readings(32, 1))
    with store.transaction() as tx:
        tx.delete_state("exercise", task_keys.SITE_REFERENCE)
        drift_state.save(tx, "exercise", judge, later, drifted)
    assert store.load_state("exercise", task_keys.SITE_REFERENCE) is None
    retained = store.load_state("exercise", task_keys.DRIFT_STATE)
    assert retained is not None
    assert len(retained) < len(later.to_bytes()) / 2
    store.close()


def test_a_state_stored_together_with_its_reference_is_restored(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, _ = opened(tmp_path)
    with store.transaction() as tx:
        tx.save_state("exercise", task_keys.DRIFT_STATE, drifted.to_bytes())
    restored = drift_state.restore(store, "exercise", judge)
    assert restored.messages is None
    assert restored.state.to_bytes() == drifted.to_bytes()
    store.close()


def test_where_the_sites_reference_is_damaged_detection_begins_anew(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, _ = opened(tmp_path)
    keep(store, judge, drifted)
    with store.transaction() as tx:
        tx.save_state("exercise", task_keys.SITE_REFERENCE, b"{}")
    restored = drift_state.restore(store, "exercise", judge)
    assert restored.messages is not None
    assert (restored.state.site_reference, restored.state.index) == (None, 1)
    store.close()


def test_a_bundle_with_the_same_fields_inherits_the_reference_and_the_open_alerts(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    """A roll-out used to make a broken sensor normal: it cleared its alerts and learned from its readings."""
    store, author = opened(tmp_path)
    keep(store, judge, drifted)
    restored = take_over(store, author, monitor_of(reference(2)))
    bodies = list(outbox_payloads(store).values())
    assert [body["event"] for body in bodies] == ["reference inherited"]
    state, monitor = restored.state, restored.monitor
    assert drifted.site_reference is not None
    assert state.site_reference is not None
    assert state.site_reference.digest == drifted.site_reference.digest
    assert monitor.shipped.edges.tolist() == judge.shipped.edges.tolist()
    assert monitor.shipped.score_edges.tolist() == reference(2).score_edges.tolist()
    again = drift_state.restore(store, "exercise", monitor_of(reference(2)))
    assert again.messages is None
    assert again.state.to_bytes() == state.to_bytes()
    r = readings(32, 60)
    r.features[:, 1] *= 0.6
    state, verdicts = feed(monitor, state, r)
    # The drift of y goes on: nothing is cleared, and nothing is learned from it.
    alerts = [(a.id, a.state) for v in verdicts for a in v.alerts]
    assert alerts == [("z/fault/1", "cleared")]
    assert state.suite.open_subjects[1]
    assert state.is_inherited
    assert state.learning.total_windows == 0
    store.close()


def test_an_heir_learns_its_own_reference_once_nothing_is_open(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, author = opened(tmp_path)
    keep(store, judge, drifted)
    restored = take_over(store, author, monitor_of(reference(2)))
    state, verdicts = feed(restored.monitor, restored.state, readings(33, LEARN + 30))
    cleared = {a.id for v in verdicts for a in v.alerts if a.state == "cleared"}
    assert {"y/drift/1", "z/fault/1"} <= cleared
    assert [v.learned_reference is not None for v in verdicts].count(True) == 1
    assert not state.is_inherited
    assert state.site_reference is not None
    assert state.site_reference.site is not None
    assert state.site_reference.site.number == 2
    assert not any(a.subject == "reference" for v in verdicts for a in v.alerts)
    store.close()


def test_an_heir_of_a_held_reference_holds_it_too(tmp_path: Path, judge: DriftMonitor, drifted: DriftState) -> None:
    """A bundle change used to put a reference into use that nobody had accepted."""
    store, author = opened(tmp_path)
    held = replace(drifted, guard=replace(drifted.guard, is_held=True))
    keep(store, judge, held)
    restored = take_over(store, author, monitor_of(reference(2), hold_deviating=True))
    assert restored.state.site_reference is not None
    assert restored.state.tested_reference is None
    again = drift_state.restore(store, "exercise", monitor_of(reference(2), hold_deviating=True))
    assert again.state.tested_reference is None
    store.close()


def test_while_its_answers_are_untested_an_heir_does_not_call_them_ok(tmp_path: Path, judge: DriftMonitor) -> None:
    store, author = opened(tmp_path)
    learned, _ = feed(judge, judge.start(), readings(3, LEARN + 2))
    keep(store, judge, learned)
    restored = take_over(store, author, monitor_of(reference(2)))
    _, verdicts = feed(restored.monitor, restored.state, readings(33, 3))
    members = verdicts[-1].members
    assert members["output"]["state"] == "insufficient"
    assert members["features"]["x"]["state"] == "ok"
    store.close()


def test_a_sampling_alert_ends_with_the_bundle_and_its_number_is_not_used_again(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, author = opened(tmp_path)
    [gate] = GATES
    watch = replace(drifted.gates[gate.name], open_fault="rate", raised_counts=np.array([0, 3]))
    keep(store, judge, replace(drifted, gates=GateStates({gate.name: watch})))
    restored = take_over(store, author, monitor_of(replace(reference(2), fields=("x", "y", "w"))))
    alerts = {body["id"]: body["state"] for body in outbox_payloads(store).values() if body["kind"] == "alerts"}
    assert alerts["exercise/rate/fault/3"] == "cleared"
    assert restored.state.gates[gate.name].raised_counts.tolist() == [0, 3]
    store.close()


def test_a_damaged_site_reference_keeps_guard_and_numbers(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, author = opened(tmp_path)
    keep(store, judge, replace(drifted, guard=replace(drifted.guard, raised_count=4)))
    with store.transaction() as tx:
        tx.save_state("exercise", task_keys.SITE_REFERENCE, b"{}")
    restored = take_over(store, author, judge)
    assert restored.state.guard.raised_count == 4
    assert restored.state.guard.accepted is not None
    bodies = list(outbox_payloads(store).values())
    [reset] = [body for body in bodies if body.get("event") == "reference reset"]
    assert "the stored reference cannot be read" in reset["summary"]
    assert any(body.get("id") == "exercise/y/drift/1" and body["state"] == "raised" for body in bodies)
    store.close()


def test_a_bundle_with_other_fields_carries_open_alerts_over(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, author = opened(tmp_path)
    keep(store, judge, drifted)
    shipped = replace(reference(2), fields=("y", "z", "w"))
    restored = take_over(store, author, monitor_of(shipped))
    bodies = list(outbox_payloads(store).values())
    alerts = {body["id"]: body for body in bodies if body["kind"] == "alerts"}
    assert {name: body["state"] for name, body in alerts.items()} == {"exercise/y/drift/1": "raised"}
    assert alerts["exercise/y/drift/1"]["summary"].startswith("y: open before the change of the bundle")
    [reset] = [body for body in bodies if body.get("event") == "reference reset"]
    assert drifted.site_reference is not None
    assert reset["evidence"]["site"] == drifted.site_reference.digest
    state = restored.state
    assert (state.site_reference, state.learning.total_windows) == (None, 0)
    # Drift alerts that come are new ones; the fault of z is the one that was open.
    assert state.raised_counts[0, 0] == 1
    assert state.faults.number.max(1).tolist() == [0, 1, 0]
    assert store.load_state("exercise", task_keys.SITE_REFERENCE) is None
    again = drift_state.restore(store, "exercise", monitor_of(shipped))
    assert again.messages is None
    assert again.state.to_bytes() == state.to_bytes()
    after, cleared = restored.monitor.relearn(state)
    assert [(alert.id, alert.state) for alert in cleared] == [("y/drift/1", "cleared")]
    assert after.carried == ()
    store.close()


def test_alerts_of_a_field_that_no_longer_exists_are_cleared(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, author = opened(tmp_path)
    keep(store, judge, drifted)
    take_over(store, author, monitor_of(replace(reference(2), fields=("x", "v", "w"))))
    alerts = [body for body in outbox_payloads(store).values() if body["kind"] == "alerts"]
    assert {(body["id"], body["state"]) for body in alerts} == {
        ("exercise/y/drift/1", "cleared"),
        ("exercise/z/fault/1", "cleared"),
    }
    store.close()


def test_back_with_the_first_bundle_nothing_half_gathered_comes_back(tmp_path: Path, judge: DriftMonitor) -> None:
    store, author = opened(tmp_path)
    half, _ = feed(judge, judge.start(), readings(3, 20))
    keep(store, judge, half)
    assert take_over(store, author, monitor_of(reference(2))).state.learning.total_windows == 0
    assert take_over(store, author, judge).state.learning.total_windows == 0
    store.close()


def test_a_state_of_another_version_begins_again_which_the_log_says_and_ends_its_alerts(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, author = opened(tmp_path)
    keep(store, judge, replace(judge.start(), raised_counts=drifted.raised_counts))
    with store.transaction() as tx:
        for alert in (FIELD_DRIFT, FIELD_FAULT):
            body = alert.raised("x", field="y", count=1).to_body("exercise")
            author.append(tx, "alerts", "exercise", body, clock.read())
        tx.save_state("exercise", task_keys.DRIFT_STATE, b"garbage")
    assert len(store.open_alerts("exercise")) == 2
    state = take_over(store, author, judge).state
    assert state.to_bytes() == replace(judge.start(), raised_counts=np.full_like(state.raised_counts, 2)).to_bytes()
    assert store.open_alerts("exercise") == []
    reset, *cleared = [body for body in outbox_payloads(store).values() if body.get("state") != "raised"]
    assert reset["event"] == "reference reset"
    assert "another version wrote it" in reset["summary"]
    assert [body["state"] for body in cleared] == ["cleared", "cleared"]
    assert drift_state.load_for_display(store, "exercise") is not None
    store.close()
