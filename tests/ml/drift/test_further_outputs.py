"""Drift of the further outputs of a model: of their labels, scores and values."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.foundation.errors import BadBundle
from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, MonitorSettings, Reference, succession
from outstation.ml.drift.baseline.learning import build_reference, with_score_accuracy
from outstation.ml.drift.detectors.registry import CLASS_SHARE, SCORED
from outstation.ml.drift.numeric import false_alarm_budget
from outstation.ml.drift.outputs import counts as output_counts
from outstation.ml.drift.outputs.counts import FurtherOutput
from outstation.ml.drift.reporting import parsed_message
from outstation.protocol.wire.privacy import least_count
from tests.kit.machine import FIELDS, LABELS, LEARN, ROWS, WINDOW, Readings, readings

OUTPUTS = (FurtherOutput("pose", ("up", "down")), FurtherOutput("flow", (), ("flow", "heat")))
Floats = NDArray[np.float64]


def answers(seed: int, count: int) -> Floats:
    """Answers (w, 4): label and score of the pose, flow and heat."""
    rng = np.random.default_rng(seed)
    flow = rng.normal(5, 1, count)
    return np.stack([rng.random(count) < 0.3, rng.uniform(0.6, 1, count), flow, 2 * flow + rng.normal(size=count)], 1)


@cache
def shipped() -> Reference:
    r = readings(1, 60)
    starts, further = np.arange(len(r.labels)) * ROWS, answers(1, len(r.labels))
    made = build_reference(
        r.features,
        starts,
        ROWS,
        r.labels,
        r.scores,
        WINDOW,
        fields=FIELDS,
        labels=LABELS,
        further=OUTPUTS,
        answers=further,
    )
    return with_score_accuracy(made, r.scores.max(1).astype(np.float64), r.labels == r.truth)


def make_monitor(reference: Reference | None = None) -> DriftMonitor:
    return DriftMonitor(
        MonitorSettings(reference or shipped(), labels=LABELS, window=WINDOW, learn_windows=LEARN, further=OUTPUTS)
    )


def feed(
    monitor: DriftMonitor, state: DriftState, r: Readings, further: Floats, *, batch: int = 50
) -> tuple[DriftState, list[DriftWindowResult]]:
    results: list[DriftWindowResult] = []
    first = max(0, state.last_counted_row) + 1
    for at in range(0, len(r.labels), batch):
        features, part = r.features[at * ROWS : (at + batch) * ROWS], slice(at, at + batch)
        rows = (first + at * ROWS, first + at * ROWS + len(features) - 1)
        t = np.arange(rows[0], rows[1] + 1, dtype=np.int64) * 10_000
        starts = np.arange(0, len(features), ROWS)
        state, more = monitor.process_batch(
            state, features, starts, ROWS, r.labels[part], r.scores[part], rows=rows, t=t, answers=further[part]
        )
        results += more
    return state, results


@pytest.fixture(scope="module")
def learned() -> DriftState:
    r = readings(100, LEARN)
    state, results = feed(make_monitor(), make_monitor().start(), r, answers(100, len(r.labels)))
    assert state.site_reference is not None
    assert not [alert for result in results for alert in result.alerts]
    return state


def watch(learned: DriftState, further: Floats, *, batch: int = 50) -> list[DriftWindowResult]:
    return feed(make_monitor(), learned, readings(203, 30), further, batch=batch)[1]


def alerts(results: list[DriftWindowResult]) -> list[tuple[str, str, object]]:
    return [(alert.subject, alert.state, alert.evidence.get("test")) for result in results for alert in result.alerts]


def test_answers_as_usual_raise_nothing_and_are_reported_with_the_name_of_each_output(learned: DriftState) -> None:
    results = watch(learned, answers(200, 300))
    assert alerts(results) == []
    members = results[-1].members["output"]["further"]
    assert {name: member["state"] for name, member in members.items()} == {"pose": "ok", "flow": "ok"}
    report = parsed_message.from_message(results[-1].members, (0, 1))
    assert report.subjects["output.pose"].limit is not None
    assert report.subjects["output.flow"].state == "ok"
    assert sum(result.members["output"]["further"]["pose"]["counts"]["up"] for result in results) == int(
        (answers(200, 300)[:, 0] == 0).sum()
    )


@pytest.mark.parametrize(
    ("column", "change", "subject", "test"),
    [
        (0, lambda values: np.random.default_rng(5).random(len(values)) < 0.75, "output.pose", "share"),
        (1, lambda values: values - 0.3, "output.pose", "accuracy"),
        (2, lambda values: values + 1.5, "output.flow", "mean"),
        (3, lambda values: 10 + 4 * (values - 10), "output.flow", "spread"),
        (3, lambda values: 10 + 0.05 * (values - 10), "output.flow", "spread"),
    ],
    ids=["another share of a label", "doubt", "higher values", "wider values", "nearly constant values"],
)
def test_a_change_of_one_further_output_names_it_and_no_other(
    learned: DriftState, column: int, change: object, subject: str, test: str
) -> None:
    changed = answers(200, 300)
    changed[100:, column] = change(changed[100:, column])  # type: ignore[operator]
    raised = [alert for result in watch(learned, changed) for alert in result.alerts if alert.state == "raised"]
    assert {alert.subject for alert in raised} == {subject}
    first = raised[0]
    assert first.id == f"{subject}/drift/1"
    assert first.evidence["test"] == test
    assert first.summary.startswith(f"{subject}: ")
    assert 11 <= first.evidence["window"] - LEARN <= 16


def test_an_alert_about_a_value_gives_medians_in_its_unit(learned: DriftState) -> None:
    changed = answers(200, 300)
    changed[:, 2] += 1.5
    [first, *_] = [alert for result in watch(learned, changed) for alert in result.alerts]
    assert first.evidence["usual"] == pytest.approx(5, abs=0.2)
    assert first.evidence["median"] == pytest.approx(6.5, abs=0.8)


def test_an_alert_ends_once_the_output_is_as_before(learned: DriftState) -> None:
    changed = answers(200, 300)
    changed[:100, 2] += 3
    assert alerts(watch(learned, changed))[-1][:2] == ("output.flow", "cleared")


def test_results_do_not_depend_on_where_batches_end(learned: DriftState) -> None:
    changed = answers(200, 300)
    changed[150:, 2] += 1.5

    def summarize(results: list[DriftWindowResult]) -> object:
        flow = [result.members["output"]["further"]["flow"]["values"]["flow"]["counts"] for result in results]
        return np.sum(flow, axis=0).tolist(), [alert for result in results for alert in result.alerts]

    assert summarize(watch(learned, changed, batch=7)) == summarize(watch(learned, changed, batch=300))


def test_an_unknown_answer_is_left_out(learned: DriftState) -> None:
    further = answers(200, 300)
    further[:, 2] = np.nan
    results = watch(learned, further)
    assert alerts(results) == []
    assert not any(results[-1].members["output"]["further"]["flow"]["values"]["flow"]["counts"])


def test_the_state_survives_being_stored(learned: DriftState) -> None:
    monitor, site = make_monitor(), learned.site_reference
    assert site is not None
    restored = monitor.restore(monitor.to_bytes(learned), learned.learning.to_bytes(), site.to_json())
    changed = answers(200, 300)
    changed[100:, 0] = 1
    assert watch(restored, changed)[-1].members == watch(learned, changed)[-1].members


@pytest.mark.parametrize("count", [0, 1, 2, 5, 16])
def test_all_outputs_of_a_model_share_one_false_alarm_budget(count: int) -> None:
    task = replace(shipped().task, further=tuple(FurtherOutput(f"o{at}", ("a", "b")) for at in range(count)))
    answering = [detector for detector in SCORED if detector.tests_answers]
    shares = sum(detector.share_budget(task) for detector in answering)
    charts = false_alarm_budget.CLASS_SHARE_MEWMA_BUDGET / (1 + count)
    assert shares + charts == pytest.approx(false_alarm_budget.ANSWERS_BUDGET)
    assert CLASS_SHARE.share_budget(task) == pytest.approx(CLASS_SHARE.budget / (1 + count))


def test_a_reference_of_one_output_has_no_new_member() -> None:
    plain = replace(shipped(), further=())
    assert b"further" not in plain.to_json()
    assert Reference.from_json(plain.to_json()).task.further == ()


def test_a_model_with_other_further_outputs_is_refused() -> None:
    with pytest.raises(BadBundle, match="further outputs"):
        DriftMonitor(MonitorSettings(shipped(), labels=LABELS, window=WINDOW, further=OUTPUTS[:1]))


def test_a_bundle_with_other_further_outputs_inherits_nothing() -> None:
    assert succession.is_heir(shipped(), shipped())
    assert not succession.is_heir(shipped(), replace(shipped(), further=shipped().further[:1]))


@pytest.mark.parametrize(
    "change",
    [
        {"edges": np.zeros((1, 30))},
        {"edges": np.full((1, 31), np.nan)},
        {"edges": np.arange(31.0)[None, ::-1]},
        {"counts": np.zeros(3, np.int64)},
        {"counts": np.full(34, -1)},
        {"counts": np.full(34, 2**62)},
        {"held_out": np.full((2, 32), 2**62)},
        {"held_out": np.array([[1] * 32, [2] * 32])},
        {"held_out": np.ones((3, 32), np.int64)},
        {"output": FurtherOutput("pose", ("up", "down"), ("score", "more"))},
        {"output": FurtherOutput("pose", ("up", "down"), ())},
        {"output": FurtherOutput("flow", ("up", "down"))},
    ],
)
def test_a_malformed_reference_is_refused(change: dict[str, object]) -> None:
    pose, flow = shipped().further
    hostile = replace(shipped(), further=(replace(pose, **change), flow))
    with pytest.raises(BadBundle, match=r"reference\.json"):
        Reference.from_json(hostile.to_json())


def test_no_bin_shows_fewer_answers_than_the_least_count(learned: DriftState) -> None:
    results, least = watch(learned, answers(200, 300)), 6
    for result in results:
        body = least_count.apply("drift", {"window": {"n": result.row_count}, **result.members}, least)
        for member in body["output"]["further"].values():
            shown = [n for value in member["values"].values() for n in value["counts"]]
            shown += member.get("counts", {}).values()
            assert all(n == 0 or n >= least for n in shown)


def test_the_median_of_counts_lies_between_their_quantiles() -> None:
    quantiles = np.arange(31.0)
    assert output_counts.median_value(np.bincount([16], minlength=32), quantiles) == pytest.approx(15.5)
    assert output_counts.median_value(np.bincount([0], minlength=32), quantiles) == 0
    assert output_counts.median_value(np.bincount([31], minlength=32), quantiles) == 30
