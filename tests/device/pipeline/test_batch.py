"""Batch, with a real store and real bundles: one commit, messages that tile the rows and fit the broker."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.device import config
from outstation.device.pipeline.batch import BatchResult
from outstation.device.store import retention, task_keys, transaction
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.rows import commit
from outstation.foundation import clock
from outstation.foundation.errors import StorageError, StorageFull
from outstation.ml.model.bundle.manifest import WindowSpec
from outstation.ml.model.inference import features, scores
from outstation.ml.model.inference.tuning import Tuning
from outstation.protocol.wire import commitment
from outstation.protocol.wire.messages import AlertPayload, AuditPayload, Body, DriftPayload, ResultsPayload
from outstation.protocol.wire.privacy.field_privacy import FieldPrivacy
from outstation.protocol.wire.runs import expand_integers
from outstation.protocol.wire.verification import VerifiedMessage
from scripts.kit.bundles import ANOMALY, CLASSIFY, REGRESS, WINDOW, Recipe, activated
from tests.kit.devices import STEP_US, T0, Device, columns, tiles

Floats = NDArray[np.float32]


Make = Callable[..., Device]

FAST = Tuning("sha256:m", "runtime", "machine", 128, 1, 1e6)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return a function that makes a device."""
    made: list[Device] = []

    def new(recipe: Recipe = CLASSIFY, **options: Any) -> Device:
        device = Device(tmp_path / str(len(made)), recipe, activated(recipe), **options)
        made.append(device)
        return device

    yield new
    for device in made:
        device.store.close()


def by_hand(device: Device, values: Floats) -> scores.Scores:
    """Run rows without gaps through the bundle, without store and batches."""
    spec = device.active.bundle.manifest.input
    starts = features.cut_windows(np.arange(len(values), dtype=np.int64), spec.window).starts
    windows = features.build_windows(values, starts, spec)
    return scores.from_outputs(device.active.model.invoke(windows), device.active.bundle.manifest, windows)


# --- what a batch says ---


def test_a_tabular_batch_names_each_row_with_its_time_label_and_score(make: Make) -> None:
    device = make()
    values = CLASSIFY.rows(50)
    device.feed(values)
    assert device.run_all() == [BatchResult(50, 50, 0)]
    (result,) = device.results()
    expected = by_hand(device, values)
    assert expected.label is not None
    assert expected.score is not None
    assert result.columns.expand_rows() == list(range(1, 51))
    assert result.columns.expand_times() == [T0 + i * STEP_US for i in range(50)]
    assert result.columns.expand_labels() == [CLASSIFY.labels[i] for i in expected.label]
    assert result.columns.score == np.round(expected.score, 4).tolist()
    assert (result.rows, result.n, result.stream, result.task) == ((1, 50), 50, "watch", "tiny")
    assert result.model.digest == device.active.bundle.digest


def test_a_windowed_batch_names_the_last_row_of_each_window(make: Make) -> None:
    device = make(ANOMALY)
    values = ANOMALY.rows(50)
    device.feed(values)
    assert device.run() == BatchResult(44, 11, 0)
    (result,) = device.results()
    assert result.columns.expand_rows() == list(range(8, 49, 4))
    assert result.columns.expand_times() == [T0 + (row - 1) * STEP_US for row in result.columns.expand_rows()]
    assert result.columns.value == pytest.approx(by_hand(device, values).value, rel=1e-5)
    # A smooth wave is what the threshold was learned from.
    assert (result.columns.expand_labels(), result.columns.score) == (["normal"] * 11, None)
    assert result.rows == (1, 44)
    assert device.run() is None


def test_a_regression_gives_values(make: Make) -> None:
    device = make(REGRESS)
    values = REGRESS.rows(20)
    device.feed(values)
    device.run()
    assert device.results()[0].columns.value == pytest.approx(by_hand(device, values).value, rel=1e-5)


