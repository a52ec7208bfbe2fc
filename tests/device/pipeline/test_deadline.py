"""Deadline: a late batch is committed and counted, and the next one is smaller."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from outstation.device.batch_parts import deadline
from outstation.device.batch_parts.deadline import Deadline
from outstation.device.bootstrap.device import KEY_FILE, load_config, open_message_log, open_store
from outstation.device.bootstrap.tasks import load_task
from outstation.device.health import build_body
from outstation.device.pipeline import batch
from outstation.device.store.rows import Rows
from outstation.foundation.cli.commands import cli
from outstation.foundation.errors import StorageFull
from outstation.protocol.wire import keys
from outstation.protocol.wire.messages import AlertPayload
from outstation.workbench.testing.fleet import FIELDS
from scripts.kit.bundles import CLASSIFY, activated
from tests.kit.devices import NOW, Device, tiles

ALWAYS_LATE, NEVER_LATE = 1e-9, 1e6


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path / "data", CLASSIFY, activated(CLASSIFY))
    yield made
    made.store.close()


def deadline_alerts(device: Device) -> list[tuple[str, str, str]]:
    bodies = [m.body for m in device.messages()]
    return [(b.id, b.state, b.severity) for b in bodies if isinstance(b, AlertPayload) and b.subject == "deadline"]


def limit(device: Device, seconds: float | None) -> Deadline:
    """Give the task another deadline."""
    (deadline,) = (part for part in device.task.parts if isinstance(part, Deadline))
    deadline.seconds = seconds
    return deadline


@pytest.fixture
def took(device: Device) -> Callable[..., None]:
    """Return a function that records a batch of the device's task."""

    def took(limit: Deadline, seconds: float, windows: int) -> None:
        limit.record_batch(seconds, windows, device.store, device.author, NOW)

    return took


def test_late_batches_are_committed_and_counted_and_no_row_is_run_twice(device: Device) -> None:
    limit(device, ALWAYS_LATE)
    device.feed(CLASSIFY.rows(600))
    done = device.run_all()
    assert [entry.windows for entry in done][:2] == [500, 1]
    assert sum(entry.windows for entry in done) == 600
    assert tiles(device.results()) == (1, 600)
    shown = deadline.to_status(device.store, device.store.counters(), "tiny", ALWAYS_LATE)["deadline"]
    assert (shown["late"], shown["last"]["windows"]) == (len(done), 1)
    assert ALWAYS_LATE < shown["last"]["seconds"] < NEVER_LATE


def test_a_batch_that_is_on_time_is_neither_counted_nor_made_smaller(device: Device) -> None:
    limit(device, NEVER_LATE)
    device.feed(CLASSIFY.rows(1100))
    assert [entry.windows for entry in device.run_all()] == [500, 500, 100]
    shown = deadline.to_status(device.store, device.store.counters(), "tiny", NEVER_LATE)["deadline"]
    assert (shown["late"], shown["last"]) == (0, None)


def test_a_run_may_wait_for_four_drift_windows_but_not_with_a_short_deadline(device: Device) -> None:
    window = device.drift.state.window
    assert device.task.size.rows_to_gather == 4 * window
    device.feed(CLASSIFY.rows(7))
    device.run_all()
    assert device.task.size.rows_to_gather == 4 * window - 7
    limit(device, 0.5)
    assert device.task.size.rows_to_gather == 0
    device.assemble(None)
    assert device.task.size.rows_to_gather == 0


def test_the_batch_after_a_late_one_is_expected_to_be_on_time(device: Device, took: Callable[..., None]) -> None:
    shorter = limit(device, 1.0)
    took(shorter, 2.0, 100)
    assert shorter.max_windows == 40
    assert device.task.size.max_rows(3 << 20) == 40


def test_batches_grow_again_as_far_as_they_are_on_time(took: Callable[..., None]) -> None:
    limit = Deadline("tiny", 1.0)
    took(limit, 2.0, 100)
    sizes = []
    for seconds in (0.7, 0.2, 0.4, 0.9):
        took(limit, seconds, limit.max_windows)
        sizes.append(limit.max_windows)
    assert sizes == [45, 90, 180, 180]


