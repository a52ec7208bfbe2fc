"""Test suite: what each detector finds, what stays quiet, and that nothing is reported twice."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from msgspec.structs import replace

from outstation.foundation.errors import BadBundle
from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, MonitorSettings, Reference
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.sequential.sequence import run_tests
from outstation.ml.drift.sequential.test_suite import Evidence
from outstation.protocol.alerts.alert import Alert
from tests.kit.machine import FIELDS, LABELS, LEVEL, ROWS, WINDOW, Readings, feed, readings, reference

LEARN, F = 40, 16
NAMES = tuple(f"f{i}" for i in range(F))


@pytest.fixture(scope="module")
def monitor() -> DriftMonitor:
    return DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=LEARN))


@pytest.fixture(scope="module")
def learned(monitor: DriftMonitor) -> DriftState:
    return feed(monitor, monitor.start(), readings(3, LEARN + 2))[0]


def raised(verdicts: list[DriftWindowResult]) -> list[Alert]:
    return [a for v in verdicts for a in v.alerts if a.state == "raised"]


def table(seed: int, windows: int, *, steady: float = 0.0) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Rows of 16 fields, 200 to a drift window, each as like the one before as `steady`."""
    rows = np.random.default_rng(seed).normal(size=(windows * 200, F))
    for row in range(1, len(rows) if steady else 0):
        rows[row] = steady * rows[row - 1] + np.sqrt(1 - steady**2) * rows[row]
    return rows


def watch(rows: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> list[DriftWindowResult]:
    """Verdicts on a table, a model without classes that answers each row."""
    shipped = build_reference(
        table(0, 40).astype(np.float32), np.arange(8000), 1, np.zeros(8000, np.int64), None, 200, fields=NAMES
    )
    monitor = DriftMonitor(MonitorSettings(shipped, labels=(), window=200, learn_windows=LEARN))
    none, t = np.zeros(len(rows), np.int64), np.arange(len(rows), dtype=np.int64) * 1000
    return monitor.process_batch(
        monitor.start(), rows.astype(np.float32), np.arange(len(rows)), 1, none, None, rows=(1, len(rows)), t=t
    )[1]


@pytest.mark.parametrize("steady", [0.0, 0.9])
def test_sixteen_fields_in_which_nothing_happens_raise_almost_nothing(steady: float) -> None:
    verdicts = [v for seed in range(2) for v in watch(table(seed + 1, LEARN + 110, steady=steady))]
    assert sum(v.windows for v in verdicts if v.site_digest is not None) == 220
    assert len(raised(verdicts)) <= 4


def test_two_fields_that_begin_to_correlate_are_reported_as_joint() -> None:
    rows = table(1, LEARN + 8)
    late = slice(LEARN * 200, None)
    rows[late, 9] = 0.5 * rows[late, 2] + np.sqrt(0.75) * rows[late, 9]
    (alert,) = raised(watch(rows))
    assert (alert.subject, alert.alert) == ("joint", "drift")
    assert alert.summary.startswith("joint: f2 and f9 go more together than in this site's reference over ")
    assert alert.evidence["pairs"][0]["pair"] == ["f2", "f9"]
    assert alert.evidence["window"] - LEARN <= 5


def test_fields_with_their_own_drift_are_not_reported_as_joint() -> None:
    rows = table(1, LEARN + 12)
    rows[LEARN * 200 :, 4] += 2 * np.random.default_rng(7).normal(size=12 * 200)
    assert {a.subject for a in raised(watch(rows))} == {"f4"}


def test_another_shape_of_the_same_mean_and_spread_is_detected() -> None:
    rows = table(1, LEARN + 12)
    late = rows[LEARN * 200 :, 5]
    rows[LEARN * 200 :, 5] = 0.9 * np.sign(late) + np.sqrt(0.19) * np.random.default_rng(7).normal(size=len(late))
    (alert,) = raised(watch(rows))
    assert (alert.subject, alert.evidence["test"]) == ("f5", "shape")
    assert "values are spread otherwise than in this site's reference" in alert.summary


def test_the_shift_of_a_field_is_estimated_without_bias_from_any_row_on() -> None:
    ratios = []
    for seed, begin in enumerate(range(10, 200, 20)):
        rows = table(seed + 1, LEARN + 6)
        rows[LEARN * 200 + begin :, 3] += 0.8
        shifts = [a.evidence["shift"] for a in raised(watch(rows)) if a.subject == "f3" and "shift" in a.evidence]
        ratios += [shift / 0.8 for shift in shifts[:1]]
    assert len(ratios) >= 8
    assert np.median(ratios) == pytest.approx(1.0, abs=0.06)
    assert min(ratios) > 0.75


def test_a_ramp_is_distinguished_from_a_step() -> None:
    reported = {"step": 0, "ramp": 0}
    for seed in range(6):
        for kind, change in (("step", 0.2), ("ramp", np.linspace(0, 0.5, 20 * 200))):
            rows = table(seed, LEARN + 20)
            rows[LEARN * 200 :, 3] += change
            alert = next(a for a in raised(watch(rows)) if a.subject == "f3")
            assert (", and goes on: a slow ramp; likely " in alert.summary) == alert.evidence["ramp"]
            reported[kind] += alert.evidence["ramp"]
    assert reported["step"] == 0
    assert reported["ramp"] >= 2


def test_a_less_certain_model_is_reported_with_the_lost_accuracy(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(31, 14)
    unsure = replace(r, scores=(0.55 * r.scores + 0.15).astype(np.float32))
    _, verdicts = feed(monitor, learned, unsure)
    (alert,) = raised(verdicts)
    assert alert.subject == "score"
    assert alert.summary.startswith("score: the model's certainty fell by 0.")
    assert "; the model's expected accuracy fell from 0.9" in alert.summary
    assert verdicts[-1].members["output"]["score"]["state"] == "drift"


def test_predictions_in_other_shares_are_reported_by_label() -> None:
    """Modes come one window at a time here, so that shares are steady enough to tell."""
    rng = np.random.default_rng(4)

    def made(windows: int, shares: list[float]) -> Readings:
        r = readings(int(rng.integers(1000)), windows, wrong=0.0)
        order = np.concatenate([np.flatnonzero(r.truth == mode) for mode in range(3)])
        wanted = rng.choice(3, size=len(r.truth), p=shares)
        pools = [order[r.truth[order] == mode] for mode in range(3)]
        picked = np.array([rng.choice(pools[mode]) for mode in wanted])
        rows = (picked[:, None] * ROWS + np.arange(ROWS)).ravel()
        return Readings(r.features[rows], r.labels[picked], r.truth[picked], r.scores[picked])

    monitor = DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=4 * WINDOW, learn_windows=LEARN))
    state, before = feed(monitor, monitor.start(), made(4 * (LEARN + 5), [0.4, 0.3, 0.3]))
    _, after = feed(monitor, state, made(4 * 10, [0.05, 0.3, 0.65]))
    assert raised(before) == []
    reported = [a for a in raised(after) if a.subject == "output"]
    assert len(reported) == 1
    assert " of the answers, " in reported[0].summary
    assert reported[0].evidence["label"] in ("idle", "run")