def test_the_commitment_of_a_message_is_to_its_rows_under_its_own_key(make: Make) -> None:
    device = make(max_bytes=5_000)
    device.feed(CLASSIFY.rows(200))
    device.run_all()
    results = device.results()
    assert len(results) > 2
    for result in results:
        first, last = result.rows
        taken = device.store.read_rows("watch", device.stream.fields, first - 1, last - first + 1)
        assert taken is not None
        key = commitment.derive_key(device.author.secret, result.log, "tiny", result.rows)
        assert result.input == commit(taken.parts, key, device.stream.fields, {})


def test_without_rows_there_is_no_batch(make: Make) -> None:
    device = make()
    assert device.run() is None
    assert device.messages() == []


def test_a_task_begins_at_the_oldest_stored_row(make: Make) -> None:
    device = make()
    device.feed(CLASSIFY.rows(10))
    device.feed(CLASSIFY.rows(10))
    with device.store.transaction() as tx:
        tx.trim_rows("watch", 10, T0 + 10**12, 1)
    device.run_all()
    assert tiles(device.results()) == (11, 20)
    assert device.store.first_consumed("tiny") == 11


# --- publish ---


def test_publish_summary_counts_and_lists_nothing(make: Make) -> None:
    device = make(publish="summary")
    device.feed(CLASSIFY.rows(70))
    device.run_all()
    (result,) = device.results()
    assert (result.n, result.rows, result.columns.expand_rows()) == (70, (1, 70), [])


def test_publish_changes_lists_only_labels_that_differ_across_batches(make: Make) -> None:
    device = make(publish="changes")
    values = CLASSIFY.rows(140)
    for part in np.array_split(values, 9):
        device.feed(part)
        device.run_all()
    expected = by_hand(device, values).label
    assert expected is not None
    changed = [0, *(np.flatnonzero(np.diff(expected)) + 1).tolist()]
    assert columns(device.results())["row"] == [row + 1 for row in changed]
    assert sum(r.n for r in device.results()) == 140


def test_publish_below_lists_what_is_uncertain(make: Make) -> None:
    device = make(publish=config.PublishBelow(below_score=0.9))
    values = CLASSIFY.rows(300)
    device.feed(values)
    device.run_all()
    expected = by_hand(device, values).score
    assert expected is not None
    listed = columns(device.results())
    assert listed["row"] == (np.flatnonzero(expected < 0.9) + 1).tolist()
    assert 0 < len(listed["row"]) < 300
    assert max(listed["score"]) <= 0.9


# --- tiling and size ---


def size(device: Device, message: VerifiedMessage) -> int:
    """Return the size of a message on the air: topic, payload, and user properties with their lengths."""
    pending = next(p for p in device.store.unacknowledged_messages(0, 100_000) if p.payload == message.payload)
    sent = device.author.to_outgoing(pending)
    properties = sum(len(name.encode()) + len(value.encode()) + 5 for name, value in sent.properties)
    return len(sent.topic.encode()) + len(sent.payload) + properties + 40


@settings(
    max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    max_bytes=st.integers(2_500, 20_000),
    recipe=st.sampled_from([CLASSIFY, ANOMALY, REGRESS]),
    pieces=st.lists(st.tuples(st.integers(1, 300), st.sampled_from([0.0, 0.0, 1.0])), min_size=1, max_size=4),
)
def test_messages_tile_the_rows_and_each_is_within_the_brokers_limit(
    make: Make, max_bytes: int, recipe: Recipe, pieces: list[tuple[int, float]]
) -> None:
    device = make(recipe, max_bytes=max_bytes)
    for n, pause_s in pieces:
        device.feed(recipe.rows(n), pause_s=pause_s)
    done = device.run_all()
    results = device.results()
    assert sum(r.n for r in results) == sum(d.windows for d in done) == len(columns(results).get("row", []))
    if results:
        first, last = tiles(results)
        assert (first, last) == (1, sum(d.rows for d in done))
        assert device.store.cursor("tiny") == last
    for message in device.messages():
        if isinstance(message.body, ResultsPayload):
            assert size(device, message) <= max_bytes
    device.store.close()


