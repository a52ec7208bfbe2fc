"""Drift monitor: learning, alarms, faults, and no trace of batch boundaries."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from outstation.foundation.errors import BadBundle
from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, MonitorSettings, batches
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.baseline.summary import Summary
from outstation.protocol.alerts.alert import Alert
from tests.kit.machine import FIELDS, LABELS, ROWS, WINDOW, Readings, comparable, feed, readings, reference

LEARN = 40


@pytest.fixture(scope="module")
def monitor() -> DriftMonitor:
    return DriftMonitor(
        MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=LEARN, units=("g", "g", "g"))
    )


@pytest.fixture(scope="module")
def quiet() -> Readings:
    return readings(3, 60)


@pytest.fixture(scope="module")
def learned(monitor: DriftMonitor, quiet: Readings) -> DriftState:
    state, _ = feed(monitor, monitor.start(), quiet.windows(0, LEARN + 2))
    assert state.site_reference is not None
    return state


def alerts(verdicts: list[DriftWindowResult]) -> list[Alert]:
    return [alert for verdict in verdicts for alert in verdict.alerts]


@given(st.lists(st.integers(0, 260), max_size=12), st.sampled_from([0, 3, 10]))
@settings(deadline=None, max_examples=15)
def test_any_batches_give_the_same_verdicts_and_the_same_state(
    monitor: DriftMonitor, cuts: list[int], gap: int
) -> None:
    """Model windows have gaps of `gap` rows; batches reach from learning into drift and a stuck sensor.

    It makes no difference whether a batch was measured ahead, or the batch before it was instead.
    """
    lead = learning_from(monitor, 20)
    r = readings(8, 26)
    r.features[220 * ROWS :, 0] *= 2.5
    r.features[250 * ROWS :, 2] = 1.0
    step = ROWS + gap
    features = np.full((260 * step, 3), 99.0, np.float32)
    for row in range(ROWS):
        features[row::step] = r.features[row::ROWS]
    t = np.arange(len(features), dtype=np.int64) * 20_000

    def run(bounds: list[int], ahead: str = "") -> tuple[bytes, list[DriftWindowResult]]:
        state, verdicts, measured, earlier = lead.start(), [], None, None
        for begin, end in pairwise(bounds):
            rows = (begin * step + 1, end * step)
            part = features[begin * step : end * step]
            starts = np.arange(end - begin) * step
            if ahead:
                now = lead.measure_batch(state, part, starts, first_row=rows[0], t=t[rows[0] - 1 : rows[1]])
                measured, earlier = now if ahead == "this" else earlier, now
            state, more = lead.process_batch(
                state,
                part,
                starts,
                ROWS,
                r.labels[begin:end],
                r.scores[begin:end],
                rows=rows,
                t=t[rows[0] - 1 : rows[1]],
                measured=measured,
            )
            verdicts += more
        return state.to_bytes(), verdicts

    state, verdicts = run([0, 260])
    assert sum(v.windows for v in verdicts) == 26
    assert {a.alert for a in alerts(verdicts)} == {"drift", "fault"}
    for ahead in ("", "this", "earlier"):
        other_state, other = run([0, *sorted(cuts), 260], ahead)
        assert comparable(other) == comparable(verdicts)
        assert other_state == state


def test_windows_measured_ahead_are_not_measured_again(
    monitor: DriftMonitor, learned: DriftState, quiet: Readings, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, first = quiet.windows((LEARN + 2), 60), learned.last_counted_row + 1
    starts, t = np.arange(len(part.labels)) * ROWS, np.arange(len(part.features)) * 20_000
    measured = monitor.measure_batch(learned, part.features, starts, first_row=first, t=t)
    monkeypatch.setattr(batches, "count_rows", lambda *_: pytest.fail("counted again"))
    state, _ = monitor.process_batch(
        learned,
        part.features,
        starts,
        ROWS,
        part.labels,
        part.scores,
        rows=(first, first + len(part.features) - 1),
        t=t,
        measured=measured,
    )
    assert state.last_counted_row == first + len(part.features) - 1


def learning_from(monitor: DriftMonitor, learn: int) -> DriftMonitor:
    return DriftMonitor(MonitorSettings(monitor.shipped, labels=LABELS, window=WINDOW, learn_windows=learn))


def test_overlapping_model_windows_count_each_row_once_in_any_batches(monitor: DriftMonitor) -> None:
    """Windows of 20 rows every 10: a batch brings the rows that its first window shares with the last one again."""
    r = readings(8, 3)
    starts = np.arange(0, len(r.features) - ROWS + 1, ROWS // 2)[:50]
    labels = np.zeros(50, np.int64)
    t = np.arange(len(r.features), dtype=np.int64)

    def run(bounds: list[int]) -> tuple[bytes, list[DriftWindowResult]]:
        state, verdicts = monitor.start(), []
        for begin, end in pairwise(bounds):
            low, high = int(starts[begin]), int(starts[end - 1]) + ROWS
            local = starts[begin:end] - low
            state, more = monitor.process_batch(
                state, r.features[low:high], local, ROWS, labels[begin:end], None, rows=(low + 1, high), t=t[low:high]
            )
            verdicts += more
        return state.to_bytes(), verdicts

    state, verdicts = run([0, 50])
    assert [v.rows for v in verdicts] == [(1, 110), (111, 210), (211, 310), (311, 410), (411, 510)]
    assert sum(v.row_count for v in verdicts) == 510
    cut_state, cut = run([0, 7, 20, 21, 50])
    assert comparable(cut) == comparable(verdicts)
    assert cut_state == state


def test_a_batch_without_model_windows_changes_nothing(monitor: DriftMonitor, learned: DriftState) -> None:
    none = np.empty(0, np.int64)
    first = learned.last_counted_row + 1
    state, verdicts = monitor.process_batch(
        learned, np.zeros((5, 3), np.float32), none, ROWS, none, None, rows=(first, first + 4), t=np.arange(5)
    )
    assert verdicts == []
    assert state.to_bytes() == learned.to_bytes()


def test_rows_that_were_judged_are_not_taken_twice(monitor: DriftMonitor, learned: DriftState, quiet: Readings) -> None:
    with pytest.raises(ValueError, match="judged before"):
        monitor.process_batch(
            learned,
            quiet.features[:ROWS],
            np.array([0]),
            ROWS,
            quiet.labels[:1],
            None,
            rows=(1, ROWS),
            t=np.arange(ROWS),
        )


def test_features_that_are_not_the_rows_named_are_refused(monitor: DriftMonitor) -> None:
    with pytest.raises(ValueError, match="do not match"):
        monitor.process_batch(
            monitor.start(),
            np.zeros((ROWS, 3), np.float32),
            np.array([0]),
            ROWS,
            np.array([0]),
            None,
            rows=(1, ROWS + 1),
            t=np.arange(ROWS),
        )


def test_drift_is_insufficient_until_the_reference_is_learned(monitor: DriftMonitor, quiet: Readings) -> None:
    state, verdicts = feed(monitor, monitor.start(), quiet)
    assert [v.members["state"] for v in verdicts[:LEARN]] == ["insufficient"] * LEARN
    assert {v.members["state"] for v in verdicts[LEARN:]} == {"ok"}
    assert sum(v.windows for v in verdicts[LEARN:]) == 20
    assert [v.index for v in verdicts if v.learned_reference] == [LEARN]
    assert state.site_reference is not None
    assert {v.site_digest for v in verdicts[LEARN:]} == {state.site_reference.digest}
    assert {v.site_digest for v in verdicts[:LEARN]} == {None}
    assert state.site_reference.made == "site"
    assert state.site_reference.drift_windows == LEARN


def test_no_drift_alarm_before_the_site_reference_is_learned(monitor: DriftMonitor) -> None:
    r = readings(3, 10)
    r.features[:, 0] = r.features[:, 0] * 3 + 5
    _, verdicts = feed(monitor, monitor.start(), r)
    assert [a for a in alerts(verdicts) if a.alert == "drift"] == []


def test_a_site_that_differs_from_the_shipped_reference_is_not_drifting(monitor: DriftMonitor) -> None:
    r = readings(3, 90)
    r.features[:, 1] = r.features[:, 1] * 0.8 + 0.4
    _, verdicts = feed(monitor, monitor.start(), r)
    assert verdicts[-1].members["features"]["y"]["psi"] > 0.25
    assert alerts(verdicts) == []


def test_gain_loss_of_one_field_alarms_that_field_and_says_so(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(31, 10)
    r.features[:, 1] *= 0.6
    _, verdicts = feed(monitor, learned, r)
    raised = [a for a in alerts(verdicts) if a.state == "raised"]
    assert [(a.alert, a.subject, a.severity) for a in raised] == [("drift", "y", "warning")]
    assert raised[0].id == "y/drift/1"
    assert "; likely gain loss; the model's expected accuracy" in raised[0].summary
    assert " windows (since 00:0" in raised[0].summary
    assert raised[0].evidence["ratio"] == pytest.approx(0.6, abs=0.15)
    assert raised[0].evidence["window"] - learned.index < 5
    assert verdicts[-1].members["features"]["y"]["state"] == "drift"
    assert verdicts[-1].members["state"] == "drift"


def test_an_offset_is_reported_in_units_and_reference_sd(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(31, 10)
    r.features[:, 2] += 0.5
    _, verdicts = feed(monitor, learned, r)
    (raised,) = [a for a in alerts(verdicts) if a.state == "raised"]
    assert raised.subject == "z"
    assert raised.summary.startswith("z: mean moved by +0.")
    assert " g (" in raised.summary
    assert "; likely offset or a new position" in raised.summary
    assert raised.evidence["shift"] == pytest.approx(0.5, abs=0.12)


def test_a_rising_spread_is_reported_as_rising(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(31, 10)
    r.features[:, 0] += np.random.default_rng(1).normal(0, 1.0, len(r.features)).astype(np.float32)
    _, verdicts = feed(monitor, learned, r)
    raised = [a for a in alerts(verdicts) if a.state == "raised" and a.subject == "x"]
    assert "spread rose to" in raised[0].summary


def test_drift_is_detected_while_a_quarter_of_predictions_is_wrong(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(31, 12, wrong=0.25)
    r.features[:, 1] *= 0.6
    _, verdicts = feed(monitor, learned, r)
    assert "y" in {a.subject for a in alerts(verdicts) if a.state == "raised"}


def test_an_alert_is_raised_once_and_cleared_with_the_sensor_repaired(
    monitor: DriftMonitor, learned: DriftState
) -> None:
    r = readings(31, 40)
    r.features[: 20 * WINDOW * ROWS, 1] *= 0.6
    _, verdicts = feed(monitor, learned, r)
    assert [(a.subject, a.state, a.id) for a in alerts(verdicts)] == [
        ("y", "raised", "y/drift/1"),
        ("y", "cleared", "y/drift/1"),
    ]
    cleared = alerts(verdicts)[1]
    assert 22 <= cleared.evidence["window"] - learned.index <= 24
    assert cleared.severity == "info"
    assert verdicts[-1].members["state"] == "ok"


def test_the_second_alert_of_a_field_has_its_own_id(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(31, 60)
    for begin in (0, 40):
        r.features[begin * WINDOW * ROWS : (begin + 20) * WINDOW * ROWS, 1] *= 0.6
    _, verdicts = feed(monitor, learned, r)
    raised = [a.id for a in alerts(verdicts) if a.state == "raised" and a.subject == "y"]
    assert raised == ["y/drift/1", "y/drift/2"]


def test_a_stuck_sensor_is_a_fault_in_its_first_window_and_never_drift(
    monitor: DriftMonitor, learned: DriftState
) -> None:
    r = readings(31, 10)
    r.features[:, 2] = r.features[0, 2]
    before = learned.suite.cusum.value.tolist()
    state, verdicts = feed(monitor, learned, r)
    assert [(a.alert, a.subject, a.severity) for a in alerts(verdicts)] == [("fault", "z", "critical")]
    assert alerts(verdicts)[0].evidence["window"] == learned.index
    assert alerts(verdicts)[0].summary == "z: repeats one value for 200 rows: sensor or cable fault."
    assert (
        verdicts[0].members["features"]["z"] | {"state": "fault", "fault": "stuck"}
        == verdicts[0].members["features"]["z"]
    )
    assert verdicts[0].members["features"]["x"]["state"] == "insufficient"
    assert verdicts[0].members["state"] == "fault"
    assert state.suite.cusum.value.tolist() == before


def test_a_fault_clears_after_three_windows_without_one(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(31, 10)
    r.features[: 2 * WINDOW * ROWS, 2] = 1.0
    _, verdicts = feed(monitor, learned, r)
    assert [(a.state, a.evidence["window"] - learned.index) for a in alerts(verdicts)] == [
        ("raised", 0),
        ("cleared", 4),
    ]
    assert alerts(verdicts)[0].id == alerts(verdicts)[1].id


def test_faults_are_raised_while_learning_but_not_learned(monitor: DriftMonitor) -> None:
    r = readings(3, 50)
    r.features[: 5 * WINDOW * ROWS, 0] = np.nan
    state, verdicts = feed(monitor, monitor.start(), r)
    assert alerts(verdicts)[0].summary.startswith("x: 100% of values are missing")
    # Three windows without the fault clear its alert; nothing is learned before.
    assert [v.index for v in verdicts if v.learned_reference] == [LEARN + 8]
    assert state.site_reference is not None
    assert state.site_reference.missing.sum() == 0


def test_a_site_that_changes_while_learning_is_refused_with_the_reason(monitor: DriftMonitor) -> None:
    r = readings(3, 90)
    r.features[20 * WINDOW * ROWS :, 1] += 1.5
    state, verdicts = feed(monitor, monitor.start(), r)
    refused = [v for v in verdicts if v.learning_error]
    assert [v.index for v in refused] == [LEARN]
    assert "y mean" in str(refused[0].learning_error)
    assert [v.index for v in verdicts if v.learned_reference] == [2 * LEARN]
    assert state.site_reference is not None


def test_learning_goes_on_where_windows_are_like_their_neighbors_but_not_for_ever(monitor: DriftMonitor) -> None:
    r = readings(3, 5 * LEARN)
    slow = np.sin(np.arange(5 * LEARN) / 2).repeat(WINDOW * ROWS)
    r.features[:, 1] += slow[: len(r.features)]
    _, verdicts = feed(monitor, monitor.start(), r)
    [learned] = [v.index for v in verdicts if v.learned_reference]
    assert LEARN < learned <= 4 * LEARN


def test_a_late_change_while_learning_gives_a_warning_with_its_time(monitor: DriftMonitor) -> None:
    r = readings(3, LEARN + 1)
    r.features[30 * WINDOW * ROWS :, 1] += 0.6
    brief = DriftMonitor(
        MonitorSettings(monitor.shipped, labels=LABELS, window=WINDOW, learn_windows=LEARN, learn_extension=1.0)
    )
    _, verdicts = feed(brief, brief.start(), r)
    learned = next(v.learned_reference for v in verdicts if v.learned_reference)
    assert learned.warning is not None
    step, blind = learned.warning.split("; windows differ")
    assert step == "y mean changed from window 31 of 40 on while it was learned; learn it again once it is steady"
    assert "shifts of y" in blind


def test_one_odd_window_while_learning_does_not_spoil_the_reference(monitor: DriftMonitor, quiet: Readings) -> None:
    r = readings(3, 60)
    r.features[7 * WINDOW * ROWS : 8 * WINDOW * ROWS, 1] += 3.0
    odd, _ = feed(monitor, monitor.start(), r)
    plain, _ = feed(monitor, monitor.start(), quiet)
    assert odd.site_reference is not None
    assert plain.site_reference is not None
    assert odd.site_reference.test_sd[1] < 1.5 * plain.site_reference.test_sd[1]


def test_few_false_alarms_where_nothing_drifts(monitor: DriftMonitor) -> None:
    raised = windows = 0
    for seed in range(6):
        _, verdicts = feed(monitor, monitor.start(), readings(100 + seed, LEARN + 150))
        windows += sum(v.windows for v in verdicts if v.site_digest is not None)
        raised += sum(any(a.state == "raised" for a in v.alerts) for v in verdicts)
    assert windows == 900
    assert raised <= 9


def tabular(seed: int, drift_windows: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Readings of which each depends on the one before (AR(1), 0.9); 300 rows to a drift window."""
    noise = np.random.default_rng(seed).normal(0, np.sqrt(1 - 0.81), (drift_windows * 300, 4))
    for row in range(1, len(noise)):
        noise[row] += 0.9 * noise[row - 1]
    return noise.astype(np.float32)


