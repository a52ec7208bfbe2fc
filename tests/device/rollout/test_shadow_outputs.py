"""Further outputs and expected errors of two bundles, compared on a device and judged by the rules of a roll-out."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.bootstrap.assembly import assemble_task
from outstation.device.rollout import shadow
from outstation.device.rollout.shadow import REPORT_INTERVAL_S, ShadowRunner
from outstation.device.rollout.shadow_windows import EstimateBasis, select_estimate_bases
from outstation.device.store import predictions
from outstation.device.store.predictions import output_key, shadow_key
from outstation.foundation.clock import ClockReading
from outstation.ml.comparison import rules
from outstation.ml.comparison.tally import ComparisonStats, join_part
from outstation.ml.drift.baseline import window_statistics
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import scores
from outstation.ml.performance.labels import Label
from outstation.protocol.wire.desired_state import CanaryRules, OutputLimits
from outstation.protocol.wire.messages import ShadowPayload
from outstation.workbench.authoring import error_training
from scripts.kit.bundles import REGRESS, activated
from tests.kit import multi_output_device
from tests.kit.devices import NOW, Device
from tests.kit.shadow_devices import Recorder


def make_runner(device: Device, other: Bundle) -> ShadowRunner:
    """Return the shadow evaluation of another bundle with the same model, in this process."""
    task = assemble_task(
        TaskPlan.from_bundle(
            *("tiny", device.task.config, device.stream, replace(other, digest="sha256:other")),
            *(device.active.model, "sha256:c"),
        ),
        joined_streams=device.joined_streams,
    )
    return ShadowRunner(device.task, task, "better", device.store, 1)


def submit(device: Device, runner: ShadowRunner, seed: int = 3, count: int = 400) -> None:
    observed: list[Any] = []
    device.task.attach(Recorder(observed))
    multi_output_device.feed(device, seed, count)
    for batch, answers in observed:
        runner.submit_batch(device.store, batch, answers)


def report(device: Device, runner: ShadowRunner, at_s: float = 100.0) -> list[ShadowPayload]:
    while runner.tick(device.store, device.author, ClockReading(NOW.wall_us, at_s, "synced")):
        at_s += 1 + REPORT_INTERVAL_S
    return [message.body for message in device.messages() if isinstance(message.body, ShadowPayload)]


def break_wear(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Add to the wear that the other bundle answers, and turn its flags over."""

    def worse(*arguments: Any) -> Any:
        scored = scores.from_outputs(*arguments)
        wear, flags = scored.outputs["wear"], scored.outputs["flags"]
        assert wear.value is not None
        assert flags.predicted is not None
        changed = {"wear": replace(wear, value=wear.value + by), "flags": replace(flags, predicted=~flags.predicted)}
        return replace(scored, outputs={**scored.outputs, **changed})

    monkeypatch.setattr(shadow, "scores", SimpleNamespace(from_outputs=worse))


def label_results(device: Device, output: str, error: float) -> None:
    """Label each result of an output with the answer of the active bundle plus an error."""
    key = output_key("tiny", output)
    with device.store.transaction() as tx:
        for batch in device.store.query(predictions.load_newest_predictions, key, 100)[::-1]:
            for row in batch.row.tolist():
                answer = tx.labels.find_by_row(key, row)
                assert answer is not None
                assert answer.value is not None
                text = str(answer.value + error)
                tx.labels.store_label(key, Label(row, None, text, "human", "eva"), answer, NOW.wall_us)


def test_equal_bundles_agree_in_each_output(outputs_device: Device, packed: Bundle) -> None:
    runner = make_runner(outputs_device, packed)
    submit(outputs_device, runner)
    stats = runner.stats
    assert set(stats.outputs) == {"flags", "wear"}
    flags, wear = stats.outputs["flags"], stats.outputs["wear"]
    assert (flags.n, flags.agreeing, flags.error) == (stats.n, stats.n, "")
    assert (wear.n, wear.agreeing, wear.difference.n, wear.difference.m2) == (stats.n, None, stats.n, 0.0)
    assert (flags.batches, wear.batches) == (0, 0)
    (message,) = report(outputs_device, runner)
    assert ComparisonStats.from_message(message) == runner.state.blocks[-1]