@pytest.mark.parametrize("label", ["x" * 256, "ü" * 256, "運" * 256, '"\\' * 128], ids=["ascii", "2", "3", "escaped"])
def test_long_labels_in_any_script_do_not_make_a_message_too_large(make: Make, label: str) -> None:
    device = make(max_bytes=12_000)
    manifest = device.active.bundle.manifest
    output = msgspec.structs.replace(manifest.output, labels=[label, f"{label[:-1]}2", f"{label[:-1]}3"])
    bundle = replace(device.active.bundle, manifest=msgspec.structs.replace(manifest, output=output))
    device.assemble(None, bundle)
    device.feed(CLASSIFY.rows(200))
    device.run_all()
    results = device.results()
    assert tiles(results) == (1, 200)
    assert max(size(device, message) for message in device.messages()) <= 12_000


def test_names_of_the_greatest_length_leave_room_for_results(make: Make) -> None:
    device = make(max_bytes=4_000)
    name = "n" * 64
    device.author = replace(device.author, fleet=name, device="pi-07")
    manifest = msgspec.structs.replace(device.active.bundle.manifest, name=name, version="v" * 64)
    device.assemble(None, replace(device.active.bundle, manifest=manifest), name=name)
    device.feed(CLASSIFY.rows(60))
    device.run_all()
    assert columns(device.results())["row"] == list(range(1, 61))
    assert max(size(device, message) for message in device.messages()) <= 4_000


def test_a_run_without_any_window_still_covers_its_rows(make: Make) -> None:
    device = make(ANOMALY)
    for _ in range(3):
        device.feed(ANOMALY.rows(5), pause_s=2)
    assert device.run() == BatchResult(10, 0, 0)
    (result,) = device.results()
    assert (result.rows, result.n, result.columns.expand_rows(), result.columns.expand_times()) == ((1, 10), 0, [], [])
    device.feed(ANOMALY.rows(20), pause_s=2)
    device.run_all()
    assert tiles(device.results()) == (1, 31)


@pytest.mark.parametrize("recipe", [CLASSIFY, REGRESS, ANOMALY], ids=["classify", "regress", "anomaly"])
def test_a_run_without_any_window_is_made_for_every_kind(make: Make, recipe: Recipe) -> None:
    device = make(recipe)
    if recipe.window:
        device.feed(recipe.rows(3))
        device.feed(recipe.rows(3), pause_s=2)
        assert device.run() == BatchResult(3, 0, 0)
    else:
        assert device.run() is None


# --- batches are arbitrary ---


def story(recipe: Recipe) -> list[tuple[Floats, float]]:
    """Return rows to learn a site reference from and then to drift, with pauses."""
    quiet, loud = recipe.rows(2000, seed=2), recipe.rows(1200, seed=3)
    loud[400:, 0] *= 0.3
    return [(quiet, 0.0), (loud[:500], 3.0), (loud[500:], 0.0)]


def read_bodies(device: Device) -> list[tuple[Body, dict[str, Any]]]:
    """Return drift, alert and audit messages, also as JSON without their place in the log and their time."""
    bodies: list[tuple[Body, dict[str, Any]]] = []
    for message in device.messages():
        if isinstance(message.body, DriftPayload | AlertPayload | AuditPayload):
            document = json.loads(message.payload)
            for name in ("log", "seq", "prev", "boot", "time"):
                del document[name]
            document.get("evidence", {}).pop("seq", None)
            bodies.append((message.body, document))
    return bodies


def sent_payloads(device: Device) -> list[Any]:
    """Return drift windows, alerts and audit messages, however many windows share a message."""
    retained: list[Any] = []
    for body, document in read_bodies(device):
        if isinstance(body, DriftPayload) and body.state == "ok":
            retained += split_windows(body)
        else:
            retained.append(document)
    return retained


def split_windows(body: DriftPayload) -> list[Any]:
    """The windows of a drift message, each as (index, rows, n, times): how many share a message depends on batches."""
    window, run = body.window, body.windows
    if run is None:
        return [(window.index, window.rows, window.n, (window.from_, window.to))]
    times = [tuple(clock.to_rfc3339(us) for us in both) for both in run.expand_times()]
    columns = zip(run.expand_rows(), expand_integers(run.n), times, strict=True)
    return [(window.index + i, *entry) for i, entry in enumerate(columns)]


