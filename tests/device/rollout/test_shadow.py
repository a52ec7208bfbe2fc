"""Another bundle beside a task's own: compared on the same windows, after the commit, whatever it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from msgspec.structs import replace as changed

from outstation.device.rollout.shadow import REPORT_INTERVAL_S, ShadowRunner
from outstation.device.store import predictions
from outstation.device.store.message_log import MessageLog
from outstation.foundation.errors import ModelProcessFailed, StorageFull
from outstation.ml.comparison import rules, tally
from outstation.ml.model.bundle import manifest
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.tuning import Tuning
from outstation.ml.performance.labels import Label
from outstation.protocol.wire.desired_state import CanaryRules
from outstation.workbench.testing.patience import wait_until
from scripts.kit.bundles import ANOMALY, CLASSIFY, REGRESS, Recipe, activated, around, model
from tests.kit.devices import NOW
from tests.kit.marks import crashing
from tests.kit.shadow_devices import ShadowDevice

CALM = np.clip(CLASSIFY.rows(400), -3, 3)


Make = Callable[..., ShadowDevice]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[ShadowDevice] = []

    def new(other: Bundle, recipe: Recipe = CLASSIFY, **options: Any) -> ShadowDevice:
        made.append(ShadowDevice(tmp_path / str(len(made)), recipe, activated(recipe), other, **options))
        return made[-1]

    yield new
    for pair in made:
        pair.close()


def named(content: Bundle, digest: str) -> Bundle:
    return replace(content, digest=f"sha256:{digest * 64}"[:71])


def good(name: str = "classify_float32", recipe: Recipe = CLASSIFY) -> Bundle:
    return named(around(model(name), recipe), "b")


# --- what is said ---


def test_a_message_has_agreement_time_and_scores_of_both_bundles(make: Make) -> None:
    pair = make(good())
    answers = pair.batch(CALM[:200])
    (message,) = pair.shadows()
    assert answers is not None
    float_model = runtime.load_model(pair.other.manifest, pair.other.model_bytes).invoke(CALM[:200])
    assert answers.scores.label is not None
    alike = int(np.equal(answers.scores.label, float_model.argmax(axis=1)).sum())
    assert (message.n, message.agreeing, message.batches, message.errors) == (200, alike, 1, 0)
    assert message.rows == (1, 200)
    assert (message.rollout, message.model.digest, message.other.digest) == (
        "better",
        pair.device.task.bundle.digest,
        pair.other.digest,
    )
    assert message.stats.windows == message.other_stats.windows == 200
    assert message.stats.seconds > 0
    assert message.other_stats.seconds > 0
    assert 0.5 < message.stats.scores.mean <= 1
    # Neither has a table of how often its scores are right: they are taken at their word.
    assert message.other_stats.expected_accuracy == message.other_stats.scores
    assert message.difference.n == 200


def test_results_are_committed_before_the_shadow_gets_the_batch(make: Make) -> None:
    pair = make(good())
    pair.device.feed(CALM[:50])
    pair.device.run()
    assert pair.device.store.cursor("tiny") == 50
    assert pair.runner.stats.batches == 0


def test_messages_add_up_to_everything_compared(make: Make) -> None:
    pair = make(good())
    for start in range(0, 400, 50):
        pair.batch(CALM[start : start + 50])
    messages = pair.shadows()
    assert [entry.rows for entry in messages] == [(start + 1, start + 50) for start in range(0, 400, 50)]
    assert sum(entry.n for entry in messages) == 400
    assert [block.stats.n for block in pair.runner.blocks] == [50] * 8


def test_few_batches_are_reported_after_some_minutes(make: Make) -> None:
    pair = make(good(), min_batches=240)
    pair.batch(CALM[:50])
    assert pair.shadows() == []
    assert not pair.turn(100.0 + REPORT_INTERVAL_S - 1)
    assert pair.turn(100.0 + REPORT_INTERVAL_S)
    assert [message.n for message in pair.shadows()] == [50]
    assert not pair.turn(100.0 + 3 * REPORT_INTERVAL_S), "nothing was compared since"


def test_neighbouring_blocks_are_merged_without_loss(make: Make) -> None:
    pair = make(good())
    for _ in range(70):
        pair.batch(CALM[:8])
        pair.runner._last_report_s = 0.0
        pair.turn(100.0 + REPORT_INTERVAL_S)
    assert len(pair.runner.blocks) <= 64
    assert sum(block.stats.n for block in pair.runner.blocks) == 70 * 8


def test_windows_of_different_lengths_match_by_their_last_row(make: Make) -> None:
    # The task's windows: 8 rows, 4 between; the other one looks at one row at a time, of one field more.
    other = good("sums_float32", replace(CLASSIFY, fields=("u", "v", "extra", "w")))
    spec = changed(other.manifest.input, fields=["u", "v"], window=manifest.WindowSpec(rows=2, step=2))
    head = changed(other.manifest, kind="classify", input=spec)
    pair = make(replace(other, manifest=head), ANOMALY)
    pair.batch(ANOMALY.rows(50))
    (message,) = pair.shadows()
    assert (message.n, message.agreeing) == (11, None)
    assert message.error.startswith("one bundle answers as anomaly, the other as classify")
    assert message.other_stats.windows == 11


def test_longer_windows_reach_back_before_the_batch_but_not_over_a_gap(make: Make) -> None:
    other = good("sums_float32", CLASSIFY)
    spec = changed(other.manifest.input, fields=["c"], window=manifest.WindowSpec(rows=4, step=4, max_gap_s=1.0))
    pair = make(replace(other, manifest=changed(other.manifest, input=spec)), CLASSIFY)
    pair.batch(CALM[:10])
    pair.batch(CALM[10:20])
    assert [message.n for message in pair.shadows()] == [7, 10]
    pair.device.fed += 5_000_000
    pair.batch(CALM[20:30])
    assert pair.shadows()[-1].n == 7


def test_numeric_predictions_have_a_difference(make: Make) -> None:
    pair = make(good("regress_int8", REGRESS), REGRESS)
    pair.batch(REGRESS.rows(60))
    (message,) = pair.shadows()
    assert (message.n, message.agreeing, message.difference.n, message.difference.mean) == (60, None, 60, 0.0)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=6))
def test_equal_bundles_agree_in_every_window(make: Make, pieces: list[tuple[int, bool]]) -> None:
    pair = make(named(activated(ANOMALY).bundle, "d"), ANOMALY)
    values = ANOMALY.rows(sum(rows for rows, _ in pieces))
    at = windows = 0
    for rows, pause in pieces:
        pair.device.fed += 5_000_000 if pause else 0
        answers = pair.batch(values[at : at + rows])
        windows += 0 if answers is None else len(answers.cut.starts)
        at += rows
    stats = sum((tally.ComparisonStats.from_message(message) for message in pair.shadows()), tally.ComparisonStats())
    assert (stats.n, stats.agreeing or 0, stats.model.windows, stats.other.windows) == (windows,) * 4
    assert (stats.difference.mean, stats.difference.m2) == (0.0, 0.0)


# --- what the other one does ---


def wild(at: int = 3) -> np.ndarray:
    values = CALM[:20].copy()
    values[at, 1] = 3.9
    return values


@crashing
def test_a_shadow_crash_is_counted_and_later_batches_are_compared(make: Make) -> None:
    pair = make(good("rigged_crash"))
    pair.batch(CALM[:20])
    pair.batch(wild())
    wait_until("it started anew", lambda: pair.model.poll_ready())
    pair.batch(CALM[20:40])
    messages = pair.shadows()
    assert [(entry.errors, entry.n) for entry in messages] == [(0, 20), (1, 0), (0, 20)]
    assert "SIGFPE" in messages[1].error
    assert messages[1].rows == (21, 40)
    assert sum(entry.n for entry in pair.device.results()) == 60, "no result is missing"
    verdicts = rules.evaluate_rules(CanaryRules(), pair.runner.blocks, True)
    assert [(entry.rule, entry.state) for entry in verdicts if entry.rule == "error_rate"] == [("error_rate", "failed")]


def test_a_shadow_hang_delays_no_batch_and_is_counted(make: Make) -> None:
    pair = make(good("rigged_hang"), call_timeout_s=1.5)
    began = time.monotonic()
    pair.batch(wild(), wait=False)
    for start in range(40, 100, 20):
        pair.batch(CALM[start : start + 20], wait=False)
    assert pair.device.store.cursor("tiny") == 80
    assert time.monotonic() - began < 20
    wait_until("it is ended", lambda: pair.runner.poll(0.1))
    pair.turn()
    assert [(message.errors, message.n) for message in pair.shadows()] == [(1, 0)]
    assert "did not answer within 1.5 s" in pair.shadows()[0].error


def test_any_other_shadow_error_is_counted(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pair = make(good())
    pair.runner.other = msgspec.structs.replace(pair.runner.other, input_columns=[99])
    pair.batch(CALM[:20], wait=False)
    assert [(message.errors, message.n) for message in pair.shadows()] == [(1, 0)]
    assert "shadow tiny" in caplog.text


def test_the_old_bundle_in_this_process_can_be_the_shadow(make: Make) -> None:
    pair = make(good())
    old, new = pair.device.task, pair.task
    pair.device.task = new
    pair.runner = ShadowRunner(new, old, "better", pair.device.store, 1)
    pair.batch(CALM[:100])
    (reported,) = pair.shadows()
    assert (reported.model.digest, reported.other.digest) == (new.bundle.digest, old.bundle.digest)
    assert reported.n == 100
    assert reported.stats.seconds > 0
    assert {message.model.digest for message in pair.device.results()} == {new.bundle.digest}


def test_a_shadow_in_this_process_gets_one_second_of_windows(make: Make) -> None:
    pair = make(good())
    new, tuning = pair.task, Tuning("", "", "", 32, 1, rows_per_s=30.0)
    old = msgspec.structs.replace(pair.device.task, tuning=tuning)
    pair.device.task = new
    pair.runner = ShadowRunner(new, old, "better", pair.device.store, 1)
    pair.batch(CALM[:100])
    (message,) = pair.shadows()
    assert (message.n, message.stats.windows, message.other_stats.windows) == (30, 100, 30)


# --- kill, and once more ---


def test_a_kill_loses_only_unreported_statistics(make: Make) -> None:
    pair = make(good(), min_batches=24)
    for start in range(0, 60, 20):
        pair.batch(CALM[start : start + 20])
    assert [message.batches for message in pair.shadows()] == [2]
    pair.device.restart()
    pair.runner = pair.begin()
    assert [block.stats.n for block in pair.runner.blocks] == [40]
    for start in range(60, 100, 20):
        pair.batch(CALM[start : start + 20])
    assert [message.rows for message in pair.shadows()] == [(1, 40), (61, 100)]
    assert sum(block.stats.n for block in pair.runner.blocks) == 80


def test_repeated_rows_are_not_counted_again(make: Make) -> None:
    pair = make(good())
    pair.batch(CALM[:40])
    pair.device.restart()
    pair.runner = pair.begin()
    pair.runner.submit_batch(pair.device.store, *pair.observed[0])
    assert pair.runner.poll()
    assert pair.runner.stats == tally.ComparisonStats()
    assert not pair.turn(100.0 + REPORT_INTERVAL_S)
    assert [message.rows for message in pair.shadows()] == [(1, 40)]


def test_an_answer_to_an_earlier_request_is_dropped(make: Make) -> None:
    pair = make(good())
    pair.model.submit(CALM[:5])
    pair.batch(CALM[:40])
    assert [(message.n, message.other_stats.windows) for message in pair.shadows()] == [(40, 40)]


def test_another_tasks_batch_in_the_shared_process_costs_no_comparison(make: Make) -> None:
    pair = make(good())
    pair.runner._poll = lambda timeout_s: None  # type: ignore[method-assign]  # its answer comes after the batch
    pair.batch(CALM[:40], wait=False)
    pair.model.invoke(np.flip(CALM[:30], 0))
    # A second canary's request is pending when the first one's runner polls.
    other = pair.model.submit(CALM[100:107])
    del pair.runner._poll
    assert pair.runner.poll()
    pair.turn()
    (message,) = pair.shadows()
    assert (message.n, message.errors, message.other_stats.windows) == (40, 0, 40)
    assert message.agreeing == _count_agreeing(pair, CALM[:40])
    wait_until("it answered the other request", lambda: pair.model.poll(other) is not None)


def _count_agreeing(pair: ShadowDevice, rows: np.ndarray) -> int:
    here = runtime.load_model(pair.other.manifest, pair.other.model_bytes).invoke(rows).argmax(axis=1)
    (result,) = [answers.scores.label for _, answers in pair.observed]
    assert result is not None
    return int(np.equal(result, here).sum())


def test_another_roll_out_starts_a_new_comparison(make: Make) -> None:
    pair = make(good())
    pair.batch(CALM[:40])
    again = ShadowRunner(pair.device.task, pair.task, "another", pair.device.store)
    assert again.blocks == []


def test_the_rest_is_reported_at_the_end(make: Make) -> None:
    pair = make(good(), min_batches=240)
    pair.batch(CALM[:40])
    assert pair.runner.finish(pair.device.store, pair.device.author, NOW)
    assert [message.n for message in pair.shadows()] == [40]
    assert not pair.runner.finish(pair.device.store, pair.device.author, NOW)


def test_a_message_waits_for_room_and_loses_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make(good())

    def full(*_: Any, **__: Any) -> int:
        raise StorageFull("no room")

    with monkeypatch.context() as patched:
        patched.setattr(MessageLog, "append", full)
        pair.runner.stats = tally.from_failure("something")
        assert not pair.turn(100.0)
    pair.batch(CALM[:20], at_s=110.0)
    assert pair.shadows() == [], "it rests for a minute"
    assert pair.turn(161.0)
    assert [(message.errors, message.n) for message in pair.shadows()] == [(1, 20)]


# --- labels ---


def label(pair: ShadowDevice, rows: range, texts: list[str], source: str = "human", by: str = "eva") -> None:
    with pair.device.store.transaction() as tx:
        for row, text in zip(rows, texts, strict=True):
            result = tx.labels.find_by_row("tiny", row)
            assert result is not None
            tx.labels.store_label("tiny", Label(row, None, text, source, by), result, NOW.wall_us)


def test_each_label_counts_once(make: Make) -> None:
    pair = make(good("rigged_sensitive"))
    values = CALM[:42].copy()
    values[[30, 32, 34], 0] = 3.9
    answers = pair.batch(values)
    assert answers is not None
    assert answers.scores.label is not None
    mine = [CLASSIFY.labels[i] for i in answers.scores.label]
    label(pair, range(1, 43), mine)
    assert pair.turn(100.0 + REPORT_INTERVAL_S)
    result = pair.shadows()[-1]
    assert not pair.turn(101.0 + REPORT_INTERVAL_S), "all labels are told of"
    theirs = runtime.load_model(pair.other.manifest, pair.other.model_bytes).invoke(values).argmax(axis=1)
    same = int((theirs == answers.scores.label).sum())
    assert same < 42
    assert result.labelled == (same, 42 - same, 0, 0)
    assert (result.stats.correct, result.other_stats.correct) == (42, same)
    assert (result.batches, result.n) == (0, 0)
    label(pair, range(1, 2), ["rest" if mine[0] != "rest" else "left"])
    pair.turn(100.0 + 2 * REPORT_INTERVAL_S)
    assert sum(sum(message.labelled) for message in pair.shadows()) == 42, "a corrected label counts as it came first"


def test_many_labels_at_once_make_several_blocks(make: Make) -> None:
    pair = make(good("rigged_sensitive"))
    values = CALM.copy()
    values[::4, 0] = 3.9
    answers = pair.batch(values)
    assert answers is not None
    label(pair, range(1, 401), ["right"] * 400)
    pair.batch(CALM)
    label(pair, range(401, 601), ["right"] * 200)
    at_s = 100.0 + REPORT_INTERVAL_S
    while pair.turn(at_s):
        at_s += 1
    blocks = [block for block in pair.runner.blocks if sum(block.stats.labelled)]
    assert [sum(block.stats.labelled) for block in blocks] == [50] * 12
    result = {
        verdict.rule: verdict
        for verdict in rules.evaluate_rules(CanaryRules(max_accuracy_drop=0.0), pair.runner.blocks, True)
    }
    assert result["labels"].numbers["n"] == 600


def test_labels_from_the_model_itself_do_not_count(make: Make) -> None:
    pair = make(good())
    pair.batch(CALM[:20])
    label(pair, range(1, 21), ["left"] * 20, source="model")
    pair.turn(100.0 + REPORT_INTERVAL_S)
    assert sum(sum(message.labelled) for message in pair.shadows()) == 0


@pytest.mark.attack("operators")
@pytest.mark.parametrize("source", ["human", "system"])
def test_a_socket_client_cannot_roll_a_bundle_back_with_labels(make: Make, source: str) -> None:
    pair = make(good("rigged_sensitive"))
    pair.batch(CALM)
    label(pair, range(1, 401), ["right"] * 400, source, by="")
    at_s = 100.0 + REPORT_INTERVAL_S
    while pair.turn(at_s):
        at_s += 1
    assert sum(sum(message.labelled) for message in pair.shadows()) == 0
    limits = CanaryRules(max_accuracy_drop=0.0)
    assert "labels" not in {result.rule for result in rules.evaluate_rules(limits, pair.runner.blocks, True)}


@pytest.mark.attack("operators", control=True)
def test_labels_of_an_author_do_roll_a_bundle_back(make: Make) -> None:
    pair = make(good("rigged_sensitive"))
    values = CALM.copy()
    values[::4, 0] = 3.9
    pair.batch(values)
    label(pair, range(1, 401), ["right"] * 400)
    at_s = 100.0 + REPORT_INTERVAL_S
    while pair.turn(at_s):
        at_s += 1
    limits = CanaryRules(max_accuracy_drop=0.0)
    assert "labels" in {result.rule for result in rules.evaluate_rules(limits, pair.runner.blocks, True)}


@pytest.mark.attack("operators")
def test_a_socket_client_that_labels_first_does_not_keep_the_operator_from_deciding(make: Make) -> None:
    pair = make(good())
    pair.batch(CALM[:100])
    label(pair, range(1, 101), ["right"] * 100, by="")
    pair.turn(100.0 + REPORT_INTERVAL_S)
    label(pair, range(1, 101), ["left"] * 100, by="eva")
    pair.turn(100.0 + 2 * REPORT_INTERVAL_S)
    pair.turn(100.0 + 3 * REPORT_INTERVAL_S)
    assert sum(sum(message.labelled) for message in pair.shadows()) == 100


def test_verdicts_do_not_decide_between_bundles(make: Make) -> None:
    pair = make(good())
    pair.batch(CALM[:20])
    label(pair, range(1, 21), ["left"] * 20, source="verdict")
    pair.turn(100.0 + REPORT_INTERVAL_S)
    assert sum(sum(message.labelled) for message in pair.shadows()) == 0


def test_numeric_labels_give_absolute_errors(make: Make) -> None:
    pair = make(good("regress_int8", REGRESS), REGRESS)
    answers = pair.batch(REGRESS.rows(30))
    assert answers is not None
    assert answers.scores.value is not None
    label(pair, range(1, 31), [str(value + 0.5) for value in answers.scores.value])
    assert pair.turn(100.0 + REPORT_INTERVAL_S)
    message = pair.shadows()[-1]
    assert (message.stats.abs_error.n, message.other_stats.abs_error.n) == (30, 30)
    assert message.stats.abs_error.mean == pytest.approx(0.5)


def test_stored_shadow_predictions_expire_like_the_tasks(make: Make) -> None:
    pair = make(good())
    pair.batch(CALM[:20])
    span = pair.device.store.query(predictions.load_span, predictions.shadow_key("tiny"))
    assert span is not None
    assert (span.first, span.last) == (1, 20)
    with pair.device.store.transaction() as tx:
        assert tx.labels.trim_predictions(predictions.shadow_key("tiny"), 1e9, 10) == 1
    assert pair.device.store.query(predictions.load_span, predictions.shadow_key("tiny")) is None


# --- serving from a process of its own ---


@crashing
def test_after_a_model_crash_another_model_runs_the_same_rows(make: Make) -> None:
    pair = make(good("rigged_crash"))
    device, old = pair.device, pair.device.task
    device.task = pair.task
    device.feed(CALM[:20])
    assert device.run() is not None
    before = len(device.messages())
    device.feed(wild())
    with pytest.raises(ModelProcessFailed, match="SIGFPE"):
        device.run()
    assert device.store.cursor("tiny") == 20
    assert len(device.messages()) == before
    assert device.task.size.divisor == 1
    device.task = old
    done = device.run()
    assert done is not None
    assert (done.rows, device.store.cursor("tiny")) == (20, 40)
    assert [(message.rows, message.model.digest) for message in device.results()] == [
        ((1, 20), pair.other.digest),
        ((21, 40), old.bundle.digest),
    ]


def test_a_subprocess_model_gives_the_same_answers(make: Make) -> None:
    pair = make(named(activated(CLASSIFY).bundle, "c"))
    pair.device.task = pair.task
    pair.device.feed(CALM)
    pair.device.run_all()
    here = activated(CLASSIFY).model.invoke(CALM).argmax(axis=1)
    output = [text for message in pair.device.results() for text in message.columns.expand_labels() or []]
    assert output == [CLASSIFY.labels[i] for i in here]