def test_outputs_beyond_the_largest_message_follow_in_messages_of_their_own(
    outputs_device: Device, packed: Bundle
) -> None:
    outputs_device.author.max_bytes = 2_000
    runner = make_runner(outputs_device, packed)
    submit(outputs_device, runner)
    sent = report(outputs_device, runner)
    assert [sorted(message.outputs) for message in sent] == [[], ["flags"], ["wear"]]
    assert all(len(each.payload) <= 2_000 for each in outputs_device.store.unacknowledged_messages(0, 1000))
    (block,) = runner.state.blocks
    assert sum(map(ComparisonStats.from_message, sent), ComparisonStats()) == block
    # A collector judges one block, in whichever order the messages arrive.
    for order in permutations(sent):
        joined: list[ShadowPayload] = []
        for message in order:
            join_part(joined, message)
        assert [ComparisonStats.from_message(message) for message in joined] == [block]


def test_a_worse_second_output_fails_a_rule(
    outputs_device: Device, packed: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(outputs_device, packed)
    break_wear(monkeypatch, 10.0)
    for seed in range(12):
        submit(outputs_device, runner, seed, 120)
        label_results(outputs_device, "wear", 0.5)
        report(outputs_device, runner, 100.0 + 1000 * seed)
    results = {result.name: result for result in rules.evaluate_rules(CanaryRules(), runner.blocks, True)}
    assert results["wear/labels"].state == "failed"
    assert results["wear/labels"].summary.startswith("Output wear: Mean absolute error by labels")
    assert results["estimated_accuracy"].state == "passed"
    limits = CanaryRules(min_agreement=0.9)
    states = {result.name: result.state for result in rules.evaluate_rules(limits, runner.blocks, True)}
    assert (states["agreement"], states["flags/agreement"]) == ("passed", "failed")
    assert "wear/agreement" not in states, "numbers neither agree nor differ"
    limits = CanaryRules(outputs={"wear": OutputLimits(ignore=True)})
    assert "wear/labels" not in {r.name for r in rules.evaluate_rules(limits, runner.blocks, True)}


def test_labels_of_a_further_output_count_once(outputs_device: Device, packed: Bundle) -> None:
    runner = make_runner(outputs_device, packed)
    submit(outputs_device, runner)
    label_results(outputs_device, "wear", 0.5)
    messages = report(outputs_device, runner, 100.0 + REPORT_INTERVAL_S)
    n = sum(message.outputs["wear"].stats.abs_error.n for message in messages if "wear" in message.outputs)
    span = outputs_device.store.query(predictions.load_span, shadow_key("tiny", "wear"))
    assert span is not None
    assert n == outputs_device.store.query(predictions.count_predictions, output_key("tiny", "wear"), 1, span.last)
    errors = [m.outputs["wear"].other_stats.abs_error for m in messages if "wear" in m.outputs]
    assert [round(error.mean, 3) for error in errors if error.n] == [0.5] * sum(error.n > 0 for error in errors)
    restarted = make_runner(outputs_device, packed)
    assert restarted.state.last_labels == runner.state.last_labels
    assert len(report(outputs_device, restarted, 9_000.0)) == len(messages), "no label counts again after a restart"


def test_an_output_that_the_other_bundle_dropped_is_undecided(
    outputs_device: Device, packed: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(outputs_device, packed)

    def drop(answers: Any, _: Any, inputs: Any) -> Any:
        return replace(scores.from_outputs(answers, packed.manifest, inputs), outputs={})

    monkeypatch.setattr(shadow, "scores", SimpleNamespace(from_outputs=drop))
    manifest = msgspec.structs.replace(packed.manifest, outputs=msgspec.UNSET)
    bundle = replace(runner.other.bundle, manifest=manifest)
    runner.other = msgspec.structs.replace(runner.other, bundle=bundle)
    submit(outputs_device, runner)
    report(outputs_device, runner)
    limits = CanaryRules(min_agreement=0.9)
    results = {result.name: result for result in rules.evaluate_rules(limits, runner.blocks, True)}
    assert (results["wear/agreement"].state, results["flags/agreement"].state) == ("undecided", "undecided")
    assert "only one of the two bundles has this output" in results["wear/agreement"].summary
    swapped = {result.name for result in rules.evaluate_rules(limits, runner.blocks, False)}
    assert not any("/" in name for name in swapped), "nothing compares with an output that only the new bundle has"


def test_predictions_of_a_dropped_shadow_output_expire(outputs_device: Device, packed: Bundle) -> None:
    submit(outputs_device, runner := make_runner(outputs_device, packed))
    report(outputs_device, runner)
    listed = outputs_device.store.query(predictions.list_stored_outputs, shadow_key("tiny"))
    assert listed == ["", "flags", "wear"]
    assert outputs_device.store.query(predictions.list_stored_outputs, "tiny") == ["", "flags", "wear"]


def with_errors(loaded: LoadedBundle, size: float) -> LoadedBundle:
    """Return the bundle with held-out errors of this size, twice as large where the first field is above 0."""
    random, reference = np.random.default_rng(1), loaded.reference
    assert reference is not None
    rows = REGRESS.rows(4000, seed=2)
    starts = np.arange(len(rows), dtype=np.int64)
    statistics = window_statistics.compute_statistics(rows, starts, reference.window_rows, reference.floor).values
    errors = size * random.normal(size=len(rows)) * np.where(rows[:, 0] > 0, 2.0, 1.0)
    trained = error_training.train(statistics, random.normal(size=len(rows)), errors)
    changed = replace(reference, error=trained)
    files = {**loaded.bundle.files, "reference.json": changed.to_json()}
    digest = f"sha256:{str(size).replace('.', '') * 64}"[:71]
    return replace(loaded, reference=changed, bundle=replace(loaded.bundle, files=files, digest=digest))


def test_an_output_with_held_out_errors_of_one_bundle_alone_has_no_expected_error() -> None:
    loaded = activated(REGRESS)
    ours, theirs = with_errors(loaded, 1.0).reference, with_errors(loaded, 1.5).reference
    rows, starts = REGRESS.rows(50), np.arange(20, dtype=np.int64)
    answers = scores.Scores(None, None, np.zeros(20))
    shared, _ = select_estimate_bases([ours, theirs])
    assert [*shared.expect_errors(rows, starts, answers)] == [""]
    # Another output has errors in both bundles; this one in the first alone.
    alone = EstimateBasis({}, ours, frozenset({"wear"}))
    assert alone.expect_errors(rows, starts, answers) == {}


def test_expected_errors_of_both_bundles_accompany_the_measured_ones(tmp_path: Path) -> None:
    loaded = activated(REGRESS)
    device = Device(tmp_path / "store", REGRESS, with_errors(loaded, 1.0))
    other = assemble_task(
        TaskPlan.from_bundle(
            *("tiny", device.task.config, device.stream, with_errors(loaded, 1.5).bundle),
            *(device.active.model, "sha256:c"),
        )
    )
    runner = ShadowRunner(device.task, other, "better", device.store, 1)
    observed: list[Any] = []
    device.task.attach(Recorder(observed))
    for seed in range(12):
        device.feed(REGRESS.rows(100, seed=seed))
        device.run_all()
        for batch, answers in observed:
            runner.submit_batch(device.store, batch, answers)
        observed.clear()
        label_results(device, "", 0.5)
        report(device, runner, 100.0 + 1000 * seed)
    stats = sum(runner.state.blocks, ComparisonStats())
    ours, theirs = stats.model.expected_error, stats.other.expected_error
    assert ours.n == theirs.n == stats.n == 1200
    assert 0.7 < ours.mean < 1.8
    assert theirs.mean == pytest.approx(1.5 * ours.mean, rel=0.1)
    (result,) = (r for r in rules.evaluate_rules(CanaryRules(), runner.blocks, True) if r.rule == "labels")
    assert result.state == "passed", "the expected errors decide nothing"
    expected = f"Expected without labels: {theirs.mean:.4g}, of the previous bundle {ours.mean:.4g}, ratio 1."
    assert expected in result.summary
    device.store.close()