def count_rows(device: Device) -> list[Any]:
    """Rows of all drift windows by bin of the first field, and predictions."""
    bodies = [m.body for m in device.messages() if isinstance(m.body, DriftPayload)]
    fields = [next(iter(body.features.values())) for body in bodies]
    outputs = [body.output["counts"] for body in bodies]
    predictions = Counter[Any]()
    for counts in outputs:
        predictions.update(counts if isinstance(counts, dict) else dict(enumerate(counts)))
    bins = np.sum([[f["below"], *f["counts"], f["above"], f["missing"]] for f in fields], axis=0)
    return [bins.tolist(), predictions]


@pytest.mark.parametrize("recipe", [CLASSIFY, ANOMALY], ids=["tabular", "windowed"])
def test_batches_of_any_size_give_equal_results_and_drift_windows(make: Make, recipe: Recipe) -> None:
    whole, random = make(recipe), np.random.default_rng(4)
    for values, pause_s in story(recipe):
        whole.feed(values, pause_s=pause_s)
    whole.run_all()
    pieces = make(recipe)
    for values, pause_s in story(recipe):
        cuts = np.sort(random.choice(np.arange(1, len(values)), 12, replace=False))
        for i, part in enumerate(np.split(values, cuts)):
            pieces.feed(part, pause_s=pause_s if i == 0 else 0.0)
            if random.random() < 0.7:
                pieces.run_all()
            if random.random() < 0.2:
                pieces.restart()
    pieces.run_all()
    assert columns(pieces.results()) == columns(whole.results())
    assert sent_payloads(pieces) == sent_payloads(whole)
    assert count_rows(pieces) == count_rows(whole)
    kinds = {output["kind"] for output in sent_payloads(whole) if isinstance(output, dict)}
    assert kinds == {"drift", "alerts", "audit"}
    assert any(isinstance(m.body, DriftPayload) and m.body.windows is not None for m in whole.messages())
    assert tiles(pieces.results()) == tiles(whole.results())


def test_a_daemon_that_ends_after_each_batch_writes_the_same_messages(make: Make) -> None:
    whole, ended = make(), make()
    for device in (whole, ended):
        for values, pause_s in story(CLASSIFY):
            device.feed(values, pause_s=pause_s)
    batches = len(whole.run_all())
    while ended.run() is not None:
        ended.restart()
        batches -= 1
    assert batches == 0
    runs = [body for body, _ in read_bodies(whole) if isinstance(body, DriftPayload) and body.windows is not None]
    assert len(runs) > 1
    assert [document for _, document in read_bodies(ended)] == [document for _, document in read_bodies(whole)]


def test_an_alert_names_the_message_of_the_window_that_raised_it(make: Make) -> None:
    device = make()
    for values, pause_s in story(CLASSIFY):
        device.feed(values, pause_s=pause_s)
    alerts = sum(done.alerts for done in device.run_all())
    by_seq = {m.body.seq: m.body for m in device.messages() if isinstance(m.body, DriftPayload | AlertPayload)}
    raised = [body for body in by_seq.values() if isinstance(body, AlertPayload)]
    assert len(raised) == alerts > 0
    for body in raised:
        window = by_seq[body.evidence["seq"]]
        assert isinstance(window, DriftPayload)
        assert window.window.index == body.evidence["window"]
        assert body.summary


def test_a_learned_reference_is_stored_and_announced(make: Make) -> None:
    device = make()
    device.feed(CLASSIFY.rows(600, seed=2))
    device.run_all()
    (audit,) = [m.body for m in device.messages() if isinstance(m.body, AuditPayload)]
    assert audit.event == "learned"
    retained = device.store.load_state("tiny", task_keys.SITE_REFERENCE)
    assert retained is not None
    assert json.loads(retained)["made"] == "site"


# --- together, or nothing ---


def snapshot(device: Device) -> dict[str, list[Any]]:
    """Return all tables of the store."""
    with contextlib.closing(sqlite3.connect(f"file:{device.store.path}?mode=ro", uri=True)) as db, db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in names}


