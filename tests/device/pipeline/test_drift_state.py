"""Drift state of another bundle: open alerts are cleared, and the site reference is dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import clock
from agent.device.pipeline import drift_state
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.drift import DriftMonitor
from agent.drift.state import DriftState
from scripts.kit.stores import opened, outbox_payloads
from tests.kit.machine import LABELS, WINDOW, feed, readings, reference


@pytest.fixture(scope="module")
def judge() -> DriftMonitor:
    return DriftMonitor(reference(), labels=LABELS, window=WINDOW, learn_windows=40)


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


def ended(store: Store, author: MessageLog, judge: DriftMonitor) -> DriftState:
    state, end = drift_state.restore(store, "exercise", judge)
    assert end is not None
    with store.transaction() as tx:
        drift_state.discard_learned(tx, "exercise")
        author.append_all(tx, end, clock.read())
        drift_state.save(tx, "exercise", judge, state, None)
    return state


def test_the_same_bundle_restores_everything(tmp_path: Path, judge: DriftMonitor, drifted: DriftState) -> None:
    store, _ = opened(tmp_path)
    keep(store, judge, drifted)
    state, end = drift_state.restore(store, "exercise", judge)
    assert end is None
    assert state.to_bytes() == drifted.to_bytes()
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
    state, end = drift_state.restore(store, "exercise", judge)
    assert end is None
    assert state.to_bytes() == drifted.to_bytes()
    store.close()


def test_where_the_sites_reference_is_damaged_detection_begins_anew(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, _ = opened(tmp_path)
    keep(store, judge, drifted)
    with store.transaction() as tx:
        tx.save_state("exercise", task_keys.SITE_REFERENCE, b"{}")
    state, end = drift_state.restore(store, "exercise", judge)
    assert end is not None
    assert (state.site_reference, state.index) == (None, 1)
    store.close()


def test_another_bundle_clears_open_alerts_and_uses_no_id_twice(
    tmp_path: Path, judge: DriftMonitor, drifted: DriftState
) -> None:
    store, author = opened(tmp_path)
    keep(store, judge, drifted)
    other = DriftMonitor(reference(2), labels=LABELS, window=WINDOW, learn_windows=40)
    state = ended(store, author, other)
    reported = list(outbox_payloads(store).values())
    cleared = {body["id"] for body in reported if body["kind"] == "alerts" and body["state"] == "cleared"}
    assert cleared == {"exercise/y/drift/1", "exercise/z/fault/1"}
    resets = [body for body in reported if body.get("event") == "reference reset"]
    assert drifted.site_reference is not None
    assert [body["evidence"]["site"] for body in resets] == [drifted.site_reference.digest]
    assert (state.site_reference, state.learning.total_windows, int(state.raised_counts.min())) == (None, 0, 1)
    assert store.load_state("exercise", task_keys.SITE_REFERENCE) is None
    again, end = drift_state.restore(store, "exercise", other)
    assert end is None
    assert again.to_bytes() == state.to_bytes()
    store.close()


def test_back_with_the_first_bundle_nothing_half_gathered_comes_back(tmp_path: Path, judge: DriftMonitor) -> None:
    store, author = opened(tmp_path)
    half, _ = feed(judge, judge.start(), readings(3, 20))
    keep(store, judge, half)
    other = DriftMonitor(reference(2), labels=LABELS, window=WINDOW, learn_windows=40)
    ended(store, author, other)
    assert ended(store, author, judge).learning.total_windows == 0
    store.close()


def test_a_damaged_state_begins_again(tmp_path: Path, judge: DriftMonitor) -> None:
    store, author = opened(tmp_path)
    with store.transaction() as tx:
        tx.save_state("exercise", task_keys.DRIFT_STATE, b"garbage")
    assert ended(store, author, judge).to_bytes() == judge.start().to_bytes()
    assert drift_state.load_for_display(store, "exercise") is not None
    store.close()