def misnamed(monitor: DriftMonitor, learned: DriftState, windows: int) -> list[DriftWindowResult]:
    """Field x is off so far that the model, which goes by it, names wrong modes in half of the windows."""
    r = readings(31, windows, wrong=0.0)
    r.features[:, 0] += 0.9
    mean = r.features.reshape(-1, ROWS, 3)[:, :, 0].mean(1)
    labels = np.argmin(np.abs(mean[:, None] - LEVEL[:, 0]), axis=1)
    assert np.mean(labels != r.truth) > 0.4
    return feed(monitor, learned, replace(r, labels=labels))[1]


def test_sound_fields_stay_quiet_while_the_model_names_wrong_classes(
    monitor: DriftMonitor, learned: DriftState
) -> None:
    for windows in (20, 30, 40):
        verdicts = misnamed(monitor, learned, windows)
        reported = [a.subject for a in raised(verdicts)]
        # Until the first alarm all are compared with what the model named, and a sound field may be told first.
        assert FIELDS[0] in reported
        assert len(reported) <= 2
        assert {name for name, f in verdicts[-1].members["features"].items() if f["state"] == "drift"} == {"x"}


def test_alerts_do_not_depend_on_batches_while_classes_are_reassigned(
    monitor: DriftMonitor, learned: DriftState
) -> None:
    r = readings(31, 12, wrong=0.3)
    r.features[:, 0] += 0.9

    def final_state_and_alerts(bounds: list[int]) -> tuple[bytes, list[Alert]]:
        state, collected = learned, []
        for begin, end in pairwise(bounds):
            part = Readings(
                r.features[begin * ROWS : end * ROWS], r.labels[begin:end], r.truth[begin:end], r.scores[begin:end]
            )
            state, verdicts = feed(monitor, state, part, batch=1000)
            collected += raised(verdicts)
        return state.to_bytes(), collected

    whole = final_state_and_alerts([0, 120])
    assert whole[1]
    assert final_state_and_alerts([0, 7, 33, 34, 60, 111, 120]) == whole