class PowerCut(BaseException):
    """Simulated end of the process."""


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("failure", [PowerCut, sqlite3.OperationalError])
def test_a_batch_that_dies_at_any_write_leaves_nothing_and_is_done_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, at: int, failure: type[BaseException]
) -> None:
    device = make(max_bytes=4_000)
    device.feed(CLASSIFY.rows(100))
    before, writes = snapshot(device), 0
    drift = device.drift.state

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == at:
                raise failure("power cut")
            return write(*args)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("advance_cursor", "save_state", "enqueue", "increment_counter", "finish"):
            patch.setattr(transaction.Transaction, name, dying(getattr(transaction.Transaction, name)))
        with pytest.raises(PowerCut if failure is PowerCut else StorageError):
            device.run()
    assert writes == at
    assert snapshot(device) == before
    assert device.drift.state is drift
    device.run_all()
    assert columns(device.results())["row"] == list(range(1, 101))


def test_a_kill_after_the_commit_does_not_run_the_rows_again(make: Make) -> None:
    device = make()
    device.feed(CLASSIFY.rows(100))
    device.run()
    device.restart()
    assert device.run() is None
    device.feed(CLASSIFY.rows(20))
    device.run_all()
    assert tiles(device.results()) == (1, 120)


# --- rows that cannot be read ---


def damage(device: Device, first_row: int) -> None:
    """Change a byte of the chunk that begins at this row."""
    path = device.store.path
    device.store.close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        (data,) = db.execute("SELECT data FROM chunks WHERE first_row = ?", (first_row,)).fetchone()
        changed = bytes([data[0] ^ 1]) + data[1:]
        assert db.execute("UPDATE chunks SET data = ? WHERE first_row = ?", (changed, first_row)).rowcount == 1
    db.close()
    device.open()


@pytest.mark.parametrize("recipe", [CLASSIFY, ANOMALY], ids=["tabular", "windowed"])
@pytest.mark.parametrize("which", [1, 31, 61, 91])
def test_a_damaged_chunk_is_covered_declared_set_aside_and_passed(make: Make, recipe: Recipe, which: int) -> None:
    device = make(recipe)
    for _ in range(4):
        device.feed(recipe.rows(30))
    damage(device, which)
    device.run_all()
    device.feed(recipe.rows(30))
    device.run_all()
    results = device.results()
    last = 150 if recipe is CLASSIFY else device.store.cursor("tiny")
    assert tiles(results) == (1, last)
    (lost,) = [
        r for r in results if which in range(r.rows[0], r.rows[1] + 1) and r.n == 0 and not r.columns.expand_rows()
    ]
    assert lost.rows[1] == which + 29
    missing = set(range(which, which + 30))
    assert missing.isdisjoint(columns(results)["row"])
    if recipe is CLASSIFY:
        assert missing | set(columns(results)["row"]) == set(range(1, 151))
    (alert,) = [m.body for m in device.messages() if isinstance(m.body, AlertPayload)]
    assert (alert.alert, alert.severity, alert.evidence["rows"]) == ("storage", "critical", list(lost.rows))
    assert "Check the card" in alert.summary
    assert len(snapshot(device)["quarantined_rows"]) == 1


def test_rows_that_wait_for_a_window_do_not_wait_for_a_damaged_chunk(make: Make) -> None:
    device = make(ANOMALY)
    for n in (5, 20, 20):
        device.feed(ANOMALY.rows(n))
    damage(device, 6)
    assert device.run() == BatchResult(5, 0, 0)
    assert device.run() == BatchResult(20, 0, 1)
    assert device.run() == BatchResult(16, 4, 0)
    assert tiles(device.results()) == (1, 41)


def test_rows_that_wait_for_a_window_wait_for_rows_to_come(make: Make) -> None:
    device = make(ANOMALY)
    device.feed(ANOMALY.rows(WINDOW - 1))
    assert device.run() is None
    device.feed(ANOMALY.rows(1))
    assert device.run() == BatchResult(4, 1, 0)


