"""Label metrics, with a real bundle, batches and store: messages verify and fit the broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec import UNSET, structs
from msgspec.structs import replace

from outstation.device import config, status
from outstation.device.batch_parts.drift_state import RestoredDrift
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.batch_parts.window_part import list_contradicted
from outstation.device.bootstrap.assembly import assemble_task
from outstation.device.intake import label_intake
from outstation.device.own_messages import OwnMessages
from outstation.device.pipeline import batch, label_metrics, labelled_output
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.recovery.open import open_store
from outstation.device.store import label_store as labelled
from outstation.device.store import task_keys
from outstation.device.store.label_store import LabelStore
from outstation.device.store.message_log import MessageLog
from outstation.device.store.predictions import StoredPredictions
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.ml.drift.monitor import DriftMonitor
from outstation.ml.drift.monitor_settings import MonitorSettings
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.performance import degradation
from outstation.ml.performance import labels as truth
from outstation.ml.performance.labels import LabelSchema
from outstation.protocol.wire import jws
from outstation.protocol.wire.messages import AlertPayload, DriftPayload, QualityPayload, ResultsPayload
from outstation.protocol.wire.privacy.field_privacy import FieldPrivacy
from outstation.protocol.wire.verification import verify_message
from outstation.workbench.testing.messages import new_key
from scripts.kit.bundles import CLASSIFY, EACH, LABELS, REGRESS, SEVERAL, VECTORS, Recipe, activated

DEVICE = new_key(1)
T0 = 1_764_000_000_000_000
KEEP_S = 7 * 86_400.0


@dataclass
class Device:
    """Device with one task over one stream, a category that alternates, and a clock that tests set."""

    folder: Path
    recipe: Recipe
    active: LoadedBundle
    max_bytes: int = 120_000
    boot_s: float = 100.0
    shift: float = 0.0  # of all values
    promised: int = 95  # of 100 answers that are right, however sure
    store: Store = field(init=False)
    task: LoadedTask = field(init=False)
    author: MessageLog = field(init=False)

    def __post_init__(self) -> None:
        fields = [config.FieldConfig(name=name) for name in self.recipe.fields]
        self.stream = config.StreamConfig(fields=[*fields, config.FieldConfig(name="site", type="category")])
        self.store = open_store(self.folder)
        self.store.declare_streams({"watch": self.stream})
        manifest, reference = self.active.bundle.manifest, self.active.reference
        assert reference is not None
        if manifest.kind == "classify":
            # As a bundle packed with a score table.
            count = np.full(32, 100)
            reference = replace(reference, score_n=count, score_correct=np.full(32, self.promised))
        judge = DriftMonitor(
            MonitorSettings(reference, labels=manifest.output.labels, window=manifest.drift.window, learn_windows=20)
        )
        chosen = config.TaskConfig(
            stream="watch", bundle="tiny", slices=["site", config.BinnedField(field="a", edges=[0.0])]
        )
        self.task_config = chosen
        self.assemble(self.active.bundle, RestoredDrift(judge, judge.start()))
        self.author = MessageLog("acme", "pi-07", DEVICE, self.store.log_id, 1, self.max_bytes)

    def assemble(self, bundle: Bundle, drift: RestoredDrift) -> None:
        plan = TaskPlan.from_bundle("tiny", self.task_config, self.stream, bundle, self.active.model, "sha256:c")
        self.task = assemble_task(plan, drift)

    @property
    def now(self) -> ClockReading:
        return ClockReading(T0 + round(self.boot_s * 1e6), self.boot_s, "synced")

    def feed(self, n: int, *, seed: int = 0, run: bool = True) -> None:
        first = self.store.last_row("watch")
        values = self.recipe.rows(first + n, seed)[first:] + np.float32(self.shift)
        t = T0 + (first + np.arange(n, dtype=np.int64)) * 10_000
        with self.store.transaction() as tx:
            codes = tx.assign_category_codes(
                "watch", "site", [f"s{(first + i) % 2}" for i in range(n)], limit=1000, last_row=0
            )[0]
            columns = [np.ascontiguousarray(column) for column in values.T]
            tx.append("watch", Rows(t, (*columns, np.array(codes, "<u2"))), "synced")
        while run and batch.run(self.task, self.store, self.author, self.now) is not None:
            pass

    def label(
        self, rows: Any, text: Callable[[int], str | float], source: str = "human", by: str = ""
    ) -> list[str | None]:
        """Return the outcome of the label of each row."""
        requested = labelled_output.build_label_targets([self.task])["tiny"]
        with self.store.transaction() as tx:
            return [
                label_intake.store_label(
                    tx, "tiny", requested, replace(truth.parse_label(row, None, text(row), source), by=by), self.now
                )
                for row in rows
            ]

    def turn(self) -> int:
        return label_metrics.tick(self.task, self.store, self.author, self.now, KEEP_S)

    def sent(self, kind: type) -> list[Any]:
        """Messages of a kind, each verified and within the broker's limit."""
        signer, collected = jws.Signer("pi-07", DEVICE.public), []
        for pending in self.store.unacknowledged_messages(0, 100_000):
            assert len(pending.payload) <= self.max_bytes
            message = verify_message(pending.topic, pending.payload, [pending.jws], lambda kid: signer)
            if isinstance(message.body, kind):
                collected.append(message.body)
        return collected

    def alerts(self) -> list[AlertPayload]:
        return [entry for entry in self.sent(AlertPayload) if entry.alert == "quality"]