def test_fixed_work_of_a_small_batch_makes_no_later_batch_smaller(took: Callable[..., None]) -> None:
    limit = Deadline("tiny", 1.0)
    before = limit.max_windows
    took(limit, 0.9, 1)
    assert limit.max_windows == before


def test_a_model_too_slow_for_one_window_raises_one_alert(device: Device, took: Callable[..., None]) -> None:
    limit = Deadline("tiny", 1.0)
    for windows in (50, 1, 1, 1, 1):
        took(limit, 3.0, windows)
    assert deadline_alerts(device) == [("tiny/deadline", "raised", "warning")]
    assert [entry["id"] for entry in device.store.open_alerts("tiny")] == ["tiny/deadline"]
    took(limit, 0.5, 1)
    took(limit, 0.5, 1)
    assert deadline_alerts(device)[1:] == [("tiny/deadline", "cleared", "info")]
    assert device.store.open_alerts("tiny") == []


def test_now_and_then_a_late_window_is_no_alert(device: Device, took: Callable[..., None]) -> None:
    limit = Deadline("tiny", 1.0)
    for seconds in (3.0, 3.0, 0.5) * 4:
        took(limit, seconds, 1)
    assert deadline_alerts(device) == []
    assert deadline.to_status(device.store, device.store.counters(), "tiny", 1.0)["deadline"]["late"] == 8


@pytest.mark.parametrize("seconds", [1.0, None], ids=["the same deadline", "none any more"])
def test_an_alert_of_before_a_restart_is_cleared(
    device: Device, took: Callable[..., None], seconds: float | None
) -> None:
    limit = Deadline("tiny", 1.0)
    for _ in range(3):
        took(limit, 3.0, 1)
    device.restart()
    took(Deadline("tiny", seconds), 0.5, 1)
    assert [state for _, state, _ in deadline_alerts(device)] == ["raised", "cleared"]


def test_on_a_full_store_the_batch_after_a_late_one_is_smaller_too(
    device: Device, took: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise StorageFull("no room")

    limit = Deadline("tiny", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(device.store, "transaction", full)
        for _ in range(3):
            took(limit, 2.0, 1)
    assert limit.max_windows == 1
    assert deadline_alerts(device) == []
    took(limit, 2.0, 1)
    assert deadline_alerts(device) == [("tiny/deadline", "raised", "warning")]


def test_a_batch_without_a_window_says_nothing_of_time(device: Device, took: Callable[..., None]) -> None:
    limit = Deadline("tiny", 1.0)
    before = limit.max_windows
    took(limit, 9.0, 0)
    assert limit.max_windows == before
    assert deadline.to_status(device.store, device.store.counters(), "tiny", 1.0)["deadline"]["late"] == 0


def test_health_and_status_tell_of_a_deadline_that_was_missed(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    fields = ", ".join(f'{{ name = "{name}" }}' for name in FIELDS)
    file.write_text(
        f'[device]\nid = "pi-07"\nfleet = "acme"\ndata_dir = "data"\n[streams.watch]\nfields = [{fields}]\n'
        '[tasks.exercise]\nstream = "watch"\nbundle = "exercise"\ndeadline = "0.001 ms"\n',
        encoding="utf-8",
    )
    keys.generate(tmp_path / KEY_FILE)
    path, conf = load_config(str(file))
    with open_store(conf) as store:
        t = NOW.wall_us + 20_000 * np.arange(300, dtype=np.int64)
        with store.transaction() as tx:
            tx.append("watch", Rows(t, tuple(np.zeros(300, "<f4") for _ in range(6))), "synced")
        task = load_task(path, conf, store, "exercise")
        assert batch.run(task, store, open_message_log(path, conf, store), NOW) is not None
        output: dict[str, Any] = build_body(conf, store, {})["tasks"]["exercise"]["deadline"]
    assert (output["seconds"], output["late"], output["last"]["windows"]) == (1e-6, 1, 1)
    requested = ["status", "-c", str(file)]
    done = CliRunner().invoke(cli, [*requested, "--json"])
    assert done.exception is None, done.exception
    shown = json.loads(done.stdout)
    assert shown["tasks"][0]["deadline"] == output
    assert "1 batch was late, the last at" in CliRunner().invoke(cli, requested).stdout