def test_deleted_rows_are_skipped_and_not_reported_as_damaged(
    make: Make,
) -> None:
    device = make()
    for _ in range(5):
        device.feed(CLASSIFY.rows(30))
    damage(device, 61)
    assert device.store.read_rows("watch", device.stream.fields, 60, 1) is not None
    with device.store.transaction() as tx:
        tx.advance_cursor("tiny", 1, 10)
        # Another task met the damaged chunk, and used the rest.
        tx.quarantine_rows("watch", 61, 90)
        assert tx.trim_rows("watch", 120, 2**62, 1000) is not None
    assert device.store.first_row("watch") == 121
    done = device.run_all()
    assert done == [BatchResult(50, 0, 0), BatchResult(30, 0, 1), BatchResult(30, 0, 0), BatchResult(30, 30, 0)]
    results = device.results()
    assert [message.rows for message in results] == [(11, 60), (61, 90), (91, 120), (121, 150)]
    reported = [json.loads(m.payload).get("lost", "") for m in device.messages() if isinstance(m.body, ResultsPayload)]
    assert ["deleted" in lost for lost in reported] == [True, False, True, False]
    (alert,) = [m.body for m in device.messages() if isinstance(m.body, AlertPayload)]
    assert alert.evidence["rows"] == [61, 90]
    assert len(snapshot(device)["quarantined_rows"]) == 1


def test_rows_missing_at_the_front_are_reported_as_damaged(make: Make) -> None:
    device = make()
    for _ in range(3):
        device.feed(CLASSIFY.rows(30))
    with device.store.transaction() as tx:
        tx.advance_cursor("tiny", 1, 10)
        assert tx.trim_rows("watch", 30, 2**62, 1000) is not None
    device.store._db.execute("DELETE FROM chunks WHERE first_row = 31")
    assert device.run_all() == [BatchResult(20, 0, 0), BatchResult(30, 0, 1), BatchResult(30, 30, 0)]
    (alert,) = [m.body for m in device.messages() if isinstance(m.body, AlertPayload)]
    assert (alert.severity, alert.evidence["rows"]) == ("critical", [31, 60])


# --- how much at once ---


@pytest.mark.parametrize(
    ("window", "rows"),
    [
        (None, 512),
        (WindowSpec(rows=100, step=100), 51_200),
        (WindowSpec(rows=1000, step=1), 1511),
        (WindowSpec(rows=100_000, step=100_000), 1_000_000),
        (WindowSpec(rows=100_000, step=1), 100_009),
    ],
    ids=["no window", "side by side", "overlapping", "long", "long and overlapping"],
)
def test_a_batch_takes_whole_windows_and_no_more_than_memory_holds(
    make: Make, window: WindowSpec | None, rows: int
) -> None:
    device = make()
    manifest = device.active.bundle.manifest
    spec = msgspec.structs.replace(manifest.input, window=window)
    bundle = replace(device.active.bundle, manifest=msgspec.structs.replace(manifest, input=spec))
    device.assemble(None, bundle)
    task = device.task
    assert task.size.max_rows(3 << 20) == rows
    assert task.size.max_rows(1000) >= task.window_rows


def test_a_backlog_of_many_batches_is_worked_off(make: Make) -> None:
    device = make()
    device.feed(CLASSIFY.rows(2000))
    done = device.run_all()
    assert [message.rows for message in done] == [500, 500, 500, 500]
    assert tiles(device.results()) == (1, 2000)


@pytest.mark.parametrize(
    ("privacy", "named"),
    [
        (FieldPrivacy(), {"a"}),
        (FieldPrivacy(fields=frozenset({"a"}), private=frozenset({"a"})), set()),
        (FieldPrivacy(kinds=frozenset({"alerts"})), set()),
    ],
)
def test_results_name_no_private_field_with_a_fault_and_none_where_drift_stays_on_the_device(
    make: Make, privacy: FieldPrivacy, named: set[str]
) -> None:
    device = make(replace(CLASSIFY, drift_window=20))
    device.author.privacy = {"tiny": privacy}
    stuck = CLASSIFY.rows(1000)
    stuck[500:, 0] = 1.0
    device.feed(stuck)
    device.run_all()
    assert {name for message in device.results() for name in message.faults or ()} == named