def test_a_model_that_answers_each_row_is_judged_the_same_way() -> None:
    table = tabular(0, 60)
    starts = np.arange(len(table))
    shipped = build_reference(table, starts, 1, np.zeros(len(table), np.int64), None, 300, fields=("a", "b", "c", "d"))
    monitor = DriftMonitor(MonitorSettings(shipped, labels=(), window=300))
    state, quiet = monitor.start(), 0
    live = tabular(1, 200)
    live[190 * 300 :, 2] *= 1.5
    collected = []
    for at in range(0, len(live), 7_000):
        part = live[at : at + 7_000]
        count = np.zeros(len(part), np.int64)
        rows = (at + 1, at + len(part))
        state, verdicts = monitor.process_batch(
            state, part, np.arange(len(part)), 1, count, None, rows=rows, t=np.arange(len(part))
        )
        collected += alerts(verdicts)
        tested = [v for v in verdicts if v.site_digest is not None]
        quiet += sum(v.index + i <= 190 for v in tested for i in range(v.windows))
    assert quiet == 150
    assert len([a for a in collected if a.evidence["window"] <= 190 and a.state == "raised"]) <= 2
    late = [a for a in collected if a.evidence["window"] > 190 and a.subject == "c"]
    assert late[0].evidence["test"] == "spread"
    assert late[0].evidence["ratio"] == pytest.approx(1.5, abs=0.25)


