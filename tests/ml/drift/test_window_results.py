"""Runs of quiet windows: the message of a run says what the messages of its windows say together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.fleet.drift.merge import MergedField
from outstation.ml.comparison.tally import merge_moments
from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, MonitorSettings
from outstation.ml.drift.reporting import parsed_message
from outstation.protocol.wire.messages import Moments
from outstation.protocol.wire.privacy import least_count
from tests.kit.machine import LABELS, LEARN, ROWS, WINDOW, Readings, comparable, feed, readings, reference


def gaps(r: Readings, share: float, seed: int) -> Readings:
    """Return readings with some missing, fewer than a fault has."""
    features = r.features.copy()
    features[np.random.default_rng(seed).random(features.shape) < share] = np.nan
    return Readings(features, r.labels, r.truth, r.scores)


def windows_of(results: list[DriftWindowResult], run: DriftWindowResult) -> list[DriftWindowResult]:
    return [entry for entry in results if run.index <= entry.index < run.index + run.windows]


@given(st.integers(0, 60), st.sampled_from([0.0, 0.004]), st.integers(20, 200))
@settings(deadline=None, max_examples=20)
def test_a_run_merges_exactly_what_its_windows_report(
    monitor: DriftMonitor, learned: DriftState, seed: int, share: float, batch: int
) -> None:
    r = gaps(readings(200 + seed, 20), share, seed)
    state, together = feed(monitor, learned, r, batch=batch)
    each_state, each = feed(monitor, learned, r, batch=WINDOW)
    assert monitor.to_bytes(state) == monitor.to_bytes(each_state)
    assert all(entry.windows == 1 for entry in each)
    for run in together:
        parts = windows_of(each, run)
        assert len(parts) == run.windows
        assert (run.rows, run.t) == ((parts[0].rows[0], parts[-1].rows[1]), (parts[0].t[0], parts[-1].t[1]))
        assert run.row_count == sum(part.row_count for part in parts)
        assert_merged(run, parts)
        if run.quiet is not None:
            assert run.quiet.rows.tolist() == [[*part.rows] for part in parts]
            assert run.quiet.t.tolist() == [[*part.t] for part in parts]
            assert run.quiet.nearest.tolist() == [part.quiet.nearest[0] for part in parts if part.quiet is not None]


def assert_merged(run: DriftWindowResult, parts: list[DriftWindowResult]) -> None:
    for name, field in run.members["features"].items():
        fields = [part.members["features"][name] for part in parts]
        for count in ("missing", "below", "above"):
            assert field[count] == sum(entry[count] for entry in fields)
        assert field["counts"] == np.sum([entry["counts"] for entry in fields], axis=0).tolist()
        merged = Moments()
        for entry in fields:
            n = sum(entry["counts"]) + entry["below"] + entry["above"]
            merged = merge_moments(merged, Moments(n, entry["mean"], entry["m2"]))
        assert field["mean"] == pytest.approx(merged.mean, rel=1e-12, abs=1e-12)
        assert field["m2"] == pytest.approx(merged.m2, rel=1e-12)
        for now in ("cusum", "state", "fault"):
            assert field[now] == fields[-1][now]
    output, outputs = run.members["output"], [part.members["output"] for part in parts]
    named = {label: sum(entry["counts"].get(label, 0) for entry in outputs) for label in LABELS}
    assert output["counts"] == {label: n for label, n in named.items() if n}
    assert output["score"] == outputs[-1]["score"]
    estimates = [part.members["estimate"]["accuracy"] for part in parts]
    # Each window is rounded to 4 decimals, and has as many predictions.
    assert run.members["estimate"]["accuracy"] == pytest.approx(np.mean(estimates), abs=1e-4)
    rate, rates = run.members["rate"], [part.members["rate"] for part in parts]
    assert (rate["cusum"], rate["state"]) == (rates[-1]["cusum"], rates[-1]["state"])
    repeated = np.average([entry["repeated"] for entry in rates], weights=[part.row_count for part in parts])
    assert rate["repeated"] == pytest.approx(repeated, abs=1e-4)
    assert rate["step_us"] == pytest.approx(np.mean([entry["step_us"] for entry in rates]), rel=1e-4)


def test_the_share_of_the_limit_is_that_of_the_largest_reported_sum(monitor: DriftMonitor, learned: DriftState) -> None:
    """The sums of predictions by class are in no message."""
    _, each = feed(monitor, learned, readings(207, 20), batch=WINDOW)
    quiet = [entry for entry in each if entry.quiet is not None]
    assert len(quiet) > 10
    for entry in quiet:
        assert entry.quiet is not None
        [reported] = parsed_message.from_message(entry.members, entry.t).nearest
        assert reported <= entry.quiet.nearest[0] + 0.005
        assert 0 <= entry.quiet.nearest[0] <= 1
    assert max(entry.quiet.nearest[0] for entry in quiet if entry.quiet is not None) > 0.1


def test_no_bin_of_a_run_shows_fewer_rows_than_allowed(learned: DriftState) -> None:
    least = 60
    private = DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=LEARN))
    _, results = feed(private, learned, readings(200, 20), batch=200)
    runs = [entry for entry in results if entry.windows > 1]
    assert runs
    for run in runs:
        body = least_count.apply("drift", {"window": {"n": run.row_count}, **run.members}, least)
        for field in body["features"].values():
            shown = [*field["counts"], field["below"], field["above"]]
            assert all(n == 0 or n >= least for n in shown)
            assert sum(shown) + field["missing"] == run.row_count
        assert all(n >= least for n in body["output"]["counts"].values())


def test_a_run_ends_where_a_message_takes_no_more_windows(
    monitor: DriftMonitor, learned: DriftState, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = readings(200, 20)
    monkeypatch.setattr("outstation.ml.drift.batches.MAX_FIELDS_PER_PASS", 6)
    monkeypatch.setattr("outstation.ml.drift.batches.LARGE_PASS_WINDOWS", 1)
    _, whole = feed(monitor, learned, r, batch=200)
    monkeypatch.setattr("outstation.ml.drift.window_results.MAX_QUIET_WINDOWS", 5)
    _, short = feed(monitor, learned, r, batch=200)
    assert max(entry.windows for entry in whole) > 5 > max(entry.windows for entry in short) == 4
    assert comparable(short) == comparable(whole)


def test_neighboring_windows_that_are_not_quiet_stay_separate(monitor: DriftMonitor, learned: DriftState) -> None:
    r = readings(211, 12)
    r.features[3 * WINDOW * ROWS : 5 * WINDOW * ROWS, 2] = 1.0
    _, results = feed(monitor, learned, r, batch=120)
    stuck: list[Any] = [(entry.index, entry.windows) for entry in results if entry.members["state"] == "fault"]
    begin = results[0].index + 3
    assert stuck[:2] == [(begin, 1), (begin + 1, 1)]
    assert [entry.quiet is None for entry in results if entry.alerts] == [True] * sum(
        bool(entry.alerts) for entry in results
    )


def test_a_message_of_a_run_is_parsed_and_merged_like_those_of_its_windows(
    monitor: DriftMonitor, learned: DriftState
) -> None:
    _, each = feed(monitor, learned, readings(200, 20), batch=WINDOW)
    _, together = feed(monitor, learned, readings(200, 20), batch=200)

    def merged(results: list[DriftWindowResult]) -> MergedField:
        reports = [parsed_message.from_message(entry.members, entry.t).fields["x"] for entry in results]
        first, *rest = [MergedField.sum_of([report]) for report in reports]
        return sum(rest, start=first)

    one_by_one, in_runs = merged(each), merged(together)
    assert in_runs.counts.tolist() == one_by_one.counts.tolist()
    assert in_runs.moments.mean == pytest.approx(one_by_one.moments.mean, rel=1e-12)
    assert in_runs.moments.m2 == pytest.approx(one_by_one.moments.m2, rel=1e-12)