Make = Callable[..., Device]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Device] = []

    def new(recipe: Recipe = CLASSIFY, **options: Any) -> Device:
        made.append(Device(tmp_path / str(len(made)), recipe, activated(recipe), **options))
        return made[-1]

    yield new
    for device in made:
        device.store.close()


def right(row: int) -> str:
    """Return the class whose centre each row was drawn around."""
    return LABELS[(row - 1) // 7 % 3]


def other(row: int) -> str:
    return LABELS[((row - 1) // 7 + 1) % 3]


def metrics(body: QualityPayload) -> dict[tuple[str, str], Any]:
    return {(entry.metric, entry.slice): entry for entry in body.metrics}


def test_fifty_labels_make_a_message_that_says_how_good_results_were(make: Make) -> None:
    device = make()
    device.feed(200)
    assert device.label(range(1, 51), right) == [None] * 50
    device.turn()
    [body] = device.sent(QualityPayload)
    result = metrics(body)
    assert result["accuracy", ""].value > 0.9
    assert result["accuracy", ""].n == 50
    assert {"f1_macro", "f1_micro", "brier_top", "ece"} <= {name for name, _ in result}
    assert {"site=s0", "site=s1", "a=below 0", "a=from 0"} <= {name for _, name in result}
    assert (body.window["rows"], body.window["n"], body.window["new"]) == ([1, 50], 50, 50)
    assert body.labels["classes"] == {"left": 21, "right": 15, "rest": 14}
    assert body.labels["imbalance"] == 1.5
    assert body.model is not None
    assert body.model.digest == device.task.bundle.digest


def test_few_labels_wait_for_more_or_for_a_day_that_the_device_was_on(make: Make) -> None:
    device = make()
    device.feed(100)
    device.label(range(1, 50), right)
    device.turn()
    device.boot_s += 86_000
    device.turn()
    assert device.sent(QualityPayload) == []
    device.boot_s += 500
    device.turn()
    assert [body.window["new"] for body in device.sent(QualityPayload)] == [49]
    device.turn()
    assert len(device.sent(QualityPayload)) == 1


def test_delay_and_coverage_are_reported(make: Make) -> None:
    device = make(boot_s=3600.0)
    device.feed(100)
    device.label(range(1, 51), right)
    device.turn()
    [body] = device.sent(QualityPayload)
    assert body.labels["delay_s"]["median"] == pytest.approx(3599.755, abs=0.01)
    assert body.labels["coverage"] == 0.5


def test_a_label_that_comes_before_its_result_is_joined_once_that_is_there(make: Make) -> None:
    device = make()
    device.feed(60, run=False)
    assert device.label(range(1, 51), right) == [None] * 50
    device.turn()
    assert device.sent(QualityPayload) == []
    device.feed(7)
    device.turn()
    [body] = device.sent(QualityPayload)
    assert body.window["n"] == 50
    assert device.store.counters()["labels early.tiny"] == 50


def test_a_label_of_a_row_that_never_arrived_is_rejected(make: Make) -> None:
    device = make()
    device.feed(60)
    assert device.label([61], right) == ["row 61 does not exist yet; the stream has 60"]


def test_a_label_the_model_does_not_know_is_rejected_with_those_it_knows(make: Make) -> None:
    device = make()
    device.feed(60)
    [reason] = device.label([1], lambda row: "up")
    assert reason == "this is no label of this model; it knows left, right, rest"


def test_labels_of_deleted_results_are_counted(make: Make) -> None:
    device = make()
    device.feed(100)
    with device.store.transaction() as tx:
        tx.labels.trim_predictions("tiny", 10**9, 100)
    device.feed(100)
    [reason] = device.label([10], right)
    assert reason == "too late: results are kept from row 101 on ([buffer] keep_results)"
    device.label(range(101, 151), right)
    device.turn()
    [body] = device.sent(QualityPayload)
    assert body.labels["late"] == 1


def test_a_second_label_of_a_row_wins_and_is_counted(make: Make) -> None:
    device = make()
    device.feed(100)
    device.label(range(1, 51), other)
    device.label(range(1, 51), right)
    device.turn()
    [body] = device.sent(QualityPayload)
    assert metrics(body)["accuracy", ""].value > 0.9
    assert body.labels["replaced"] == 50
    assert body.labels["n"] == 50


def test_labels_that_contradict_the_certainty_are_likely_concept_drift(make: Make) -> None:
    device = make()
    device.feed(400)
    device.label(range(1, 201), other)
    assert device.turn() == len(device.alerts())
    output = {entry.subject: entry for entry in device.alerts()}
    assert set(output) == {"certainty", "evaluation"}
    assert output["certainty"].summary.startswith("likely concept drift: the accuracy of the last ")
    assert "the model's scores promise 0.95" in output["certainty"].summary
    body = device.sent(QualityPayload)[-1]
    assert body.estimate["outside"] is True
    assert 0.9 < body.estimate["accuracy"] < 1


def test_an_expected_accuracy_that_labels_contradict_says_so(make: Make) -> None:
    device = make()
    device.feed(400)
    device.label(range(1, 201), other)
    device.turn()
    assert all("outside" not in body.estimate for body in device.sent(DriftPayload))
    device.feed(400)
    shifted = device.store.last_row("watch") + 1
    device.shift = 3.0
    device.feed(200)
    later = [body for body in device.sent(DriftPayload) if body.window.rows[0] > 400]
    assert later
    assert all(body.estimate["outside"] is True for body in later)
    raised = [entry for entry in device.sent(AlertPayload) if entry.alert == "drift" and "accuracy" in entry.evidence]
    assert raised, f"the readings moved from row {shifted} on"
    assert all(entry.summary.endswith(" Labels contradict this expected accuracy.") for entry in raised)

    device.label(range(401, 1001), lambda row: right(row) if row % 20 else other(row))
    device.turn()
    assert ("certainty", "cleared") in {(entry.subject, entry.state) for entry in device.alerts()}
    device.feed(100)
    assert "outside" not in device.sent(DriftPayload)[-1].estimate


def test_labels_that_are_better_than_expected_contradict_the_estimate_without_an_alert(make: Make) -> None:
    device = make(promised=60)
    device.feed(200)
    device.label(range(1, 201), lambda row: right(row) if row % 10 else other(row))
    assert device.turn() == 0
    device.feed(100)
    assert "outside" not in device.sent(DriftPayload)[0].estimate
    assert device.sent(DriftPayload)[-1].estimate["outside"] is True
    device.label(range(201, 301), lambda row: right(row) if row % 5 < 3 else other(row))
    device.label(range(1, 201), lambda row: right(row) if row % 5 < 3 else other(row))
    device.turn()
    device.feed(100)
    assert "outside" not in device.sent(DriftPayload)[-1].estimate, "six in ten are right, as expected"


def test_accuracy_that_falls_later_is_silent_decay(make: Make) -> None:
    device = make()
    device.feed(500)
    device.label(range(1, 251), right)
    device.turn()
    assert device.alerts() == []
    device.label(range(251, 401), lambda row: other(row) if row % 3 == 0 else right(row))
    device.turn()
    output = {entry.subject: entry for entry in device.alerts()}
    assert output["decay"].summary.startswith("accuracy fell: the accuracy of the last ")


def test_labels_that_are_the_models_own_answers_are_left_out_and_warned_of(make: Make) -> None:
    device = make()
    device.feed(200)
    device.label(range(1, 41), right)
    device.label(range(41, 101), other, source="model")
    device.turn()
    body = device.sent(QualityPayload)[-1]
    assert (body.window["n"], body.labels["n"]) == (40, 100)
    assert body.labels["sources"] == {"human": 40, "model": 60}
    assert metrics(body)["accuracy", ""].value > 0.9
    [alert] = device.alerts()
    assert (alert.subject, alert.state, alert.severity) == ("labels", "raised", "warning")


def test_regression_is_judged_by_its_errors(make: Make) -> None:
    device = make(REGRESS)
    device.feed(200)
    assert device.label(range(1, 61), lambda row: 0.5) == [None] * 60
    device.turn()
    [body] = device.sent(QualityPayload)
    assert {"mae", "rmse", "r2"} <= {name for name, _ in metrics(body)}
    assert body.estimate is None
    assert "classes" not in body.labels


def test_labels_of_a_model_that_says_several_are_each_judged(make: Make) -> None:
    device = make(SEVERAL)
    device.feed(200)
    assert device.label(range(1, 101), lambda row: (*EACH, "-", "damp|warm")[row % 5]) == [None] * 100
    (refused,) = device.label([101], lambda row: "warm|cold")
    assert refused is not None
    assert "this is no label of this model; it knows any of warm|damp|loud" in refused
    device.turn()
    bodies = device.sent(QualityPayload)
    result = metrics(bodies[0])
    assert {("accuracy", ""), ("f1_macro", ""), *(("f1", f"class={name}") for name in EACH)} <= set(result)
    output = device.sent(ResultsPayload)[0].columns.expand_labels()
    assert output is not None
    meant = [
        {*("warm", "damp", "loud", "-", "damp|warm")[row % 5].split("|")}
        for row in range(1, result["accuracy", ""].n + 1)
    ]
    right = [set(text.split("|")) == true for text, true in zip(output, meant, strict=False)]
    assert result["accuracy", ""].value == pytest.approx(np.mean(right))


def test_an_embedding_is_judged_as_the_anomalies_it_tells(make: Make) -> None:
    device = make(VECTORS)
    device.feed(200)
    assert device.label(range(1, 101), lambda row: "anomaly" if row % 5 == 0 else "normal") == [None] * 100
    device.turn()
    assert {"auc", "accuracy", "f1"} <= {name for name, _ in metrics(device.sent(QualityPayload)[0])}


def test_a_message_with_many_slices_fits_the_broker(make: Make) -> None:
    device = make(max_bytes=2_800)
    device.feed(200)
    device.label(range(1, 101), right)
    device.turn()
    bodies = device.sent(QualityPayload)
    assert bodies
    assert all(metrics(body)["accuracy", ""] for body in bodies)


def test_another_bundle_starts_anew(make: Make) -> None:
    device = make()
    device.feed(400)
    device.label(range(1, 201), other)
    device.turn()
    assert {entry.state for entry in device.alerts()} == {"raised"}
    bundle = replace(device.task.bundle, digest="sha256:" + "0" * 64)
    assert device.task.drift is not None
    device.assemble(bundle, device.task.drift.to_restored())
    device.feed(100)
    device.label(range(401, 451), right)
    device.turn()
    body = device.sent(QualityPayload)[-1]
    assert body.window["rows"] == [401, 450]
    cleared = [entry for entry in device.alerts() if entry.state == "cleared"]
    assert {entry.subject for entry in cleared} == {"certainty", "evaluation"}
    raised = {entry.id for entry in device.alerts() if entry.state == "raised"}
    assert {entry.id for entry in cleared} == raised


def test_a_message_that_finds_no_room_is_written_later_and_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    device = make()
    device.feed(100)
    device.label(range(1, 51), right)
    keep = Transaction.save_state

    def full(tx: Transaction, task: str, name: str, value: bytes) -> None:
        if name == task_keys.LABEL_METRICS:
            raise StorageFull("no room")
        keep(tx, task, name, value)

    monkeypatch.setattr(Transaction, "save_state", full)
    with pytest.raises(StorageFull):
        device.turn()
    assert device.sent(QualityPayload) == []
    monkeypatch.undo()
    device.turn()
    device.turn()
    assert len(device.sent(QualityPayload)) == 1


def test_a_full_store_refuses_no_task_without_labels(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    device = make()
    device.feed(100)

    def full(*_: object, **__: object) -> None:
        raise StorageFull("no room")

    monkeypatch.setattr(device.store, "transaction", full)
    device.turn()
    monkeypatch.undo()
    device.label(range(1, 51), right)
    device.turn()
    assert len(device.sent(QualityPayload)) == 1


def test_state_that_cannot_be_read_starts_anew(make: Make) -> None:
    device = make()
    device.feed(100)
    with device.store.transaction() as tx:
        tx.save_state("tiny", task_keys.LABEL_METRICS, b"\x00damaged")
    device.label(range(1, 51), right)
    device.turn()
    assert len(device.sent(QualityPayload)) == 1
    retained = device.store.load_state("tiny", task_keys.LABEL_METRICS)
    assert retained is not None
    assert degradation.DegradationState.from_bytes(retained).last_number == 50


def test_many_labels_at_once_make_several_messages_that_cover_each_once(make: Make) -> None:
    device = make()
    device.feed(900)
    device.label(range(1, 801), right)
    device.turn()
    assert sum(body.window["new"] for body in device.sent(QualityPayload)) == 800
    assert max(body.window["n"] for body in device.sent(QualityPayload)) <= label_metrics.MAX_LABELS_PER_MESSAGE
    assert store_numbers(device) == list(range(1, 801))


def store_numbers(device: Device) -> list[int]:
    return device.store.query(labelled.next_numbers, "tiny", 0, 10_000)


def test_an_absurd_label_is_refused_and_a_stored_one_stops_nothing(make: Make) -> None:
    device = make(REGRESS)
    device.feed(300)
    [reason] = device.label([1], lambda row: 1e160)
    assert reason == "the label cannot be meant: numbers go to 1e+100 on either side of 0"
    with device.store.transaction() as tx:
        result = tx.labels.find_by_row("tiny", 5)
        assert result is not None
        tx.labels.store_label("tiny", truth.parse_label(5, None, 1e160), result, T0)
    device.label(range(6, 255), lambda row: 1e100 if row == 7 else 0.5)
    device.turn()
    body = device.sent(QualityPayload)[-1]
    assert body.window["n"] == 249
    assert metrics(body)["mae", ""].value == pytest.approx(1e100 / 249, rel=1e-4)
    retained = device.store.load_state("tiny", task_keys.LABEL_METRICS)
    assert retained is not None
    assert np.isfinite(degradation.DegradationState.from_bytes(retained).baseline_square_sum)


@pytest.mark.parametrize("recipe", [REGRESS, CLASSIFY])
def test_a_result_that_is_no_number_costs_itself_only(
    make: Make, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    retained = LabelStore.store_predictions

    def damaged(self: LabelStore, task: str, given: StoredPredictions, at_s: float) -> None:
        for column in (given.score, given.value):
            if column is not None:
                column[3] = np.nan
        retained(self, task, given, at_s)

    monkeypatch.setattr(LabelStore, "store_predictions", damaged)
    device = make(recipe)
    device.feed(200)
    device.label(range(1, 61), right if recipe is CLASSIFY else lambda row: 0.5)
    device.turn()
    body = device.sent(QualityPayload)[-1]
    assert (body.window["n"], body.window["no_result"], body.labels["n"]) == (59, 1, 60)
    wanted = {"mae", "rmse"} if recipe is REGRESS else {"accuracy", "brier_top", "ece"}
    assert {metrics(body)[name, ""].n for name in wanted} == {59}
    assert (body.estimate is None) == (recipe is REGRESS)
    state = device.store.load_state("tiny", task_keys.LABEL_METRICS)
    assert state is not None
    assert len(degradation.DegradationState.from_bytes(state).pending) == 59 % degradation.GROUP_SIZE


def test_classes_without_a_label_are_counted_too(make: Make) -> None:
    device = make()
    device.feed(200)
    device.label([row for row in range(1, 201) if right(row) == "left"][:50], right)
    device.turn()
    [body] = device.sent(QualityPayload)
    assert (body.labels["classes"], body.labels["imbalance"]) == ({"left": 50, "right": 0, "rest": 0}, 50.0)


def test_classes_are_counted_by_what_labels_mean() -> None:
    schema = LabelSchema("anomaly")
    texts = ["1", "yes", "anomaly", "True", "0", "normal"]
    result = label_metrics._count_classes(schema, texts, schema.class_names)
    assert result == {"classes": {"anomaly": 4, "normal": 2}, "imbalance": 2.0}


def state_of(device: Device) -> degradation.DegradationState:
    retained = device.store.load_state("tiny", task_keys.LABEL_METRICS)
    assert retained is not None
    return degradation.DegradationState.from_bytes(retained)


def test_corrected_labels_are_reported_again_and_clear_their_alerts(make: Make) -> None:
    device = make()
    device.feed(400)
    device.label(range(1, 101), other)
    device.turn()
    assert {(entry.subject, entry.state) for entry in device.alerts()} == {
        ("evaluation", "raised"),
        ("certainty", "raised"),
    }
    device.label(range(1, 101), right)
    device.turn()
    body = device.sent(QualityPayload)[-1]
    assert (body.window["new"], body.window["corrected"]) == (100, 100)
    assert metrics(body)["accuracy", ""].value > 0.9
    last = {entry.id: entry.state for entry in device.alerts()}
    assert set(last.values()) == {"cleared"}
    assert len(last) == 2
    assert not any(track.is_open for track in state_of(device).tracks.values())


def put_right(device: Device, at_once: int) -> None:
    """Correct a third of the labels in several steps, among new ones."""
    device.feed(900)
    device.label(range(1, 301), lambda row: other(row) if row % 3 == 0 else right(row))
    device.turn()
    for first in range(3, 301, 3 * at_once):
        device.label(range(first, min(301, first + 3 * at_once), 3), right)
        device.turn()
    device.label(range(301, 401), right)
    device.boot_s += 90_000
    device.turn()


@pytest.mark.parametrize("at_once", [7, 100])
def test_decay_is_what_it_would_be_had_all_labels_been_right_at_first(make: Make, at_once: int) -> None:
    mended, never_wrong = make(), make()
    put_right(mended, at_once)
    never_wrong.feed(900)
    never_wrong.label(range(1, 401), right)
    never_wrong.boot_s += 90_000
    never_wrong.turn()
    first, two = state_of(mended), state_of(never_wrong)
    assert (
        first.baseline_n,
        first.baseline_loss_sum,
        first.baseline_square_sum,
        first.recent_losses,
        first.pending,
    ) == (
        two.baseline_n,
        two.baseline_loss_sum,
        two.baseline_square_sum,
        two.recent_losses,
        two.pending,
    )
    assert {kind: replace_raised(track) for kind, track in first.tracks.items()} == two.tracks


def replace_raised(track: degradation.CusumTrack) -> degradation.CusumTrack:
    return structs.replace(track, raised_count=0)


def test_a_stop_between_a_correction_and_its_message_loses_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, whole = make(), make()
    for device in (cut, whole):
        device.feed(400)
        device.label(range(1, 101), other)
        device.turn()
        device.label(range(1, 101), right)
    keep, sent = Transaction.save_state, len(cut.sent(QualityPayload))

    def stopped(tx: Transaction, task: str, name: str, value: bytes) -> None:
        if name == task_keys.LABEL_METRICS:
            raise StorageFull("the power went")
        keep(tx, task, name, value)

    monkeypatch.setattr(Transaction, "save_state", stopped)
    with pytest.raises(StorageFull):
        cut.turn()
    monkeypatch.undo()
    cut.store.close()
    cut.store = open_store(cut.folder)
    assert len(cut.sent(QualityPayload)) == sent
    for device in (cut, whole):
        device.turn()
        device.turn()
    assert state_of(cut) == state_of(whole)
    assert [entry.window for entry in cut.sent(QualityPayload)] == [
        entry.window for entry in whole.sent(QualityPayload)
    ]
    assert [entry.id for entry in cut.alerts()] == [entry.id for entry in whole.alerts()]


def test_a_label_put_right_twice_counts_once(make: Make) -> None:
    device = make()
    device.feed(400)
    device.label(range(1, 101), right)
    device.turn()
    before = state_of(device)
    for text in (other, right):
        device.label(range(1, 51), text)
        device.turn()
    after = state_of(device)
    assert (after.pending, after.recent_losses, after.baseline_n, after.baseline_loss_sum) == (
        before.pending,
        before.recent_losses,
        before.baseline_n,
        before.baseline_loss_sum,
    )
    assert [body.window["corrected"] for body in device.sent(QualityPayload)] == [0, 50, 50]


def test_successive_messages_do_not_show_the_labels_of_a_few_rows(make: Make) -> None:
    device = make()
    device.author.min_count = 10
    device.feed(400)
    # Odd rows are of site s0, even ones of s1.
    device.label(range(1, 51), right)
    device.turn()
    device.label([*range(51, 145, 2), 52, 54, 56], other)
    device.turn()
    device.label([*range(145, 185, 2), *range(58, 118, 2)], right)
    device.turn()
    first, second, third = device.sent(QualityPayload)
    sizes = [{m.slice: m.n for m in body.metrics if m.metric == "accuracy"} for body in (first, second, third)]
    assert (sizes[0]["site=s0"], sizes[0]["site=s1"]) == (25, 25)
    # Three labels of s1 are new: neither that slice nor the other, which the total would subtract, is shown.
    assert not {"site=s0", "site=s1"} & sizes[1].keys()
    assert second.withheld >= 2
    assert (sizes[2]["site=s0"], sizes[2]["site=s1"]) == (92, 58)


def test_few_new_labels_of_a_day_wait_for_more(make: Make) -> None:
    device = make()
    device.author.min_count = 10
    device.feed(200)
    device.label(range(1, 51), right)
    device.turn()
    for rows, expected in ((range(51, 54), 1), (range(54, 57), 1), (range(57, 62), 2)):
        device.label(rows, right)
        # The interval begins with the first label.
        device.turn()
        device.boot_s += 86_401
        device.turn()
        assert len(device.sent(QualityPayload)) == expected
    assert device.sent(QualityPayload)[-1].window["n"] == 61


def test_a_bundle_makes_the_least_count_stricter_and_never_laxer(make: Make) -> None:
    device = make()
    for own, bundle, expected in ((10, UNSET, 10), (10, 4, 10), (10, 30, 30), (1, 5, 5)):
        manifest = device.task.bundle.manifest
        drift = replace(manifest.drift, min_count=bundle)
        stricter = replace(device.task.bundle, manifest=replace(manifest, drift=drift))
        device.task = msgspec.structs.replace(device.task, bundle=stricter)
        device.author.min_count = own
        device.turn()
        assert device.author.least_count("tiny") == expected
    assert device.author.least_count(None) == 1


def test_a_socket_client_cannot_clear_an_alert_that_authenticated_labels_raised(make: Make) -> None:
    device = make()
    device.feed(2000)
    device.label(range(1, 201), right, by="eva")
    device.label(range(201, 401), other, by="eva")
    device.turn()
    raised = {alert.id for alert in device.alerts() if alert.state == "raised"}
    assert raised
    device.label(range(401, 1401), right)
    device.turn()
    assert {alert.id for alert in device.alerts() if alert.state == "cleared"} == set()
    device.label(range(1401, 1901), right, by="eva")
    device.turn()
    assert {alert.id for alert in device.alerts() if alert.state == "cleared"} == raised


def test_a_socket_client_cannot_raise_an_alert_where_labels_are_authenticated(make: Make) -> None:
    device = make()
    device.feed(1000)
    device.label(range(1, 251), right, by="eva")
    device.turn()
    device.label(range(251, 751), other)
    device.turn()
    assert device.alerts() == []


def test_a_socket_client_cannot_replace_an_authenticated_label(make: Make) -> None:
    device = make()
    device.feed(100)
    device.label([5], right, by="eva")
    [reason] = device.label([5], other)
    assert reason is not None
    assert "authenticated label is there" in reason
    assert device.label([5], other, by="eva") == [None]


def test_verdicts_do_not_count_as_ground_truth(make: Make) -> None:
    device = make()
    device.feed(200)
    device.label(range(1, 41), right)
    device.label(range(41, 61), other, source="verdict", by="eva")
    device.turn()
    [body] = device.sent(QualityPayload)
    assert body.labels["sources"] == {"human": 40, "verdict": 20}
    assert body.labels["authenticated"] == 20
    assert metrics(body)["accuracy", ""].n == 40


def test_a_verdict_does_not_end_the_alerts_of_labels_without_an_author(make: Make) -> None:
    device = make()
    device.feed(700)
    device.label([1], right, source="verdict", by="ha")
    device.label(range(2, 252), right)
    device.turn()
    device.label(range(252, 602), other)
    device.turn()
    assert "decay" in {alert.subject for alert in device.alerts() if alert.state == "raised"}


def test_a_verdict_cannot_replace_ground_truth_and_ground_truth_replaces_a_verdict_as_new(make: Make) -> None:
    device = make()
    device.feed(100)
    device.label(range(1, 21), other, by="alice")
    [reason] = device.label([1], right, source="verdict", by="ha")
    assert reason is not None
    assert "ground truth is there, which a verdict must not replace" in reason
    device.label(range(21, 61), right, source="verdict", by="ha")
    device.turn()
    device.label(range(21, 61), other, by="alice")
    stored = device.store.query(labelled.load_labelled, "tiny", device.task.bundle.digest, 10**6, 1000)
    assert [sample.source for sample in stored] == ["human"] * 60
    assert all(sample.number == sample.first_number for sample in stored)


def test_corrections_by_a_socket_client_change_no_test_of_authenticated_labels(make: Make) -> None:
    tracks = []
    for is_attacked in (False, True):
        device = make()
        device.feed(2100)
        device.label(range(1, 226), right, by="alice")
        device.label(range(226, 301), other, by="alice")
        device.turn()
        for first in range(301, 601, 50):
            device.label(range(first, first + 50), lambda row: right(row) if row % 9 else other(row), by="alice")
            if is_attacked:
                device.label(range(1500, 2100), other if first // 50 % 2 else right)
            device.turn()
        stored = device.store.load_state("tiny", task_keys.LABEL_METRICS)
        assert stored is not None
        tracks.append(degradation.DegradationState.from_bytes(stored).tracks)
    assert tracks[0] == tracks[1]


def test_a_flood_without_an_author_changes_no_alert_of_authenticated_labels(make: Make) -> None:
    device = make()
    device.feed(2000)
    device.label(range(1, 61), right, by="alice")
    device.label(range(61, 161), right, source="model", by="loop")
    device.turn()
    raised = [(alert.subject, alert.state) for alert in device.alerts()]
    assert raised == [("labels", "raised")]
    for rows in (range(500, 1000), range(1000, 1500)):
        device.label(rows, other)
        device.label([rows[0] - 300], right, source="model", by="loop")
        device.turn()
    assert [(alert.subject, alert.state) for alert in device.alerts()] == raised
    assert "" not in list_contradicted(device.task, device.store)


def test_alerts_that_the_owner_keeps_leave_neither_to_home_assistant_nor_in_a_report(make: Make) -> None:
    device = make()
    device.author.privacy = {"tiny": FieldPrivacy(fields=frozenset({"a", "b"}), kinds=frozenset())}
    device.feed(400)
    conf = config.Config(
        config.DeviceConfig("pi-07", "acme"), streams={"watch": device.stream}, tasks={"tiny": device.task.config}
    )
    device.label(range(1, 201), other)
    assert device.turn() > 0
    assert device.sent(AlertPayload) == []
    assert len(device.store.open_alerts("tiny")) > 0
    [report] = OwnMessages(conf, device.store).poll()
    assert report.alerts == {}
    outputs: dict[str, Any] = {"wear": {"quality": {"metrics": []}}}
    task = {"task": "tiny", "open": device.store.open_alerts("tiny"), "quality": {"metrics": []}, "outputs": outputs}
    document = {"tasks": [task], "alerts": device.store.recent_alerts(5)}
    left = status.limit_status(document, device.author)
    withheld: dict[str, Any] = {"open": [], "quality": None, "outputs": {"wear": {"quality": None}}}
    assert left == {"tasks": [{"task": "tiny", **withheld}], "alerts": []}


def test_labels_that_repeat_the_answers_are_a_feedback_loop(make: Make) -> None:
    device = make(promised=80)
    device.feed(600)
    requested = device.task.bundle.manifest.output.labels
    rows = range(1, 501)
    with device.store.transaction() as tx:
        predictions = {row: tx.labels.find_by_row("tiny", row) for row in rows}
    answers = {
        row: requested[p.predicted_class] for row, p in predictions.items() if p and p.predicted_class is not None
    }
    device.label(rows, lambda row: answers[row])
    device.turn()
    [alert] = [alert for alert in device.alerts() if alert.subject == "labels"]
    assert alert.evidence["wrong"] == 0
    assert "seem to repeat its answers" in alert.summary