def test_the_state_survives_its_bytes_in_every_phase(
    monitor: DriftMonitor, learned: DriftState, quiet: Readings
) -> None:
    r = readings(31, 8)
    r.features[:, 1] *= 0.6
    early, _ = feed(monitor, monitor.start(), quiet.windows(0, 9))
    open_window = Readings(r.features[:1000], r.labels[:50], r.truth[:50], r.scores[:50])
    late, _ = feed(monitor, learned, open_window, batch=13)
    for state in (monitor.start(), early, learned, late):
        again = monitor.restore(state.to_bytes())
        assert again.to_bytes() == state.to_bytes()
        ours, theirs = feed(monitor, again, r), feed(monitor, state, r)
        assert comparable(ours[1]) == comparable(theirs[1])
        assert ours[0].to_bytes() == theirs[0].to_bytes()


def test_the_state_stays_small(monitor: DriftMonitor, quiet: Readings) -> None:
    state, sizes = monitor.start(), []
    for at in range(60):
        state, _ = feed(monitor, state, quiet.windows(at, at + 1))
        sizes.append(len(state.to_bytes()))
    assert max(sizes) < 16_000
    assert sizes[-1] < 8_000
    assert abs(sizes[-1] - sizes[-10]) < 100


@pytest.mark.parametrize("data", [b"", b"no state", b"\x81\xa1a\x01"])
def test_a_damaged_state_is_a_value_error(monitor: DriftMonitor, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        monitor.restore(data)


def test_a_state_of_another_bundle_or_window_length_is_refused(monitor: DriftMonitor, learned: DriftState) -> None:
    other = DriftMonitor(MonitorSettings(reference(seed=2), labels=LABELS, window=WINDOW))
    longer = DriftMonitor(MonitorSettings(monitor.shipped, labels=LABELS, window=WINDOW + 1))
    for foreign in (other, longer):
        with pytest.raises(ValueError, match="another reference"):
            foreign.restore(learned.to_bytes())


def test_a_reference_with_other_labels_than_the_model_is_refused(monitor: DriftMonitor) -> None:
    with pytest.raises(BadBundle, match="labels"):
        DriftMonitor(MonitorSettings(monitor.shipped, labels=("a", "b"), window=WINDOW))


def test_too_few_windows_to_learn_from_are_refused_at_once(monitor: DriftMonitor) -> None:
    with pytest.raises(ValueError, match="20 is the least"):
        learning_from(monitor, 19)


def test_a_verdict_gives_rows_times_and_a_message_in_plain_json(monitor: DriftMonitor, quiet: Readings) -> None:
    _, verdicts = feed(monitor, monitor.start(), quiet.windows(0, 3))
    assert [v.rows for v in verdicts] == [(1, 200), (201, 400), (401, 600)]
    assert [v.t for v in verdicts] == [(10_000, 2_000_000), (2_010_000, 4_000_000), (4_010_000, 6_000_000)]
    assert {v.row_count for v in verdicts} == {200}
    summary = verdicts[0].members
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert set(summary) == {"features", "output", "joint", "rate", "estimate", "state"}
    assert tuple(summary["features"]) == FIELDS
    assert summary["features"]["x"]["cusum"] == {"mean": [0.0, 0.0], "spread": [0.0, 0.0], "limit": None}
    assert summary["features"]["x"]["fault"] is None
    assert summary["output"]["state"] == "insufficient"
    assert summary["estimate"]["low"] <= summary["estimate"]["accuracy"] <= summary["estimate"]["high"]


def test_without_scores_there_is_no_estimate(monitor: DriftMonitor, quiet: Readings) -> None:
    unscored = DriftMonitor(MonitorSettings(replace(monitor.shipped, score_correct=None), labels=LABELS, window=WINDOW))
    _, verdicts = feed(unscored, unscored.start(), quiet.windows(0, 1))
    assert verdicts[0].members["estimate"] is None


@given(data=st.data())
def test_a_damaged_state_is_read_or_refused_with_a_value_error(monitor: DriftMonitor, data: st.DataObject) -> None:
    content = bytearray(monitor.start().to_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    try:
        result = DriftState.from_bytes(bytes(content))
    except ValueError:
        return
    assert DriftState.from_bytes(result.to_bytes()).to_bytes() == result.to_bytes()


@given(st.binary(max_size=100))
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x91" * 100_000)
def test_any_bytes_for_a_state_or_a_summary_are_refused_with_a_value_error(data: bytes) -> None:
    for kind in (DriftState, Summary):
        with pytest.raises(ValueError, match=r"."):
            kind.from_bytes(data)
