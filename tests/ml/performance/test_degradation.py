"""Performance degradation: no alert while accuracy stays, one alert for each way it can fall."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.ml.performance import degradation
from outstation.ml.performance.degradation import (
    CERTAINTY,
    DECAY,
    EVALUATION,
    DegradationEvent,
    DegradationState,
    LabelledLoss,
    PromisedAccuracy,
)


def run(
    losses: Any,
    state: DegradationState | None = None,
    promise: PromisedAccuracy | None = None,
    expected: float | None = None,
    shares: bool = True,
    first_row: int = 1,
) -> list[DegradationEvent]:
    state = state or DegradationState("sha256:a")
    labelled = [LabelledLoss(float(loss), expected, row, row * 1_000_000) for row, loss in enumerate(losses, first_row)]
    return degradation.add_losses(state, labelled, promise or PromisedAccuracy(), binary_loss=shares)


def wrong(n: int, share: float, seed: int = 0) -> Any:
    return np.random.default_rng(seed).random(n) < share


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_labels_that_keep_saying_the_same_raise_nothing(share: float) -> None:
    groups = events = 0
    for seed in range(12):
        answers = wrong(5000, share, seed)
        events += len(run(answers, promise=PromisedAccuracy(1 - share, 2000), expected=share))
        groups += 200
    # At most 2 in 1000 groups of 25 labels, all three comparisons together.
    assert events <= 4 * groups / 1000


def test_mistakes_that_come_in_runs_are_no_decay() -> None:
    events = 0
    for seed in range(12):
        events += len(run(np.repeat(wrong(1000, 0.15, seed), 4)))
    assert events <= 6


def test_sessions_in_which_many_answers_are_wrong_are_neither_decay_nor_a_broken_promise() -> None:
    events = groups = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        chances = np.repeat(np.where(rng.random(200) < 0.15, 0.5, 0.05), 35)
        answers = rng.random(len(chances)) < chances
        promise = PromisedAccuracy(1 - float(chances.mean()), 2000)
        events += len([event for event in run(answers, promise=promise) if event.state == "raised"])
        groups += len(answers) // degradation.GROUP_SIZE
    # 39 in 1000 if only neighbours are compared.
    assert events <= 6 * groups / 1000


def test_falling_accuracy_is_reported_with_both_numbers() -> None:
    state = DegradationState("sha256:a")
    assert run(wrong(500, 0.07), state) == []
    events = run(wrong(200, 0.29, 1), state)
    assert [(item.kind, item.state) for item in events] == [(DECAY, "raised")]
    assert events[0].low > events[0].before
    alert = degradation.build_alert(events[0], binary_loss=True)
    assert alert.summary.startswith("accuracy fell: the accuracy of the last ")
    assert alert.severity == "warning"


def test_an_alert_is_raised_once_and_cleared_once() -> None:
    state = DegradationState("sha256:a")
    run(wrong(500, 0.05), state)
    raised = run(wrong(400, 0.4, 1), state)
    cleared = run(wrong(400, 0.03, 2), state)
    assert [item.state for item in raised] == ["raised"]
    assert [item.state for item in cleared] == ["cleared"]
    assert raised[0].count == cleared[0].count
    again = run(wrong(300, 0.4, 3), state)
    assert [(item.state, item.count) for item in again] == [("raised", 2)]


def follow(losses: Any, share_before: float, seed: int) -> list[DegradationEvent]:
    """Return the decay events of labels after 600 with `share_before` mistakes."""
    state = DegradationState("sha256:a")
    run(wrong(600, share_before, seed + 1000), state)
    return [event for event in run(losses, state) if event.kind == DECAY]


def neighbours_alike(n: int, share: float, repeat: float, seed: int) -> Any:
    """Return 0/1 losses, each equal to the one before with chance `repeat`, else drawn anew."""
    random = np.random.default_rng(seed)
    new, drawn = random.random(n) >= repeat, random.random(n) < share
    return drawn[np.maximum.accumulate(np.where(new, np.arange(n), 0))]


@pytest.mark.parametrize("repeat", [0.0, 0.3, 0.6])
def test_an_alert_stays_open_while_the_model_stays_wrong(repeat: float) -> None:
    """Quiet stretches inside an event used to clear it: 5 to 75 times in 100 events of 3,000 labels."""
    events = [follow(neighbours_alike(3000, 0.3, repeat, seed), 0.1, seed) for seed in range(25)]
    raised = sum(item[0].state == "raised" for item in events if item)
    cleared = sum(event.state == "cleared" for item in events for event in item)
    assert raised >= 20
    assert cleared <= 1


def test_the_clearing_says_which_labels_agree() -> None:
    losses = np.concatenate([wrong(500, 0.35, 5), wrong(400, 0.08, 6)])
    raised, cleared = follow(losses, 0.08, 5)
    assert cleared.run.n >= degradation.CLEAR_SIZE
    assert cleared.high < raised.loss
    assert cleared.run.rows is not None
    first, last = cleared.run.rows
    assert losses[first - 1 : last].mean() == pytest.approx(cleared.loss)
    alert = degradation.build_alert(cleared, binary_loss=True)
    assert alert.evidence["rows"] == [first, last]
    assert alert.evidence["n"] == last - first + 1
    assert alert.evidence["to"].startswith(f"1970-01-01T00:{last // 60:02}:{last % 60:02}")
    assert f"the last {cleared.run.n} labels agree with the first labels again" in alert.summary


def test_errors_of_numbers_clear_as_well() -> None:
    random, state = np.random.default_rng(4), DegradationState("sha256:a")
    run(np.abs(random.normal(0, 1, 600)), state, shares=False)
    run(np.abs(random.normal(0, 1.8, 600)), state, shares=False)
    [cleared] = run(np.abs(random.normal(0, 1, 400)), state, shares=False)
    assert cleared.state == "cleared"
    assert degradation.build_alert(cleared, binary_loss=False).summary.startswith("the last ")


def test_accuracy_below_the_evaluation_is_reported_from_the_first_labels() -> None:
    events = run(wrong(150, 0.3), promise=PromisedAccuracy(0.93, 3000))
    assert [item.kind for item in events] == [EVALUATION]
    assert "the evaluation measured 0.93" in degradation.build_alert(events[0], binary_loss=True).summary


def test_labels_below_the_models_scores_are_likely_concept_drift() -> None:
    events = run(wrong(200, 0.29), expected=0.07)
    assert [item.kind for item in events] == [CERTAINTY]
    summary = degradation.build_alert(events[0], binary_loss=True).summary
    assert summary.startswith("likely concept drift: the accuracy of the last ")
    assert "the model's scores promise 0.93" in summary


def test_one_answer_without_a_score_skips_the_certainty_test() -> None:
    state = DegradationState("sha256:a")
    losses = [LabelledLoss(1.0, None if i % 20 == 0 else 0.05) for i in range(100)]
    assert degradation.add_losses(state, losses, PromisedAccuracy(), binary_loss=True) == []


def test_growing_errors_of_numbers_are_reported() -> None:
    random, state = np.random.default_rng(4), DegradationState("sha256:a")
    assert run(np.abs(random.normal(0, 1, 600)), state, shares=False) == []
    events = run(np.abs(random.normal(0, 1.8, 300)), state, shares=False)
    assert [item.kind for item in events] == [DECAY]
    assert degradation.build_alert(events[0], binary_loss=False).summary.startswith("the error grew: ")


def test_it_does_not_matter_how_labels_are_cut_into_messages() -> None:
    losses = np.concatenate([wrong(300, 0.1), wrong(300, 0.4, 1)])
    whole, parts = DegradationState("sha256:a"), DegradationState("sha256:a")
    events = run(losses, whole)
    pieces = [item for i in range(0, 600, 7) for item in run(losses[i : i + 7], parts, first_row=i + 1)]
    assert events == pieces
    assert whole.to_bytes() == parts.to_bytes()


def test_state_survives_serialisation_and_stays_small() -> None:
    state = DegradationState("sha256:a")
    run(wrong(5000, 0.3), state, PromisedAccuracy(0.9, 100), 0.1)
    assert DegradationState.from_bytes(state.to_bytes()) == state
    assert len(state.to_bytes()) < 4000


def test_damaged_state_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        DegradationState.from_bytes(b"\x00{")


def redone(
    state: DegradationState, losses: Any, whole: bool = True, promise: PromisedAccuracy | None = None
) -> list[DegradationEvent]:
    given = [LabelledLoss(float(loss), None, row, row * 1_000_000) for row, loss in enumerate(losses, 1)]
    return degradation.recompute(state, given, promise or PromisedAccuracy(), binary_loss=True, complete=whole)


@given(
    st.lists(st.booleans(), min_size=1, max_size=700),
    st.lists(st.booleans(), min_size=700, max_size=700),
    st.integers(0, 700),
)
def test_corrected_labels_leave_the_state_of_labels_right_from_the_start(
    right: list[bool], mask: list[bool], wrong_from: int
) -> None:
    first = [item or (flip and i >= wrong_from) for i, (item, flip) in enumerate(zip(right, mask, strict=False))]
    state, wanted = DegradationState("sha256:a"), DegradationState("sha256:a")
    run(first, state, PromisedAccuracy(0.9, 500))
    run(right, wanted, PromisedAccuracy(0.9, 500))
    redone(state, right, promise=PromisedAccuracy(0.9, 500))
    for item in (state, wanted):
        for track in item.tracks.values():
            track.raised_count = 0
    assert state == wanted


def test_correcting_labels_clears_the_alert_and_the_next_has_a_new_id() -> None:
    state = DegradationState("sha256:a")
    [raised] = run(wrong(150, 0.6), state, PromisedAccuracy(0.9, 500))
    [cleared] = redone(state, wrong(150, 0.05), promise=PromisedAccuracy(0.9, 500))
    expected = [degradation.build_alert(item, binary_loss=True) for item in (raised, cleared)]
    assert [item.state for item in expected] == ["raised", "cleared"]
    assert expected[0].id == expected[1].id
    assert expected[1].summary.startswith("labels were corrected; a new test of all 150 raises no alert against ")
    [again] = redone(state, wrong(150, 0.6), promise=PromisedAccuracy(0.9, 500))
    assert (again.state, again.count) == ("raised", 2)


def test_an_alert_that_right_labels_raise_too_stays_as_it_is() -> None:
    state, losses = DegradationState("sha256:a"), wrong(150, 0.6)
    run(losses, state, PromisedAccuracy(0.9, 500))
    losses[0] = not losses[0]
    assert redone(state, losses, promise=PromisedAccuracy(0.9, 500)) == []
    assert state.tracks[EVALUATION].is_open


def test_the_baseline_stays_without_the_first_labels() -> None:
    state = DegradationState("sha256:a")
    run(wrong(500, 0.1), state)
    before = (state.baseline_n, state.baseline_loss_sum, state.baseline_square_sum)
    redone(state, wrong(300, 0.3, 2), whole=False)
    assert (state.baseline_n, state.baseline_loss_sum, state.baseline_square_sum) == before
    assert state.tracks[DECAY].is_open


def test_labels_by_the_model_itself_raise_one_alert_above_a_fifth_and_clear_it_at_a_tenth() -> None:
    state = DegradationState("sha256:a")
    assert degradation.check_feedback(state, 0, 0) is None
    assert degradation.check_feedback(state, 20, 100) is None
    raised = degradation.check_feedback(state, 21, 100)
    assert raised is not None
    assert (raised.subject, raised.state) == ("labels", "raised")
    assert raised.summary.startswith("21% of the last 100 labels are the model's own answers")
    assert raised.evidence == {"own": 21, "n": 100}
    for own in (100, 20, 11):
        assert degradation.check_feedback(state, own, 100) is None
    cleared = degradation.check_feedback(state, 10, 100)
    assert cleared is not None
    assert (cleared.state, cleared.id) == ("cleared", raised.id)
    assert degradation.check_feedback(state, 20, 100) is None
    again = degradation.check_feedback(state, 21, 100)
    assert again is not None
    assert again.id != raised.id


def test_a_corrected_label_clears_no_alert_where_only_few_labels_are_left() -> None:
    state = DegradationState("sha256:a")
    assert DECAY in {event.kind for event in run(np.concatenate([wrong(300, 0.05), wrong(300, 0.5, 1)]), state)}
    baseline, number = state.baseline_loss_sum, state.tracks[DECAY].raised_count
    half = [row % 2 for row in range(20)]
    assert redone(state, half, whole=False) == []
    assert redone(state, [], whole=False) == []
    assert redone(state, [0] * 20, whole=False) == [], "too few to tell"
    assert state.tracks[DECAY].is_open
    [cleared] = redone(state, [0] * 300, whole=False)
    assert (cleared.kind, cleared.state, cleared.count) == (DECAY, "cleared", number)
    assert (state.tracks[DECAY].is_open, state.baseline_loss_sum) == (False, baseline)
    [again] = redone(state, wrong(300, 0.6), whole=False)
    assert (again.state, again.count) == ("raised", number + 1)
