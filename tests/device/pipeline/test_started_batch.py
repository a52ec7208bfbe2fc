"""Batches of a backlog whose model runs in a process: the next one is computed while the last one is committed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from outstation.device.pipeline.batch import BatchResult
from outstation.device.store import rows
from outstation.foundation.errors import ModelProcessFailed, StorageFull
from outstation.ml.drift import DriftMonitor
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.protocol.wire import commitment
from outstation.workbench.testing.patience import wait_until
from scripts.kit.bundles import ANOMALY, CLASSIFY, Recipe, activated
from tests.kit.devices import Device

Make = Callable[[Recipe], Device]
# Whole drift windows, within the batch of a model that was not tuned.
BATCH = 500


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Return a function that makes a device with a backlog, whose model runs in a process, on two cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    made: list[tuple[Device, SubprocessModel]] = []

    def new(recipe: Recipe = CLASSIFY) -> Device:
        active = activated(recipe)
        model = SubprocessModel(active.bundle)
        device = Device(tmp_path / str(len(made)), recipe, replace(active, model=model))
        made.append((device, model))
        device.feed(recipe.rows(4 * BATCH))
        return device

    yield new
    for device, model in made:
        model.close()
        device.store.close()


def bodies(device: Device) -> list[dict[str, Any]]:
    """Return what the messages say, without their place in one log."""
    left_out = {"log": "", "prev": "", "input": ""}
    return [
        {name: value for name in m.body.__struct_fields__ if (value := getattr(m.body, name)) and name not in left_out}
        for m in device.messages()
    ]


@pytest.mark.parametrize("recipe", [CLASSIFY, ANOMALY])
def test_messages_are_those_of_one_core(make: Make, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    concurrent = make(recipe)
    results = concurrent.run_all()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    alone = make(recipe)
    assert alone.run_all() == results
    assert alone.task.lookahead.started is None
    assert bodies(concurrent) == bodies(alone)


def test_the_next_batch_is_started_until_the_backlog_ends(make: Make) -> None:
    device, started = make(CLASSIFY), []
    while device.run() is not None:
        started.append(device.task.lookahead.started is not None)
    assert started == [True, True, True, False]


def test_no_batch_is_started_ahead_while_a_hot_machine_rests(make: Make) -> None:
    device = make(CLASSIFY)
    device.task.lookahead.is_allowed = False
    while device.run() is not None:
        assert device.task.lookahead.started is None


def test_a_started_batch_of_deleted_rows_has_no_results(make: Make) -> None:
    device = make(CLASSIFY)
    device.feed(CLASSIFY.rows(BATCH))
    device.run()
    started = device.task.lookahead.started
    assert started is not None
    with device.store.transaction() as tx:
        tx._db.execute("DELETE FROM chunks WHERE first_row = 1")
    device.run()
    # The rows are gone: a message covers them without results.
    assert [result.n for result in device.results()] == [BATCH, 0]


def test_a_batch_that_finds_no_room_is_not_skipped_by_the_started_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make(CLASSIFY)
    device.run()
    real, refused = device.store.transaction, [True]

    def full(**options: bool) -> Any:
        if refused:
            refused.clear()
            raise StorageFull("no room")
        return real(**options)

    monkeypatch.setattr(device.store, "transaction", full)
    device.run_all()
    results = device.results()
    assert sum(result.n for result in results) == 4 * BATCH
    assert [b.rows[0] for b in results[1:]] == [a.rows[1] + 1 for a in results[:-1]]


def test_a_process_that_was_ended_between_two_batches_fails_none(make: Make) -> None:
    device = make(CLASSIFY)
    device.run()
    assert isinstance(device.task.model, SubprocessModel)
    device.task.model.close()
    assert device.run() == BatchResult(BATCH, BATCH, 0)


def test_no_row_is_lost_where_the_process_is_killed_while_nobody_waits(make: Make) -> None:
    device = make(CLASSIFY)
    device.run()
    model = device.task.model
    assert isinstance(model, SubprocessModel)
    assert model.pid is not None
    os.kill(model.pid, signal.SIGKILL)
    wait_until("the process is gone", lambda: not model.is_running)
    # What it answered before is used.
    with contextlib.suppress(ModelProcessFailed):
        device.run()
    device.run_all()
    assert sum(result.n for result in device.results()) == 4 * BATCH


def test_no_row_is_lost_where_the_process_is_killed_before_its_answer_is_awaited(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make(CLASSIFY)
    model, real = device.task.model, DriftMonitor.measure_batch
    assert isinstance(model, SubprocessModel)

    def kill_and_measure(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(DriftMonitor, "measure_batch", real)
        assert model.pid is not None
        os.kill(model.pid, signal.SIGKILL)
        return real(*arguments, **options)

    monkeypatch.setattr(DriftMonitor, "measure_batch", kill_and_measure)
    # What it answered before is used; then the next batch fails.
    with contextlib.suppress(ModelProcessFailed):
        device.run_all()
    device.run_all()
    assert sum(result.n for result in device.results()) == 4 * BATCH


@pytest.mark.parametrize("predicted", [0, 1, 10 * BATCH])
def test_each_message_commits_to_its_own_rows(make: Make, predicted: int) -> None:
    """Rows of the batch are committed to before its results show how many messages they take."""
    device = make(CLASSIFY)
    device.author.max_bytes = 8_000
    device.task.results.results_per_message = predicted
    device.run()
    messages, log = device.results(), device.author
    assert len(messages) > 1
    for message in messages:
        first, last = message.rows
        stored = device.store.read_rows(
            device.task.config.stream, device.task.stream.fields, first - 1, last + 1 - first
        )
        assert stored is not None
        key = commitment.derive_key(log.secret, log.log_id, device.task.name, (first, last))
        assert message.input == rows.commit(stored.parts, key, device.task.stream.fields, {})


def test_a_started_batch_that_is_too_large_by_now_is_read_again(make: Make) -> None:
    device = make(CLASSIFY)
    device.run()
    device.task.size.divisor = 8
    done = device.run()
    assert done is not None
    assert done.rows < BATCH // 4
    device.run_all()
    assert sum(result.n for result in device.results()) == 4 * BATCH