def test_learning_anew_clears_what_is_open_and_counts_references(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(31, 60)
    r.features[:, 1] *= 0.6
    drifted, verdicts = feed(monitor, learned, r.windows(0, 8))
    assert [a.subject for a in raised(verdicts)] == ["y"]
    fresh, cleared = monitor.relearn(drifted)
    assert [(a.id, a.state) for a in cleared] == [("y/drift/1", "cleared")]
    assert cleared[0].summary == "y: this site's reference is learned anew."
    again, verdicts = feed(monitor, fresh, r.windows(8, 60))
    # What was drift is the reference now, and that is told.
    assert [(a.subject, a.evidence["deviations"][0]["field"]) for a in raised(verdicts)] == [("reference", "y")]
    assert again.site_reference is not None
    assert again.site_reference.site is not None
    assert again.site_reference.site.number == 2


def test_learning_for_a_time_waits_for_it(monitor: DriftMonitor) -> None:
    r = readings(3, 100)
    state, _ = monitor.relearn(monitor.start(), 120.0)
    _, verdicts = feed(monitor, state, r)
    learned = next(v for v in verdicts if v.learned_reference)
    assert learned.learned_reference is not None
    assert learned.learned_reference.drift_windows == learned.index == 61


def test_a_model_of_a_single_field_is_watched_too() -> None:
    rows = np.random.default_rng(1).normal(size=(60 * 200, 1)).astype(np.float32)
    none = np.zeros(len(rows), np.int64)
    shipped = build_reference(rows[:8000], np.arange(8000), 1, none[:8000], None, 200, fields=("only",))
    monitor = DriftMonitor(MonitorSettings(shipped, labels=(), window=200, learn_windows=LEARN))
    rows[50 * 200 :] += 1.0
    t = np.arange(len(rows), dtype=np.int64)
    state, verdicts = monitor.process_batch(monitor.start(), rows, t, 1, none, None, rows=(1, len(rows)), t=t)
    assert [a.subject for a in raised(verdicts)] == ["only"]
    assert monitor.restore(state.to_bytes()).to_bytes() == state.to_bytes()


def test_a_site_reference_survives_its_file(monitor: DriftMonitor, learned: DriftState) -> None:
    assert learned.site_reference is not None
    again = Reference.from_json(learned.site_reference.to_json())
    assert again.digest == learned.site_reference.digest
    assert again.site is not None
    assert replace(learned, site_reference=again).to_bytes() == learned.to_bytes()


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("waves", [1]),
        ("hours", [1]),
        ("limits", [1]),
        ("spread", [1]),
        ("baselines", {}),
        ("baselines.psi", {"limits": [1]}),
        ("baselines.psi", {"mean": [1]}),
        ("baselines.correlation", {"mean": [[1.0]]}),
        ("baselines.field_mewma", {"limit": -1.0}),
        ("baselines.sampling_rate", None),
    ],
)
def test_a_site_reference_that_does_not_hold_together_is_refused(
    learned: DriftState, member: str, value: object
) -> None:
    assert learned.site_reference is not None
    document = json.loads(learned.site_reference.to_json())
    *path, name = member.split(".")
    part = document["site"][path[0]] if path else document["site"]
    assert name in part
    part[name] = value
    with pytest.raises(BadBundle, match=f"malformed|site.{member}"):
        Reference.from_json(json.dumps(document).encode())


def test_an_alarm_that_ends_by_itself_makes_its_test_more_cautious(monitor: DriftMonitor, learned: DriftState) -> None:
    assert learned.site_reference is not None
    tester, suite, ends = monitor._get_tester(learned.site_reference), learned.suite, 0
    moved = suite.layout["moments"].start
    for score in [4.0] * 4 + [0.0] * 10:
        z = np.zeros((1, suite.layout.test_count))
        z[0, moved] = score
        charts = dict.fromkeys(suite.charts) | {"psi": np.zeros((1, 5))}
        evidence = Evidence(z, z, charts, np.zeros((1, 32), np.int64))
        was_open = suite.open_subjects.any()
        suite = run_tests(tester, suite, evidence, np.array([1])).state_after(1)
        ends += bool(was_open and not suite.open_subjects.any())
    assert ends == 1
    raised_by = run_tests(tester, suite, evidence, np.array([1])).cusum.limit / tester.limits.limit
    assert raised_by.tolist() == [1.25 if test == moved else 1.0 for test in range(len(raised_by))]
    assert replace(suite, ended=suite.ended * 9).caution[moved] == 1.75
    learned_again = monitor.relearn(replace(learned, suite=suite))[0]
    assert not learned_again.suite.ended.any()