def test_a_batch_of_a_backlog_ends_where_a_drift_window_does_and_takes_a_small_rest_along(make: Make) -> None:
    device = make(replace(CLASSIFY, drift_window=20))
    device.feed(CLASSIFY.rows(7))
    device.run_all()
    device.feed(CLASSIFY.rows(1000))
    assert [entry.rows for entry in device.run_all()] == [493, 507]
    assert device.drift.state.open_summary.model_windows == 1007 % 20


@pytest.mark.parametrize("drift_window", [2, 50])
def test_thousands_of_single_row_results_fit_a_transaction(make: Make, drift_window: int) -> None:
    device = make(replace(CLASSIFY, drift_window=drift_window), tuning=FAST)
    rows = np.random.default_rng(1).normal(0, 1000, (6000, 4)).astype(np.float32)
    for part in np.split(rows, 6):
        device.feed(part)
    at_once = device.task.size.max_rows(device.store.quota.transaction_bytes)
    assert 400 < at_once < 6000
    assert at_once % drift_window == 0
    done = device.run_all()
    assert done[0].rows == at_once
    bodies = [message.body for message in device.messages()]
    assert tiles([body for body in bodies if isinstance(body, ResultsPayload)]) == (1, 6000)
    assert sum(isinstance(body, DriftPayload) for body in bodies) == 6000 // drift_window


def test_batches_are_planned_by_the_bytes_of_the_last_one_and_smaller_ones_follow_when_alerts_grow(
    make: Make,
) -> None:
    device = make(replace(CLASSIFY, drift_window=2), tuning=FAST)
    room = device.store.quota.transaction_bytes
    guessed = device.task.size.max_rows(room)
    for part in np.split(CLASSIFY.rows(3000), 3):
        device.feed(part)
    device.run_all()
    planned = device.task.size.max_rows(room)
    assert planned > guessed
    # Every window is as large as it can be: the batch that does not fit is cut, and none of its rows is lost.
    device.task.size.window_bytes = 1
    for part in np.split(np.random.default_rng(1).normal(0, 1000, (2000, 4)).astype(np.float32), 2):
        device.feed(part)
    done = device.run_all()
    assert sum(entry.rows for entry in done) == 2000
    assert max(entry.rows for entry in done) < 2000
    assert tiles(device.results()) == (1, 5000)


def test_a_full_store_is_processed_in_smaller_batches(make: Make) -> None:
    device = make(max_size=2 << 20, tuning=FAST)
    rows = 0
    with contextlib.suppress(StorageFull):
        while True:
            device.feed(CLASSIFY.rows(500))
            rows += 500
    at_once = device.task.size.max_rows(device.store.quota.transaction_bytes)
    first = device.run()
    assert first is not None
    assert 0 < first.rows < at_once
    assert device.task.size.divisor > 1
    assert tiles(device.results()) == (1, first.rows)


@pytest.mark.parametrize("mib", [1, 2, 8])
def test_batches_of_a_full_store_leave_room_to_delete(make: Make, mib: int) -> None:
    device = make(max_size=mib << 20)
    for rows in (500, 20):
        with contextlib.suppress(StorageFull):
            while True:
                device.feed(CLASSIFY.rows(rows))
    first = device.run()
    assert first is not None
    assert first.rows > 0
    with pytest.raises(StorageFull):
        device.run_all()
    last = int(device.store.get_meta("seq", "0"))
    with device.store.transaction(vital=True) as tx:
        tx.outbox.set_acknowledged(AcknowledgedSeqs(last))
        tx.set_meta(retention.ACKNOWLEDGEMENT, "a" * 300)
    with device.store.transaction(vital=True) as tx:
        assert tx.outbox.drop_acknowledged(last, 500) > 0
        assert tx.labels.trim_predictions("tiny", math.inf, 500) > 0
    assert device.store.outbox_size()[0] == 0


def test_only_the_fields_of_the_bundle_reach_the_model(make: Make) -> None:
    device = make()
    assert device.task.input_columns == [1, 2, 3, 4]
